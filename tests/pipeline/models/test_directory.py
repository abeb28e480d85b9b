"""What a model directory tells about the model."""

import ast
import contextlib
import json
import re
from pathlib import Path

import pytest
import torch
from transformers.dynamic_module_utils import resolve_trust_remote_code

from pipeline.errors import ConfigError
from pipeline.models.directory import ModelFolder, tokenizer_fingerprint
from tests.helpers.models import tiny_model
from tests.helpers.paths import ROOT


def test_a_directory_says_what_it_is(tmp_path: Path) -> None:
    folder = ModelFolder.find(str(tiny_model(tmp_path, max_length=300, dtype=torch.bfloat16)))
    assert folder.architectures == ["Qwen3ForCausalLM"]
    assert (folder.vocab_size, folder.longest) == (512, 300)
    assert folder.dtype() == "bfloat16"
    assert folder.dtype("float32") == "float32"
    assert folder.config is folder.config
    assert folder.tokenizer is folder.tokenizer
    assert set(folder.tokenizer_files()) >= {"tokenizer.json", "tokenizer_config.json"}
    assert folder == ModelFolder(tmp_path)


def test_an_unnamed_dtype_is_float32(model_path: Path, tmp_path: Path) -> None:
    config = json.loads((model_path / "config.json").read_text())
    config.pop("dtype", None)
    config.pop("torch_dtype", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert ModelFolder(tmp_path).dtype() == "float32"


def test_an_empty_model_has_shapes_and_leaves_the_config_alone(model_path: Path) -> None:
    folder = ModelFolder(model_path)
    empty = folder.empty(torch.bfloat16)
    assert {weight.device.type for weight in empty.parameters()} == {"meta"}
    assert empty.dtype == torch.bfloat16
    own = folder.config._attn_implementation
    empty.set_attn_implementation("eager")
    assert folder.config._attn_implementation == own
    loaded = folder.load("float32")
    assert [w.shape for w in empty.parameters()] == [w.shape for w in loaded.parameters()]


def test_weights_have_a_fingerprint(model_path: Path, tmp_path: Path) -> None:
    first = ModelFolder(model_path).weights_fingerprint
    assert first == ModelFolder(model_path).weights_fingerprint
    assert first != ModelFolder(tiny_model(tmp_path / "other", seed=5)).weights_fingerprint
    (tmp_path / "none").mkdir()
    with pytest.raises(ConfigError, match="no weights"):
        _ = ModelFolder(tmp_path / "none").weights_fingerprint


def test_the_tokenizer_is_known_by_what_it_does(model_path: Path, tmp_path: Path) -> None:
    tokenizer = ModelFolder(model_path).tokenizer
    expected = tokenizer_fingerprint(tokenizer)
    tokenizer.save_pretrained(tmp_path / "saved")
    assert tokenizer_fingerprint(ModelFolder(tmp_path / "saved").tokenizer) == expected
    other = ModelFolder(tiny_model(tmp_path / "other", vocab_size=400)).tokenizer
    assert tokenizer_fingerprint(other) != expected


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such directory"):
        ModelFolder.find(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"no config\.json"):
        ModelFolder.find(str(tmp_path / "empty"))
    with pytest.raises(ConfigError, match="no tokenizer"):
        _ = ModelFolder(tmp_path / "empty").tokenizer


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        ({"tokenizer.json"}, "Qwen2Tokenizer"),
        ({"vocab.json", "merges.txt"}, "Qwen2Tokenizer"),
        ({"vocab.json", "merges.txt"}, "GPT2Tokenizer"),
        ({"tokenizer.json"}, "GPT2Tokenizer"),
        ({"tokenizer.json"}, "PreTrainedTokenizerFast"),
        ({"vocab.txt"}, "BertTokenizer"),
        (set(), "ByT5Tokenizer"),
    ],
)
def test_a_tokenizer_is_made_from_what_its_class_reads(
    tmp_path: Path, files: set[str], kind: str
) -> None:
    folder = only(tmp_path, files)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
    assert len(folder.tokenizer) > 256


@pytest.mark.parametrize(
    "name", ["chat_template.jinja", "special_tokens_map.json", "tokenizer_config.json"]
)
@pytest.mark.parametrize("kind", ["qwen3", "gemma", "gpt_neox"])
def test_files_without_a_vocabulary_are_no_tokenizer(tmp_path: Path, name: str, kind: str) -> None:
    """transformers makes one of them that has special tokens alone, and reads text as nothing."""
    folder = only(tmp_path, set())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    (tmp_path / name).write_text("{}")
    with pytest.raises(ConfigError, match=rf"no tokenizer \(.*Found {name}\. Put the base model's"):
        _ = folder.tokenizer


def only(tmp_path: Path, files: set[str]) -> ModelFolder:
    """A model directory with these files of a tokenizer and no others."""
    tiny_model(tmp_path)
    model = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    words = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", *model["vocab"]]
    texts = {
        "vocab.json": json.dumps(model["vocab"]),
        "vocab.txt": "\n".join(words),
        "merges.txt": "\n".join(["#version: 0.2", *map(" ".join, model["merges"])]),
        "tokenizer.json": (tmp_path / "tokenizer.json").read_text(),
    }
    for path in [*tmp_path.glob("tokenizer*"), *tmp_path.glob("*.jinja")]:
        path.unlink()
    for name in files:
        (tmp_path / name).write_text(texts[name])
    return ModelFolder(tmp_path)


EVIL = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\nraise SystemExit\n"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "nosuch"}, "model_type 'nosuch'"),
        ({"model_type": None}, "model_type None"),
        ({"model_type": "own", "auto_map": {"AutoConfig": "evil.C"}}, "auto_map"),
        ({"vocab_size": -1}, "vocab_size: expected 0 to"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"num_hidden_layers": 10**7}, "num_hidden_layers: expected 0 to"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"attn_implementation": "someone/kernel"}, "someone/kernel"),
    ],
)
def test_a_config_that_cannot_be_used_is_named(
    tmp_path: Path, changes: dict[str, object], words: str
) -> None:
    tiny_model(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    (tmp_path / "evil.py").write_text(EVIL)
    with pytest.raises(ConfigError, match=r"config\.json") as refused:
        ModelFolder.find(str(tmp_path))
    assert words in str(refused.value)
    assert not (tmp_path / "ran").exists()


def test_a_dtype_that_is_none_is_refused(tmp_path: Path) -> None:
    tiny_model(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"dtype": "hub"}))
    with pytest.raises(ConfigError, match=r"config\.json"):
        ModelFolder.find(str(tmp_path)).dtype()


def test_a_dtype_in_the_settings_is_checked(model_path: Path) -> None:
    for name in ("nosuch", "hub"):
        with pytest.raises(ConfigError, match=f"^dtype: expected bfloat16.*found '{name}'"):
            ModelFolder(model_path).dtype(name)


@pytest.mark.parametrize("name", ["config", "tokenizer", "tokenizer_config", "generation_config"])
def test_the_broken_file_is_named(tmp_path: Path, name: str) -> None:
    tiny_model(tmp_path)
    file = tmp_path / f"{name}.json"
    file.write_text(file.read_text()[:40])

    def read() -> None:
        folder = ModelFolder.find(str(tmp_path))
        _ = folder.tokenizer
        folder.load("float32")

    with pytest.raises(ConfigError, match=rf"/{name}\.json: expected a JSON object"):
        read()


def test_a_tokenizer_of_the_wrong_content_is_said(tmp_path: Path) -> None:
    tiny_model(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(ConfigError, match=r"no tokenizer.*Found tokenizer\.json"):
        _ = ModelFolder.find(str(tmp_path)).tokenizer


def test_code_in_a_directory_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does transformers ask for it on a terminal, or take a "y" from stdin."""
    tiny_model(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    (tmp_path / "evil.py").write_text(EVIL)
    for name, entry in [
        ("config.json", {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["evil.T", "evil.T"]}),
    ]:
        file = tmp_path / name
        given = json.loads(file.read_text()) | {"auto_map": entry}
        if name.startswith("tokenizer"):
            given["tokenizer_class"] = "EvilTokenizer"
        file.write_text(json.dumps(given))
    folder = ModelFolder.find(str(tmp_path))
    folder.load("float32")
    with contextlib.suppress(ConfigError):
        _ = folder.tokenizer
    assert not list(Path(tmp_path).rglob("ran"))


def test_an_adapter_is_refused(tmp_path: Path) -> None:
    """transformers would load the model that it names, from anywhere."""
    tiny_model(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "/elsewhere"}')
    with pytest.raises(ConfigError, match="Merge it"):
        ModelFolder.find(str(tmp_path))


def test_a_file_from_elsewhere_is_refused(tmp_path: Path) -> None:
    tiny_model(tmp_path / "model")
    (tmp_path / "secret").write_text("key")
    (tmp_path / "model" / "merges.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(ConfigError, match=r"merges\.txt is a link"):
        ModelFolder.find(str(tmp_path / "model"))


def test_nobody_is_asked_whether_to_run_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that does not say trust_remote_code is refused, whoever makes it."""

    def ask(question: str) -> str:
        raise AssertionError(question)

    monkeypatch.setattr("builtins.input", ask)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        resolve_trust_remote_code(None, "someone/model", False, True)


def test_every_load_says_that_no_code_is_run() -> None:
    """transformers' own default asks on the terminal."""
    found = 0
    for file in [*(ROOT / "pipeline").rglob("*.py"), *(ROOT / "scripts" / "benchmarks").glob("*")]:
        for node in ast.walk(ast.parse(file.read_text())) if file.suffix == ".py" else ():
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                source = ast.unparse(node)
                if re.match(r"(Auto(?!HfQ)\w+|self\.auto_class)\.from_(pretrained|config)", source):
                    found += 1
                    assert "trust_remote_code=False" in source, f"{file}: {source}"
    assert found >= 4
