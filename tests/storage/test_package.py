"""What the package promises: its names, what it imports, its specification."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import storage
from tests.helpers.records import TARGETS, make_dump

ROOT = Path(storage.__file__).parent


def test_public_names() -> None:
    promised = {"TopK", "Record", "encode", "decode", "ShardWriter", "LogitDataset", "Manifest"}
    assert {*promised, "verify", "StorageError"} <= set(storage.__all__)
    assert all(hasattr(storage, name) for name in storage.__all__)
    errors = [
        value for name in storage.__all__ if isinstance(value := getattr(storage, name), type)
    ]
    assert all(issubclass(e, storage.StorageError) for e in errors if issubclass(e, Exception))


def test_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'vllm', 'transformers', 'pipeline'): sys.modules[name] = None\n"
        "import storage.__main__"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def readers_in_the_specification() -> dict:
    scope: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "FORMAT.md").read_text(), re.DOTALL)
    for code in blocks:
        assert len([line for line in code.splitlines() if line.strip()]) <= 18
        exec(code, scope)
    return scope


def test_reader_in_the_specification_works(tmp_path: Path) -> None:
    dump = make_dump(tmp_path, shards=1)
    scope = readers_in_the_specification()
    found = list(scope["read"](tmp_path / dump.shards()[0].file))
    expected = list(storage.LogitDataset(tmp_path))
    assert len(found) == len(expected)
    for (input_ids, ids, logprobs), record in zip(found, expected, strict=True):
        assert input_ids == record.input_ids.tolist()
        wanted_ids, wanted = record.topk.dense()
        assert (ids == wanted_ids).all()
        assert abs(logprobs - wanted).max() < 1e-5


@pytest.mark.parametrize("codec", ["v1", "v2", "v3"])
def test_position_reader_in_the_specification_works(tmp_path: Path, codec: str) -> None:
    dump = make_dump(tmp_path, shards=1, codec=codec, targets=TARGETS)
    scope, file = readers_in_the_specification(), tmp_path / dump.shards()[0].file
    expected = list(storage.LogitDataset(tmp_path))
    found = [positions.tolist() for positions in scope["read_positions"](file)]
    assert found == [record.positions.tolist() for record in expected]
    if codec == "v1":
        for (_, ids, _), record in zip(scope["read"](file), expected, strict=True):
            assert (ids == record.topk.dense()[0]).all()


@pytest.mark.parametrize("k", [0, 8])
def test_sample_reader_in_the_specification_works(tmp_path: Path, k: int) -> None:
    dump = make_dump(tmp_path, shards=1, k=k, samples=12)
    found = list(readers_in_the_specification()["read_samples"](tmp_path / dump.shards()[0].file))
    expected = [record.topk.samples for record in storage.LogitDataset(tmp_path)]
    assert len(found) == len(expected)
    for (counts, ids, shares), samples in zip(found, expected, strict=True):
        assert samples is not None
        assert (counts == samples.counts).all()
        assert (ids == samples.ids).all()
        assert (shares == samples.times / 12).all()
