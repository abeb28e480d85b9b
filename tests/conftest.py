"""Shared set-up: the tests work offline, and neither tokenizers nor processes take all cores."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes, also for what the tests start
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With several processes, the tests of a file share one, and so do all that start vLLM: no two
    engines at a time. These come first, because they take longest."""
    engines = {item.path for item in items if item.get_closest_marker("vllm")}
    for item in items:
        group = "vllm" if item.path in engines else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: item.path not in engines)


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
