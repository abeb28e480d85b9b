"""The null test's three answers, on differences that are known."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pipeline.agreement import Answer
from pipeline.config import NullTestConfig, TrainConfig
from pipeline.dump import dump
from pipeline.dump.recompute import against
from pipeline.errors import RefusedError
from pipeline.report import run_page
from pipeline.training import train
from pipeline.training.null_test import measure, null_test
from tests.helpers.corpora import some_texts, write_texts
from tests.helpers.dumps import settings as dump_settings
from tests.helpers.masked_step import LAYOUTS, VOCAB, Item, items, trainer_of
from tests.helpers.masks import masked
from tests.helpers.models import tiny_model
from tests.helpers.records import random_topk, with_samples
from tests.helpers.runs import settings

WINDOW = {
    "use_sliding_window": True,
    "sliding_window": 64,
    "layer_types": ["sliding_attention"] * 2,
}
Differ = Callable[..., tuple[Path, TrainConfig]]


def changed(model: Path, target: Path, **changes: Any) -> Path:
    """The same weights, another config.json."""
    shutil.copytree(model, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | changes))
    return target


@pytest.fixture
def differ(tmp_path: Path, model_path: Path) -> Differ:
    """(a dump by a copy whose config.json has changes, a run of the student with its own)."""

    def make(teacher: dict[str, Any], student: dict[str, Any], **more: Any) -> Any:
        texts = write_texts(tmp_path / "texts.jsonl", [text * 4 for text in some_texts(12)[2:]])
        one = changed(model_path, tmp_path / "teacher", **teacher)
        other = changed(model_path, tmp_path / "student", **student)
        config = dump_settings(tmp_path, one, texts, **more)
        dump.run(config)
        run = settings(tmp_path, other, Path(config.output), texts, training={"max_steps": 1})
        run.null_test = NullTestConfig(batches=4)
        return Path(config.output), run

    return make


def rope(theta: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": theta, "rope_type": "default"}}


@pytest.mark.parametrize(
    ("teacher", "student", "where"),
    [
        (
            WINDOW | {"sliding_window": 65},
            WINDOW,
            r"begins at position 6[45].*sliding_window is 64 \(layers 0, 1\)",
        ),
        (rope(10_000.0), rope(15_000.0), "grows with the position.*rope"),
        ({}, {"rms_norm_eps": 0.01}, "begins at the first token"),
    ],
    ids=["window", "rope", "norm"],
)
def test_a_difference_between_engines_is_refused_unless_accepted(
    differ: Differ, teacher: Any, student: Any, where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """In training and in verification, with the place where it begins."""
    path, config = differ(teacher, student)
    with pytest.raises(RefusedError, match=f"answer is: {Answer.DIFFERENT}. .*{where}") as told:
        train.run(config)
    assert "null_test.accept_different" in str(told.value)
    lines, answer = against(str(path), config.model, rows=10)
    assert answer is Answer.DIFFERENT
    assert str(Answer.DIFFERENT) in "\n".join(lines)
    config.null_test.accept_different = True
    summary = train.run(config)
    assert summary["null_test"]["answer"] == Answer.DIFFERENT
    assert (
        f"{Answer.DIFFERENT}, which null_test.accept_different accepts" in capsys.readouterr().err
    )
    assert str(Answer.DIFFERENT) in run_page.report(Path(config.output))


def test_another_model_is_refused_whatever_is_accepted(
    differ: Differ, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, config = differ({}, {})
    other = tiny_model(tmp_path / "other", seed=5)
    shutil.copy(tmp_path / "teacher/config.json", other)
    lines, answer = against(str(path), str(other), rows=3)
    assert answer is Answer.OTHER
    assert "not those of the dump's teacher" in lines[-1]
    config.model = str(other)
    assert train.run(config)["null_test"]["answer"] is None  # no bound applies to other weights
    config.output, config.null_test.accept_different = str(tmp_path / "again"), True
    claimed = json.loads((path / "plan.json").read_text())["teacher"]["fingerprint"]
    monkeypatch.setattr(train, "null_test", lambda *given: null_test(*given[:-1], claimed))
    with pytest.raises(RefusedError, match=f"answer is: {Answer.OTHER}"):
        train.run(config)


def test_bfloat16_against_float32_and_a_coarse_grid_are_the_same(differ: Differ) -> None:
    path, config = differ({}, {}, dtype="bfloat16", codec="v1", step=0.25)
    summary = train.run(config)
    assert summary["null_test"]["answer"] == Answer.SAME
    assert summary["null_test_kl"] > 5e-4  # the bound of float32 at a step of 1/16
    lines, answer = against(str(path), config.model, rows=10)
    assert answer is Answer.SAME, lines


@pytest.mark.parametrize(
    ("least", "most", "more"),
    [(1e-5, 1.2e-4, {"codec": "v1", "min_prob": 0}), (2e-5, 1.2e-4, {})],
    ids=["v1", "default"],
)
def test_a_dump_of_a_share_of_the_positions_is_at_the_codecs_floor(
    differ: Differ, least: float, most: float, more: dict[str, Any]
) -> None:
    path, config = differ({}, {}, positions=0.3, **more)
    summary = train.run(config)
    assert summary["null_test"]["answer"] == Answer.SAME
    assert least < summary["null_test_kl"] < most
    config.model = str(changed(Path(config.model), path.parent / "differs", **rope(20_000.0)))
    config.output += "-differs"
    with pytest.raises(RefusedError, match=f"answer is: {Answer.DIFFERENT}"):
        train.run(config)


def test_a_number_that_is_given_is_the_bound_of_the_same(differ: Differ) -> None:
    path, config = differ(rope(10_000.0), rope(15_000.0))
    config.null_test.bound = 0.4
    assert train.run(config)["null_test"]["answer"] == Answer.SAME
    assert against(str(path), config.model, 10, bound=0.4)[1] is Answer.SAME
    config.null_test.bound, config.output = 1e-6, config.output + "2"
    with pytest.raises(RefusedError, match=str(Answer.DIFFERENT)):
        train.run(config)


def test_a_resumed_run_still_says_what_was_accepted(differ: Differ) -> None:
    _, config = differ(WINDOW | {"sliding_window": 65}, WINDOW)
    config.training |= {"max_steps": 3, "save_strategy": "steps", "save_steps": 1}
    config.null_test.accept_different = True
    first, run = train.run(config), Path(config.output)
    shutil.rmtree(run / "model")
    (run / "summary.json").unlink()
    shutil.rmtree(run / "checkpoint-3")
    config.null_test.accept_different = False  # it is not done again, nor part of the identity
    again = train.run(config)
    assert again["null_test"] == first["null_test"]
    assert again["null_test"]["answer"] == Answer.DIFFERENT


def sampled(item: Item) -> Item:
    """The item with samples alone as the distributions of its general sequence."""
    topk = with_samples(random_topk(len(item.whole.topk), 0, VOCAB), 8, VOCAB)
    return item._replace(whole=replace(item.whole, topk=topk))


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("k", [6, 0])
def test_positions_that_are_not_stored_are_not_measured(tmp_path: Path, k: int, shift: int) -> None:
    """Of a dump with masks, the others have the measures of a dump of all positions."""
    given = items("some")
    trainer = trainer_of(tmp_path, given, "forward", LAYOUTS["one row"])
    if k == 0:
        given = list(map(sampled, given))
    found = []
    for records in (
        [item.whole for item in given],
        [masked(item.whole, item.targets) for item in given],
    ):
        read = partial(map, records.__getitem__)
        general: Any = SimpleNamespace(records=read, dumps=[SimpleNamespace(k=k)])
        found.append(measure(trainer, general, len(records), shift))
    kept = np.concatenate([item.targets[1:] for item in given])
    assert 0 < kept.sum() < len(kept)
    np.testing.assert_allclose(found[1].kl, found[0].kl[kept], rtol=1e-12)
    np.testing.assert_array_equal(found[1].positions, found[0].positions[kept])
