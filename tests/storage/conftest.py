"""A small dump, and a copy of it that a test may change."""

import shutil
from pathlib import Path

import pytest

from tests.helpers.records import make_dump


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good") / "dump"
    make_dump(folder, shards=1, rows=3)
    return folder


@pytest.fixture
def dump(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "dump"))
