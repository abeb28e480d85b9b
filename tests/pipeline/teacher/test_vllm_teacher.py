"""The real engine against transformers: chunked prefill, preemption, tied and untied heads."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.corpus import Sequence
from pipeline.errors import ConfigError
from pipeline.models.directory import ModelFolder
from pipeline.teacher.sampling import NO_SAMPLES, Sampling
from pipeline.teacher.teacher import Teacher, TransformersTeacher
from pipeline.teacher.vllm_teacher import Pooled, PromptLogprobs, VllmTeacher
from storage import TopK
from storage.codec.v2_tables import compiled
from storage.topk import check_topk
from tests.helpers.models import quantise_int8, tiny_model, tiny_tokenizer
from tests.helpers.paths import ROOT
from tests.helpers.wrappers import tiny_wrapper

K = 16

compiled()  # loads numba, as reading version 2 does: vLLM must still start


def real_engine(test: Any) -> Any:
    """Mark a test that starts vLLM."""
    return pytest.mark.vllm(pytest.mark.slow(test))


def sequences(lengths: list[int], vocab_size: int = 512) -> list[Sequence]:
    rng = np.random.default_rng(0)
    ids = [rng.integers(1, vocab_size, length).astype(np.int32) for length in lengths]
    return [Sequence(str(n), n, 0, tokens, True) for n, tokens in enumerate(ids)]


def with_masks(given: list[Sequence]) -> list[Sequence]:
    """The same sequences with targets: a third of them, an answer in the middle, only the last, and
    all."""
    rng = np.random.default_rng(1)

    def mask(number: int, tokens: int) -> np.ndarray | None:
        found = np.zeros(tokens, bool)
        if number % 4 == 0:
            found[:] = rng.random(tokens) < 1 / 3
        elif number % 4 == 1:
            found[tokens // 2 : tokens * 3 // 4] = True
        found[-1] = True
        return None if number % 4 == 3 else found

    return [
        replace(each, targets=mask(number, len(each.input_ids)))
        for number, each in enumerate(given)
    ]


def by_transformers(model: Path, given: list[Sequence]) -> list[TopK]:
    """What transformers says at every position, and of that the positions of each sequence."""
    whole = [replace(sequence, targets=None) for sequence in given]
    every = answers(TransformersTeacher(ModelFolder(model), K, "float32"), whole)
    found = []
    for sequence, topk in zip(given, every, strict=True):
        ids, logprobs = topk.dense()
        at = sequence.positions
        found.append(TopK.from_dense(ids[at], logprobs[at], topk.tail_logprob[at]))
    return found


def answers(teacher: Teacher, given: list[Sequence]) -> list[TopK]:
    """The teacher's answers; checks that they come in order."""
    found = list(teacher.topk(iter(given)))
    assert [sequence.doc_id for sequence, _ in found] == [sequence.doc_id for sequence in given]
    return [topk for _, topk in found]


def assert_agree(one: list[TopK], other: list[TopK], tolerance: float = 1e-4) -> None:
    """Assert the same rows and the same log-probabilities; near-ties may change places."""
    assert [len(topk) for topk in one] == [len(topk) for topk in other]
    for left, right in zip(one, other, strict=True):
        for (ids, logprobs), (other_ids, other_logprobs) in zip(
            positions(left), positions(right), strict=True
        ):
            np.testing.assert_allclose(logprobs, other_logprobs, atol=tolerance)
            known = dict(zip(other_ids, other_logprobs, strict=True))
            for token, logprob in zip(ids, logprobs, strict=True):
                # an id that only one of them kept must tie with the other's last
                assert abs(known.get(token, other_logprobs[-1]) - logprob) < tolerance
        np.testing.assert_allclose(left.tail_logprob, right.tail_logprob, atol=tolerance)


def positions(topk: TopK) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    return zip(*topk.dense(), strict=True)


def engine(
    model: Path, arch: str, in_flight: int = 64, dtype: str = "float32", **engine_args: Any
) -> VllmTeacher:
    assert arch in str(ModelFolder(model).architectures).lower()
    return VllmTeacher(ModelFolder(model), K, 2048, dtype, in_flight, engine_args)


@pytest.fixture(scope="module")
def long_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("qwen3"), "qwen3", tie=True)


def test_rows_of_another_width_are_refused() -> None:
    class Output:
        class outputs:
            data = torch.zeros(9, 33, dtype=torch.int32)

    sequence = Sequence("7", 7, 0, np.zeros(5, np.int32), True)
    output: Any = Output
    with pytest.raises(RuntimeError, match=r"returned \(9, 33\) for 4 positions"):
        Pooled(16).answer(sequence, output)


@pytest.mark.parametrize("slower_starts", [True, False])
def test_why_a_way_fails_is_one_line(
    long_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    slower_starts: bool,
) -> None:
    def fail(self: object, *_: object) -> None:
        raise AssertionError(f"{type(self).__name__} needs\nBF16")

    monkeypatch.setattr(Pooled, "start", fail)
    monkeypatch.setattr(PromptLogprobs, "start", (lambda *_: None) if slower_starts else fail)
    if slower_starts:
        teacher = VllmTeacher(ModelFolder(long_model), K, 512)
        assert isinstance(teacher.path, PromptLogprobs)
    else:
        with pytest.raises(ConfigError) as told:
            VllmTeacher(ModelFolder(long_model), K, 512)
        assert "PromptLogprobs needs BF16; AssertionError: Pooled needs BF16 (its log: " in str(
            told.value
        )
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "prompt_logprobs" in line]
    assert "top-k plug-in (AssertionError: Pooled needs BF16; its log: " in line


@real_engine
def test_chunked_prefill_agrees_with_transformers(long_model: Path) -> None:
    """Documents of up to 900 tokens, 128 tokens in a step, more documents than are in flight."""
    given = sequences([2, 3, 127, 128, 129, 300, 900, 5, 640] + [50] * 20)
    masked = with_masks(given)
    with engine(long_model, "qwen3", in_flight=7, max_num_batched_tokens=128) as teacher:
        found, asked = answers(teacher, given), answers(teacher, masked)
    assert [len(topk) for topk in found] == [len(s.input_ids) - 1 for s in given]
    assert_agree(found, by_transformers(long_model, given))
    assert_agree(asked, by_transformers(long_model, masked))


def test_transformers_answers_the_targets_alone(long_model: Path) -> None:
    given = with_masks(sequences([2, 40, 31, 60, 33]))
    teacher = TransformersTeacher(ModelFolder(long_model), K, "float32")
    head, computed = teacher.model.get_output_embeddings(), []
    head.register_forward_hook(lambda _, states, out: computed.append(out.shape[1]))
    found = answers(teacher, given)
    assert computed == [len(each.positions) for each in given]
    assert_agree(found, by_transformers(long_model, given), tolerance=1e-6)


@real_engine
def test_preempted_sequences_keep_their_rows(
    long_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The KV cache holds fewer sequences than are scheduled, so some start again from 0."""
    restarts = count_restarts(monkeypatch)
    given = with_masks(sequences([700] * 12))
    with engine(
        long_model,
        "qwen3",
        max_num_batched_tokens=512,
        long_prefill_token_threshold=64,  # many sequences in a step, a piece of each
        max_num_seqs=12,
        num_gpu_blocks_override=18,
        block_size=128,
    ) as teacher:
        found = answers(teacher, given)
    assert restarts.preemptions() > 0, "nothing was preempted, so the test shows nothing"
    assert_agree(found, by_transformers(long_model, given))


class count_restarts:
    """Runs the engine in this process and counts the scheduler's preemptions."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from vllm.v1.core.sched.scheduler import Scheduler

        monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        self.number = 0
        original = Scheduler._preempt_request

        def counted(scheduler: Any, *arguments: Any, **named: Any) -> Any:
            self.number += 1
            return original(scheduler, *arguments, **named)

        monkeypatch.setattr(Scheduler, "_preempt_request", counted)

    def preemptions(self) -> int:
        return self.number


@real_engine
@pytest.mark.parametrize(("arch", "tie"), [("qwen3", False), ("llama", True), ("llama", False)])
def test_other_shapes_agree_with_transformers(tmp_path: Path, arch: Any, tie: bool) -> None:
    model = tiny_model(tmp_path, arch, tie)
    given = sequences([2, 40, 333])
    with engine(model, arch) as teacher:
        found = answers(teacher, given)
    assert_agree(found, answers(TransformersTeacher(ModelFolder(model), K, "float32"), given))


SHAPE: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "initializer_range": 0.2,
    "eos_token_id": 0,
    "bos_token_id": 0,
}
NAMED = {
    "mamba2": {
        "state_size": 16, "num_heads": 8, "head_dim": 16, "n_groups": 1, "pad_token_id": 0,
    },
    "gpt_neox": {
        "num_attention_heads": 2, "intermediate_size": 128, "max_position_embeddings": 2048,
    },
}  # fmt: skip


@pytest.mark.long
@pytest.mark.vllm
@pytest.mark.parametrize("kind", sorted(NAMED))
def test_models_that_vllm_knows_by_name_go_through_the_plugin(tmp_path: Path, kind: str) -> None:
    """vLLM finds Mamba 2's hooks and transformers' GPT-NeoX by the name of the architecture."""
    tiny_tokenizer(tmp_path)
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SHAPE, **NAMED[kind])
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    plugin_agrees(tmp_path, sequences([2, 40, 333]))


@pytest.mark.long
@pytest.mark.vllm
@pytest.mark.parametrize("kind", ["gemma3", "qwen2_5_vl", "qwen3_vl", "mistral3"])
def test_wrappers_go_through_the_plugin(tmp_path: Path, kind: str) -> None:
    """Their language model reads text alone; its samples come from the right tail."""
    plugin_agrees(tiny_wrapper(tmp_path, kind), sequences([2, 40, 333]), Sampling(40, seed=3))


def plugin_agrees(model: Path, given: list[Sequence], how: Sampling = NO_SAMPLES) -> None:
    # The reference comes first: vLLM changes classes of transformers in its process.
    size = ModelFolder(model).vocab_size
    whole = answers(TransformersTeacher(ModelFolder(model), size, "float32"), given)
    expected = answers(TransformersTeacher(ModelFolder(model), K, "float32"), given)
    with VllmTeacher(ModelFolder(model), K, 1024, "float32", 64, {}, how) as teacher:
        assert isinstance(teacher.path, Pooled)
        found = answers(teacher, given)
    assert_agree(found, expected)
    if how.draws:
        assert_drawn_from(found, whole, K, how.draws)


@real_engine
def test_two_ranks_split_the_vocabulary(long_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensor parallelism: each rank takes the top-k of its own columns and draws from their tail,
    then they are merged."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    given, how = sequences([2, 40, 333, 900]), Sampling(40, seed=3)
    options = {"max_num_batched_tokens": 128, "tensor_parallel_size": 2}
    with VllmTeacher(ModelFolder(long_model), K, 2048, "float32", 64, options, how) as teacher:
        found = answers(teacher, given)
        masked = answers(teacher, with_masks(given))
    assert_agree(found, by_transformers(long_model, given))
    assert_agree(masked, by_transformers(long_model, with_masks(given)))
    reference = TransformersTeacher(ModelFolder(long_model), 512, "float32")
    assert_drawn_from(found, answers(reference, given), K, how.draws)


@real_engine
@pytest.mark.parametrize("k", [K, 0])
def test_samples_come_from_the_tail_that_transformers_computes(long_model: Path, k: int) -> None:
    """An id of probability p in the tail is drawn N · p times, rounded down or up."""
    draws, given = 40, sequences([2, 40, 333])
    how = Sampling(draws, seed=3)
    options = {"max_num_batched_tokens": 128}
    with VllmTeacher(ModelFolder(long_model), k, 2048, "float32", 64, options, how) as teacher:
        found = answers(teacher, given)
    reference = TransformersTeacher(ModelFolder(long_model), 512, "float32")
    assert_drawn_from(found, answers(reference, given), k, draws)
    own = TransformersTeacher(ModelFolder(long_model), k, "float32", how)
    assert_drawn_from(answers(own, given), answers(reference, given), k, draws)


def assert_drawn_from(found: list[TopK], full: list[TopK], k: int, draws: int) -> None:
    different = 0
    for topk, every in zip(found, full, strict=True):
        size = every.dense()[0].shape[1]
        check_topk(topk, size)
        assert set(topk.counts.tolist()) == {k}
        p = np.zeros((len(topk), size))
        np.put_along_axis(p, every.dense()[0], np.exp(every.dense()[1].astype(float)), 1)
        np.put_along_axis(p, topk.dense()[0], 0, 1)
        assert topk.samples is not None
        drawn = np.zeros_like(p)
        at = np.repeat(np.arange(len(topk)), topk.samples.counts)
        drawn[at, topk.samples.ids] = topk.samples.times
        expected = draws * p / p.sum(1, keepdims=True)
        assert (drawn >= np.floor(expected - 0.01)).all()
        assert (drawn <= np.ceil(expected + 0.01)).all()
        different += len(topk.samples.ids)
    assert different > 3 * sum(map(len, found)), "too few different ids: the test shows little"


def without_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for an architecture that vLLM does not know."""
    monkeypatch.setattr("pipeline.teacher.vllm_teacher.class_overrides", lambda architectures: {})


@real_engine
def test_samples_without_the_plugin_are_refused(
    long_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_plugin(monkeypatch)
    with pytest.raises(ConfigError, match="draw no samples"):
        VllmTeacher(ModelFolder(long_model), K, 512, how=Sampling(8))


@real_engine
def test_two_ranks_split_the_layers(long_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pipeline parallelism: only the last rank has a head. On a CPU, vLLM must compile for it."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    given = sequences([2, 40, 333, 900])
    with engine(
        long_model,
        "qwen3",
        pipeline_parallel_size=2,
        enforce_eager=False,
        max_num_batched_tokens=128,
    ) as teacher:
        found = answers(teacher, given)
    assert_agree(found, answers(TransformersTeacher(ModelFolder(long_model), K, "float32"), given))


@real_engine
def test_a_model_that_the_plugin_cannot_wrap_uses_prompt_logprobs(
    long_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a message, and with the same answers, also at the longest length of the model."""
    without_plugin(monkeypatch)
    given = with_masks(sequences([2, 40, 333, 2048]))
    with engine(long_model, "qwen3", max_num_batched_tokens=512) as teacher:
        assert isinstance(teacher.path, PromptLogprobs)
        found = answers(teacher, given)
    assert "prompt_logprobs, which is slower" in capsys.readouterr().err
    assert_agree(found, by_transformers(long_model, given))


@real_engine
def test_the_plugin_agrees_with_vllm_on_a_quantised_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8-bit weights and activations: the plug-in's answers against vLLM's prompt_logprobs."""
    model = quantise_int8(tiny_model(tmp_path, tie=False, dtype=torch.bfloat16))
    given = sequences([2, 40, 333])
    with engine(model, "qwen3", dtype="bfloat16") as teacher:
        assert isinstance(teacher.path, Pooled)
        found = answers(teacher, given)
    without_plugin(monkeypatch)
    with engine(model, "qwen3", dtype="bfloat16") as teacher:
        assert isinstance(teacher.path, PromptLogprobs)
        expected = answers(teacher, given)
    assert_agree(found, expected, tolerance=0.05)  # there the head is in bfloat16


@real_engine
def test_a_new_call_works_after_one_was_closed_early(long_model: Path) -> None:
    given = sequences([30] * 40)
    with engine(long_model, "qwen3", in_flight=10) as teacher:
        first = teacher.topk(iter(given))
        next(first)
        first.close()
        found = answers(teacher, given[:5])
    reference = TransformersTeacher(ModelFolder(long_model), K, "float32")
    assert_agree(found, answers(reference, given[:5]))


@real_engine
def test_engine_processes_end_with_the_dump(long_model: Path, tmp_path: Path) -> None:
    """After SIGKILL for the process in front, vLLM's own processes end."""
    code = (
        "import os, signal, time, pathlib\n"
        # Under nohup, SIGHUP is ignored and engines outlive the front; these tests may run so.
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
        "from pipeline.models.directory import ModelFolder\n"
        "from pipeline.teacher.vllm_teacher import VllmTeacher\n"
        "if __name__ == '__main__':\n"
        f"    VllmTeacher(ModelFolder(pathlib.Path({str(long_model)!r})), 4, 256)\n"
        "    print('up', flush=True)\n"
        "    time.sleep(600)\n"
    )
    script = tmp_path / "front.py"
    script.write_text(code)
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    environment["PYTHONPATH"] = str(ROOT)
    with (tmp_path / "log").open("w") as log:
        front = subprocess.Popen(
            [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=log, env=environment
        )
    try:
        assert front.stdout is not None
        up = any(line == b"up\n" for line in front.stdout)
        assert up, (tmp_path / "log").read_text()[-3000:]
        engines = descendants(front.pid)
        assert engines, "the engine runs in the same process, so the test shows nothing"
    finally:
        front.kill()
        front.wait()
    deadline = time.monotonic() + 60
    while left := [pid for pid in engines if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < deadline, f"{left} live on"
        time.sleep(0.1)


def descendants(pid: int) -> list[int]:
    try:
        words = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except FileNotFoundError:
        return []
    children = [int(word) for word in words]
    return children + [below for child in children for below in descendants(child)]
