"""A dump compared with the model that made it, and with others."""

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.agreement import Answer, bounds, grid_cost
from pipeline.dump import dump
from pipeline.dump import recompute as verify
from pipeline.errors import RefusedError
from storage import CorruptShard, LogitDataset
from storage.plan import ALWAYS, FIELDS, look_up
from tests.helpers import scripts
from tests.helpers.corpora import some_texts, write_texts
from tests.helpers.dumps import settings
from tests.helpers.forged import replan
from tests.helpers.models import tiny_model
from tests.helpers.plans import with_field, without_field


def test_its_own_model_agrees_and_another_does_not(
    dump_path: Path, model_path: Path, tmp_path: Path
) -> None:
    checks = verify.recompute(str(dump_path), str(model_path), rows=12)
    assert len({check.row for check in checks}) == 12
    assert all(0 <= check.kl_mean < 1e-3 for check in checks)  # the codec's rounding
    limits = bounds(None, grid_cost({"step": 1 / 16}), "float32", "float32")
    lines, answer = verify.report(checks, limits, {})
    assert answer is Answer.SAME
    assert len(lines) == 14
    other = tiny_model(tmp_path / "other", seed=1)
    checks = verify.recompute(str(dump_path), str(other), rows=3)
    lines, answer = verify.report(checks, limits, {})
    assert answer is Answer.OTHER
    assert sum(f"<- {Answer.OTHER}" in line for line in lines) == 3
    small = tiny_model(tmp_path / "small", vocab_size=400)
    with pytest.raises(RefusedError, match=r"the token .* in the dump, none of the model"):
        verify.recompute(str(dump_path), str(small), rows=3)


def test_row_kl_is_over_the_kept_ids_and_the_tail(dump_path: Path, model_path: Path) -> None:
    """Compared with the sum written out in float64."""
    import torch
    from transformers import AutoModelForCausalLM

    from storage import LogitDataset

    model = AutoModelForCausalLM.from_pretrained(model_path)
    record = LogitDataset(dump_path)[4]
    ids = torch.from_numpy(record.input_ids[None].astype(np.int64))
    q = model(ids).logits[0, :-1].detach().double().softmax(-1).numpy()
    kept, stored = record.topk.dense()
    for at, found in enumerate(verify.row_kl(record, model)):
        p, a = np.exp(stored[at].astype(float)), np.exp(float(record.topk.tail_logprob[at]))
        mass = q[at, kept[at]]
        wanted = (p * np.log(p / mass)).sum() + a * np.log(a / (1 - mass.sum()))
        assert found == pytest.approx(wanted, abs=1e-6)


@pytest.fixture(scope="module")
def masked_path(tmp_path_factory: pytest.TempPathFactory, model_path: Path) -> Path:
    """A dump of a quarter of the targets."""
    folder = tmp_path_factory.mktemp("masked")
    corpus = write_texts(folder / "corpus.jsonl", some_texts(8))
    dump.run(settings(folder, model_path, corpus, positions=0.25))
    return folder / "dump"


def test_rows_with_masks_are_recomputed_at_their_positions(
    masked_path: Path, model_path: Path, tmp_path: Path
) -> None:
    checks = verify.recompute(str(masked_path), str(model_path), rows=6)
    rows = LogitDataset(masked_path)
    for check in checks:
        np.testing.assert_array_equal(check.positions, rows[check.row].positions)
        assert len(check.kl) == len(check.positions)
        assert 0 <= check.kl_mean < 1e-3
    limits = bounds(None, grid_cost({"step": 1 / 16}), "float32", "float32")
    assert verify.report(checks, limits, {})[1] is Answer.SAME
    # One that differs from token 50 on is said to, whatever the positions are.
    late = [replace(check, kl=np.where(check.positions < 50, check.kl, 0.1)) for check in checks]
    lines, _ = verify.report(late, limits, {"sliding_window": 50})
    assert "sliding_window is 50" in lines[-1]
    other = tiny_model(tmp_path / "other", seed=1)
    checks = verify.recompute(str(masked_path), str(other), rows=3)
    assert verify.report(checks, limits, {})[1] is Answer.OTHER


@pytest.mark.parametrize("name", sorted(FIELDS))
def test_a_plan_may_lack_what_only_others_need(
    dump_path: Path, model_path: Path, tmp_path: Path, name: str
) -> None:
    """Rows are recomputed, or the field is named: never another error. A plan without a codec is of
    version 1, so the shards of another one are then not its own."""
    plan = LogitDataset(dump_path).plan
    if not look_up(plan, name)[1] or name == "vocab_size":
        return
    copied = Path(shutil.copytree(dump_path, tmp_path / "dump"))
    replan(copied, without_field(plan, name))
    if name == "codec":
        with pytest.raises(CorruptShard, match="its codec is v3, the plan says v1"):
            verify.recompute(str(copied), str(model_path), rows=1)
    elif name in ALWAYS:
        with pytest.raises(CorruptShard, match=rf"plan\.json: {name}: "):
            verify.recompute(str(copied), str(model_path), rows=1)
    else:
        assert verify.recompute(str(copied), str(model_path), rows=1)[0].kl_mean < 1e-3


@pytest.mark.parametrize("value", ["hub", "int8", [1], None, ""])
def test_the_dtype_of_a_plan_is_one_of_weights(
    dump_path: Path, model_path: Path, tmp_path: Path, value: object
) -> None:
    copied = Path(shutil.copytree(dump_path, tmp_path / "dump"))
    replan(copied, with_field(LogitDataset(dump_path).plan, "teacher.dtype", value))
    with pytest.raises(CorruptShard, match=r"plan\.json: teacher\.dtype: expected one of auto, "):
        verify.recompute(str(copied), str(model_path), rows=1)


def test_one_wrong_row_among_many_is_found(dump_path: Path, model_path: Path) -> None:
    checks = verify.recompute(str(dump_path), str(model_path), rows=12)
    limits = bounds(None, grid_cost({"step": 1 / 16}), "float32", "float32")
    at = min(range(12), key=lambda at: len(checks[at].kl))  # their mean alone would not tell
    checks[at] = replace(checks[at], kl=checks[at].kl + 2)
    lines, answer = verify.report(checks, limits, {})
    assert answer is Answer.OTHER
    assert sum("<-" in line for line in lines) == 1
    assert verify.report([], limits, {})[1] is Answer.SAME


@pytest.mark.slow
def test_script_exit_codes(dump_path: Path, model_path: Path, tmp_path: Path) -> None:
    def run(*words: object) -> subprocess.CompletedProcess[str]:
        return scripts.run("verify_dump.py", *words)

    good = run(dump_path, "--against", model_path, "--sample", 2)
    assert good.returncode == 0, good.stderr
    assert "2 rows recomputed" in good.stdout
    other = tiny_model(tmp_path / "other", seed=1)
    assert run(dump_path, "--against", other, "--sample", 2).returncode == 4
    config = json.loads((model_path / "config.json").read_text()) | {"rms_norm_eps": 0.01}
    shutil.copy(model_path / "model.safetensors", other)
    (other / "config.json").write_text(json.dumps(config))
    words = [dump_path, "--against", other, "--sample", 2]
    assert run(*words).returncode == 3
    assert run(*words, "--accept-different").returncode == 0
    assert run(tmp_path / "none").returncode == 2
