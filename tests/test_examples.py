"""The example script runs, and its student learns."""

import re
import subprocess
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM

from tests.helpers.corpora import some_texts, write_texts
from tests.helpers.paths import SCRIPTS

SCRIPT = SCRIPTS / "examples" / "plain_torch.py"


def test_plain_torch(tmp_path: Path, model_path: Path, dump_path: Path) -> None:
    domain = write_texts(tmp_path / "domain.jsonl", [some_texts(1)[0][::-1]])
    arguments = [model_path, dump_path, domain, tmp_path / "student", 12]
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [
        (float(ce), float(kl)) for ce, kl in re.findall(r"CE ([\d.]+), KL ([\d.]+)", done.stdout)
    ]
    assert len(found) == 12
    assert found[0][1] < 1e-3  # the student still equals the teacher
    assert found[-1][0] < found[0][0]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "student").num_parameters() > 0
