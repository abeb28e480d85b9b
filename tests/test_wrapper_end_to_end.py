"""A wrapper from end to end: dumped by vLLM with samples, verified, trained, and loaded again by
vLLM and by transformers, through the real scripts."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline.models.directory import ModelFolder
from storage import LogitDataset
from tests.helpers.corpora import some_texts, write_texts
from tests.helpers.paths import SCRIPTS
from tests.helpers.runs import settings, yaml_of
from tests.helpers.wrappers import tiny_wrapper

PROMPT = [5, 17, 300, 42]


@pytest.mark.long
@pytest.mark.vllm
@pytest.mark.parametrize("kind", ["gemma3", "qwen3_vl"])
def test_a_wrapper_is_dumped_trained_saved_and_loaded(tmp_path: Path, kind: str) -> None:
    model = tiny_wrapper(tmp_path / "model", kind)
    corpus = write_texts(tmp_path / "corpus.jsonl", some_texts(12))
    dump = tmp_path / "dump"
    words = ["--model", model, "--corpus.path", corpus, "--output", dump]
    said = run("dump_logits.py", *words, "--k=8", "--samples=8", "--max_length=64")
    assert "prompt_logprobs" not in said, "the plug-in did not wrap it"
    assert LogitDataset(dump)[0].topk.samples is not None
    run("verify_dump.py", dump, "--against", model, "--sample", 5)
    config = settings(tmp_path, model, dump, corpus, training={"max_steps": 3})
    said = run("train_student.py", "--config", yaml_of(tmp_path / "train.yaml", config))
    assert "the dump is this model's" in said

    student = ModelFolder(tmp_path / "run" / "model")
    loaded = student.load("float32").eval()
    assert [type(loaded).__name__] == ModelFolder(model).architectures
    ids = torch.tensor([PROMPT])
    for _ in range(8):
        with torch.no_grad():
            following = loaded(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1)
        ids = torch.cat([ids, following[None]], dim=1)
    expected = ids[0, len(PROMPT) :].tolist()
    code = (
        "import pathlib, sys\n"
        "from pipeline.models.directory import ModelFolder\n"
        "from pipeline.teacher.vllm_generator import VllmGenerator\n"
        f"model = ModelFolder(pathlib.Path({str(student.path)!r}))\n"
        f"with VllmGenerator(model, 'float32', {len(PROMPT) + len(expected)}, {{}}) as generator:\n"
        f"    print(generator.generate([{PROMPT}], [0], 0.0, 1.0, None))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == str([expected])


def run(script: str, *words: object) -> str:
    """What the script said; it reads nothing from the terminal."""
    command = [sys.executable, str(SCRIPTS / script), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stderr
