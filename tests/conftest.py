"""Shared set-up: the tests work offline, and neither tokenizers nor processes take all cores."""

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes, also for what the tests start
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest
from xdist.scheduler import LoadScopeScheduling

from tests.helpers.paths import ROOT

hypothesis.settings.register_profile("no time", deadline=None)  # no test is one of speed
hypothesis.settings.load_profile("no time")

ENGINES = {
    str(file.relative_to(ROOT))
    for file in (ROOT / "tests").rglob("test_*.py")
    if "mark.vllm" in file.read_text(encoding="utf-8")
}


class OneEngine(LoadScopeScheduling):
    """Several processes: the tests of a file share one, and so do all that start vLLM."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "vllm" if file in ENGINES else file


@pytest.hookimpl(optionalhook=True)  # -p no:xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> OneEngine:
    config.option.loadscopereorder = False  # the order below
    return OneEngine(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those that start vLLM come first, because they take longest."""
    items.sort(key=lambda item: item.nodeid.partition("::")[0] not in ENGINES)


@pytest.fixture(autouse=True, scope="session")
def arrow_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep the Arrow files of `datasets` in a folder of this run, not in the user's home."""
    os.environ["HF_DATASETS_CACHE"] = str(tmp_path_factory.mktemp("datasets"))
    import datasets

    datasets.config.HF_DATASETS_CACHE = Path(os.environ["HF_DATASETS_CACHE"])


@pytest.fixture(autouse=True, scope="session")
def index_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep cached indexes of dumps in a folder of this run, not in the user's home."""
    from storage import index_files

    folder = tmp_path_factory.mktemp("indexes")
    index_files.user_cache = lambda: folder


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Qwen3 with its tokenizer."""
    from tests.helpers.models import tiny_model

    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def dump_path(tmp_path_factory: pytest.TempPathFactory, model_path: Path) -> Path:
    """A finished dump of `model_path` over 30 documents, k = 8, sequences of up to 100 tokens."""
    from pipeline.config import CorpusConfig, DumpConfig
    from pipeline.dump import dump
    from tests.helpers.corpora import some_texts, write_texts

    folder = tmp_path_factory.mktemp("dumped")
    corpus = write_texts(folder / "corpus.jsonl", some_texts(30))
    dump.run(
        DumpConfig(
            model=str(model_path),
            corpus=CorpusConfig(str(corpus)),
            output=str(folder / "dump"),
            k=8,
            max_length=100,
            engine="transformers",
            shard_tokens=2000,
        )
    )
    return folder / "dump"
