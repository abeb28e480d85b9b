"""A corpus that the base model writes: filters, resume, and the real engine."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from pipeline import generate
from pipeline.config import CorpusConfig, GenerateConfig
from pipeline.corpus import Corpus
from pipeline.dump import dump
from pipeline.errors import ConfigError, Interrupted, RefusedError
from pipeline.models.directory import ModelFolder
from pipeline.progress import Progress
from tests.helpers import scripts
from tests.helpers.corpora import some_texts, write_texts
from tests.helpers.dumps import settings

EOS = 0


class Fake:
    """Documents depend on the seeds alone: every fourth is repetitive, every fifth a duplicate."""

    def __init__(self, batches: int | None = None) -> None:
        self.left, self.prompts = batches, []  # type: ignore[var-annotated]

    def generate(self, prompts: Any, seeds: Any, temperature: Any, top_p: Any, stops: Any) -> Any:
        assert stops == [EOS]
        if self.left == 0:
            raise Interrupted("cut off")
        self.left = None if self.left is None else self.left - 1
        self.prompts += prompts
        found = []
        for seed in seeds:
            rng = random.Random(seed % 5 == 0 or seed)
            length = rng.randint(20, 60)
            found.append(
                [300] * length
                if seed % 4 == 0
                else [*(rng.randint(50, 500) for _ in range(length)), *[EOS] * rng.randint(0, 1)]
            )
        return found


def config(tmp_path: Path, **changes: Any) -> GenerateConfig:
    given = {"model": "m", "output": str(tmp_path / "out"), "tokens": 5000, "batch": 20, **changes}
    return GenerateConfig(**given)


@pytest.fixture(scope="module")
def tokenizer(model_path: Path):  # type: ignore[no-untyped-def]
    return ModelFolder(model_path).tokenizer


def write(settings: GenerateConfig, tokenizer: Any, generator: Fake) -> dict[str, Any]:
    progress = Progress(unit="token")
    try:
        return generate.write(settings, tokenizer, generator, progress)
    finally:
        progress.close()


def written(path: Path) -> list[dict[str, Any]]:
    files = sorted(path.glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def test_repetitive_documents_and_duplicates_are_dropped(tmp_path: Path, tokenizer: Any) -> None:
    totals = write(config(tmp_path), tokenizer, Fake())
    documents = written(tmp_path / "out")
    assert totals["documents"] == len(documents)
    assert totals["tokens"] == sum(document["tokens"] for document in documents) >= 5000
    assert totals["dropped"] == 20 * totals["files"] - len(documents) > 0
    assert len({document["text"] for document in documents}) == len(documents)
    assert len({document["id"] for document in documents}) == len(documents)
    repeated = tokenizer.decode([300] * 10)
    assert not any(repeated in document["text"] for document in documents)


def test_resume_writes_the_same_documents(tmp_path: Path, tokenizer: Any) -> None:
    write(config(tmp_path), tokenizer, Fake())
    other = config(tmp_path, output=str(tmp_path / "cut"))
    for _ in range(3):
        with pytest.raises(Interrupted):
            write(other, tokenizer, Fake(batches=2))
    write(other, tokenizer, Fake())
    assert written(tmp_path / "cut") == written(tmp_path / "out")
    with pytest.raises(RefusedError, match="seed: 0 in the corpus, 1 asked for"):
        write(config(tmp_path, seed=1), tokenizer, Fake())
    more = write(config(tmp_path, tokens=9000), tokenizer, Fake())
    assert more["tokens"] >= 9000
    corpus = Corpus(CorpusConfig(str(tmp_path / "out")), tokenizer, 100)
    assert len(corpus) == more["documents"]


def test_a_finished_corpus_needs_no_engine(
    tmp_path: Path, tokenizer: Any, model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished = config(tmp_path, model=str(model_path))
    totals = write(finished, tokenizer, Fake())
    monkeypatch.setattr("pipeline.teacher.vllm_generator.VllmGenerator", None)
    assert generate.run(finished) == totals


def test_prompts_start_the_documents(tmp_path: Path, tokenizer: Any) -> None:
    texts = some_texts(6)[1:]
    prompts = CorpusConfig(str(write_texts(tmp_path / "prompts.jsonl", texts)))
    fake = Fake()
    write(config(tmp_path, prompts=prompts, prompt_tokens=4), tokenizer, fake)
    starts = [tokenizer(text)["input_ids"][:4] for text in texts]
    assert fake.prompts[:7] == [*starts, *starts[:2]]
    assert written(tmp_path / "out")[0]["text"].startswith(texts[0][:3])


def test_settings_that_drop_every_document_are_refused(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="in a row were dropped"):
        write(config(tmp_path, min_length=100), tokenizer, Fake())


STEP = "{max_num_batched_tokens: 64}"


@pytest.mark.vllm
@pytest.mark.slow
def test_the_engine_writes_a_corpus_that_stage_one_reads(tmp_path: Path, model_path: Path) -> None:
    command = ["generate_corpus.py", f"--model={model_path}", f"--output={tmp_path / 'out'}"]
    command += ["--tokens=1500", "--batch=16", "--max_length=64"]
    prompts = write_texts(tmp_path / "prompts.jsonl", some_texts(8))
    # More than a step takes: a prompt that begins in one and ends in the next kills the engine.
    command += [f"--prompts.path={prompts}", "--prompt_tokens=30", f"--engine_args={STEP}"]
    done = scripts.run(*command)
    assert done.returncode == 0, done.stderr[-3000:]
    documents = written(tmp_path / "out")
    assert sum(document["tokens"] for document in documents) >= 1500
    assert len({document["text"] for document in documents}) == len(documents)
    again = scripts.run(*command)
    assert again.returncode == 0
    assert written(tmp_path / "out") == documents
    summary = dump.run(settings(tmp_path, model_path, tmp_path / "out"))
    assert summary["documents"] == len(documents)
