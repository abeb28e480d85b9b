"""Packed forwards against lm-evaluation-harness by itself, on the same questions."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("lm_eval", reason="needs mol-distill[tasks]")

import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM

from pipeline import chat_renderer, chats
from pipeline.config import TaskConfig
from pipeline.errors import ConfigError
from pipeline.evaluation.branches import Branched
from pipeline.evaluation.compare import load
from pipeline.evaluation.harness import PackedLM, asked, scored
from pipeline.evaluation.tasks import Tasks
from pipeline.models.directory import ModelFolder
from pipeline.types import Json
from tests.helpers.models import tiny_model
from tests.helpers.questions import task_folder, write_questions, write_written


@pytest.fixture(autouse=True)
def no_look_at_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """simple_evaluate asks pip and git for seconds."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)
    monkeypatch.setattr("lm_eval.evaluator.get_git_commit_hash", lambda: None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    return ModelFolder(tiny_model(tmp_path_factory.mktemp("model"), max_length=128))


def ours(folder: ModelFolder, task: TaskConfig, batch_tokens: int = 200) -> list[Json]:
    tasks = Tasks({"one": task}, batch_tokens)
    return tasks.answers("one", load(folder, "float32"), folder.tokenizer)


def theirs(folder: ModelFolder, tasks: list[Any], **options: Any) -> list[Json]:
    """The samples of lm_eval.simple_evaluate with its own forward."""
    options.setdefault("task_manager", TaskManager(include_defaults=False))
    model = AutoModelForCausalLM.from_pretrained(folder.path)
    found = lm_eval.simple_evaluate(
        HFLM(pretrained=model, tokenizer=folder.tokenizer, batch_size=3),
        tasks=tasks,
        bootstrap_iters=0,
        log_samples=True,
        **options,
    )
    (samples,) = found["samples"].values()
    return sorted(samples, key=lambda sample: sample["doc_id"])


def assert_same_choices(found: list[Json], expected: list[Json]) -> None:
    assert len(found) == len(expected) > 5
    for mine, other in zip(found, expected, strict=True):
        assert mine["prompt"] == other["arguments"][0][0]
        logprobs = [logprob for logprob, _ in other["filtered_resps"]]
        assert mine["logprobs"] == pytest.approx(logprobs, abs=1e-4)
        assert mine["scores"] == {name: other[name] for name in ("acc", "acc_norm")}
    means = [np.mean([row["scores"]["acc"] for row in found])]
    assert means == pytest.approx([np.mean([row["acc"] for row in expected])], abs=1e-4)


def test_choices_equal_the_harness_on_its_own_task(folder: ModelFolder, tmp_path: Path) -> None:
    """A task in YAML, by the harness alone; by packed forwards; and the same questions as JSONL."""
    questions = write_questions(tmp_path / "q.jsonl")
    local = task_folder(tmp_path / "tasks", questions)
    expected = theirs(
        folder,
        ["local_task"],
        task_manager=TaskManager(include_path=str(local), include_defaults=False),
    )
    named = ours(folder, TaskConfig(harness="local_task", folder=str(local), trust_code=True))
    assert_same_choices(named, expected)
    assert_same_choices(ours(folder, TaskConfig(path=str(questions))), expected)
    assert {row["scores"]["acc"] for row in named} == {0, 1}, "a test of scores needs both"


@pytest.mark.parametrize("changes", [{"chat": True}, {"shots": 2}, {"limit": 7}])
def test_chats_and_shots_equal_the_harness(
    folder: ModelFolder, tmp_path: Path, changes: dict[str, Any]
) -> None:
    task = TaskConfig(path=str(write_questions(tmp_path / "q.jsonl")), **changes)
    made = Tasks({"one": task}, 64).made("one")
    if "shots" in changes:
        made["one"].set_config("num_fewshot", 2)
    expected = theirs(
        folder,
        list(made.values()),
        apply_chat_template=task.chat,
        num_fewshot=task.shots,
        limit=task.limit,
    )
    assert_same_choices(ours(folder, task), expected)


SYSTEM = {"role": "system", "content": "Be brief."}
QUESTION = {"role": "user", "content": "?"}


def lm_with(folder: ModelFolder, template: str) -> PackedLM:
    tokenizer = deepcopy(folder.tokenizer)
    tokenizer.chat_template = template
    return PackedLM(load(folder, "float32"), tokenizer, 64)


def test_a_template_has_the_bounds_of_those_of_corpora(
    folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_renderer, "CPU_SECONDS", 1)
    renderer = chat_renderer.Renderer()
    monkeypatch.setattr(chats, "RENDERER", renderer)
    bomb = "{% for a in range(9999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(ConfigError, match=r"tasks: chat: .* takes more than 1 s of CPU time"):
        lm_with(folder, bomb).apply_chat_template([QUESTION])
    renderer.stop()


def test_a_template_without_system_messages_and_one_with_a_beginning(folder: ModelFolder) -> None:
    plain = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    strict = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + plain
    )
    expected = "user: ?\nassistant:"
    assert lm_with(folder, strict).apply_chat_template([SYSTEM, QUESTION]) == expected
    both = lm_with(folder, plain)
    assert both.apply_chat_template([SYSTEM, QUESTION]) == f"system: Be brief.\n{expected}"
    with pytest.raises(ConfigError, match="gen_prefix"):
        both.apply_chat_template([QUESTION], add_generation_prompt=False)


def test_written_answers_equal_the_harness(folder: ModelFolder, tmp_path: Path) -> None:
    texts = [row["answer"] for row in ours_written(folder, tmp_path, ["?"] * 7)]
    # Right, right but for case and punctuation, one of several, and wrong.
    answers = [texts[0], f" {texts[1].upper()} !", ["?", texts[2]], *["?"] * 4]
    found = ours_written(folder, tmp_path, [a if isinstance(a, list) else [a] for a in answers])
    task = TaskConfig(path=str(tmp_path / "w.jsonl"), max_tokens=6)
    expected = theirs(folder, list(Tasks({"one": task}, 64).made("one").values()))
    assert [row["answer"] for row in found] == [row["filtered_resps"][0] for row in expected]
    scores = [row["scores"]["exact_match"] for row in found]
    assert scores == [row["exact_match"] for row in expected]
    assert scores[0] == scores[2] == 1
    assert 0 in scores


def ours_written(folder: ModelFolder, tmp_path: Path, answers: list[Any]) -> list[Json]:
    file = write_written(tmp_path / "w.jsonl", answers)
    return ours(folder, TaskConfig(path=str(file), max_tokens=6))


def test_batches_do_not_change_the_answers(folder: ModelFolder, tmp_path: Path) -> None:
    task = TaskConfig(path=str(write_questions(tmp_path / "q.jsonl")))
    one, other = (ours(folder, task, size) for size in (1, 4096))
    for mine, again in zip(one, other, strict=True):
        assert mine["logprobs"] == pytest.approx(again["logprobs"], abs=1e-5)


def test_requests_by_context() -> None:
    requests = [(("", ""), [1, 2], [3, 7]), (("", ""), [1, 2], [3, 8]), (("", ""), [1, 2], [9])]
    (group,) = asked(requests, 100, 3)
    assert group.read == Branched((1, 2), ((3,), ()))
    assert group.requests == [[0, 1], [2]]
    apart = asked(requests, 100, 2)
    assert [part.read for part in apart] == [Branched((1, 2), ((3,),)), Branched((1, 2), ((),))]
    assert [part.requests for part in apart] == [[[0, 1]], [[2]]]
    (cut,) = asked(requests[:1], 2, 100)
    assert cut.read == Branched((2,), ((3,),))
    with pytest.raises(ConfigError, match="an answer of 2 tokens, and the model reads at most 1"):
        asked(requests[:1], 1, 100)


def test_scores_of_a_continuation() -> None:
    logprobs = torch.full((2, 10), -5.0)
    logprobs[0, 3], logprobs[1, 8] = -0.5, -0.25
    assert scored(logprobs, [8]) == (-0.25, True)
    assert scored(logprobs, [7]) == (-5.0, False)
    assert scored(logprobs, [3, 8]) == (-0.75, True)
    assert scored(logprobs, [3, 9]) == (-5.5, False)


def test_a_long_question_is_cut_at_the_left_as_the_harness_does(
    folder: ModelFolder, tmp_path: Path
) -> None:
    rows = [{"question": "word " * 200, "options": ["a b", "c d e"], "answer": 0}] * 6
    file = tmp_path / "q.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = TaskConfig(path=str(file))
    expected = theirs(folder, list(Tasks({"one": task}, 64).made("one").values()))
    assert_same_choices(ours(folder, task), expected)


def test_the_head_reads_the_options_alone(folder: ModelFolder, tmp_path: Path) -> None:
    """So memory goes by the tokens of the options, not by those of the questions."""
    model = load(folder, "float32")
    seen: list[int] = []
    model.lm_head.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))
    lm = PackedLM(model, folder.tokenizer, 4096)
    lm._loglikelihood_tokens([(("", ""), list(range(60)), [5, 6]), (("", ""), [9] * 50, [7])])
    assert seen[-1] == 3
