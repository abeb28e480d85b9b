"""Every field of a plan is checked when a dump is opened."""

import copy
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage import CorruptShard, Dump, FormatVersionError, LogitDataset, create_dump
from storage.__main__ import main
from storage.plan import ALWAYS, FIELDS, check_plan, look_up, needed
from tests.helpers.forged import read_json, replan, seal
from tests.helpers.plans import with_field, without_field
from tests.helpers.records import TARGETS, make_dump, plan

PIPELINE: dict[str, Any] = {
    **plan(samples=16, sample_seed=-3, codec="v2", min_prob=0.1, top_p=0.9),
    "temperature": 1.0,
    "targets": {"version": 1, "which": "assistant", "positions": 0.2, "positions_seed": 3},
    "max_length": 2048,
    "add_eos": True,
    "bos_token_id": None,
    "eos_token_id": 0,
    "shard_tokens": 1000,
    "teacher": {
        "name": "base",
        "revision": None,
        "architectures": ["Qwen3ForCausalLM"],
        "fingerprint": "f0",
        "config": {"rms_norm_eps": "1e-06"},
        "dtype": "bfloat16",
    },
    "tokenizer": {"fingerprint": "f1"},
    "corpus": {
        "path": "c.jsonl",
        "column": "text",
        "documents": 9,
        "fingerprint": "f2",
        "special_tokens": "split",
        "rendering": {"sample": "f3", "chat_template": {"fingerprint": "f4"}},
    },
    "engine": {"name": "vllm", "version": "0.32.0", "args": {"quantization": "fp8"}},
}
NULLS = ("bos_token_id", "eos_token_id", "teacher.revision")
ODD: list[Any] = [None, True, -5, 2**40, 10**30, 1.5, -1.0, 9e99, "", [1], {"x": []}]


@pytest.mark.parametrize(
    "changes",
    [
        {"vocab_size": None},
        {"vocab_size": "x"},
        {"vocab_size": True},
        {"vocab_size": 2**40},
        {"partitions": 10**9},
        {"partitions": "many"},
        {"partitions": 0},
        {"k": -1},
        {"k": 2 * 10**9},
        {"step": 0},
        {"step": 8},
        {"samples": 10**6},
        {"samples": "x"},
        {"codec": 2},
    ],
)
def test_a_plan_out_of_range_names_the_key(dump: Path, changes: dict[str, Any]) -> None:
    (key,) = changes
    with pytest.raises(CorruptShard, match=rf"plan\.json: {key}: expected .*, found "):
        check_plan({**plan(), **changes})
    seal(dump, changes)
    for command in (["inspect"], ["verify"], ["verify", "--partial"], ["gc"]):
        assert main([*command[:1], str(dump), *command[1:]]) == 4
    with pytest.raises(CorruptShard, match=key):
        create_dump(dump.parent / "new", {**plan(), **changes})
    assert not (dump.parent / "new").exists()


def test_the_example_has_every_field() -> None:
    assert all(look_up(PIPELINE, name)[1] for name in FIELDS)
    check_plan(PIPELINE)


@pytest.mark.parametrize("name", FIELDS)
def test_each_field_refuses_what_it_cannot_be(name: str) -> None:
    refused = 0
    for odd in ODD:
        if FIELDS[name].holds(odd):
            continue
        refused += 1
        with pytest.raises(CorruptShard, match=rf"plan\.json: {name}: expected "):
            check_plan(with_field(PIPELINE, name, odd))
    assert refused >= 6  # such as a text for a number, and the other way round


@pytest.mark.parametrize("name", sorted(FIELDS))
def test_a_field_may_be_absent_or_null_only_where_it_says(name: str) -> None:
    absent = without_field(PIPELINE, name)
    if name in ALWAYS:
        with pytest.raises(CorruptShard, match=name):
            check_plan(absent)
    else:
        check_plan(absent)
        with pytest.raises(CorruptShard, match=rf"plan\.json: {name}: .* found nothing"):
            needed(absent, name)
    assert FIELDS[name].holds(None) == (name in NULLS)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda part: st.lists(part, max_size=3) | st.dictionaries(st.text(), part, max_size=3),
    max_leaves=5,
)


@given(st.sampled_from(sorted(FIELDS)), anything)
def test_any_value_is_taken_or_refused_by_name(name: str, value: Any) -> None:
    with suppress(CorruptShard):
        check_plan(with_field(PIPELINE, name, value))


def test_entries_and_draws_of_a_position_fit_a_count() -> None:
    check_plan(plan(k=65_000, samples=535))
    with pytest.raises(CorruptShard, match="k: expected at most 65535 together with samples"):
        check_plan(plan(k=65_000, samples=536))


def test_unknown_fields_are_left_alone(tmp_path: Path) -> None:
    extra = {**copy.deepcopy(PIPELINE), "later": {"a": [None]}}
    extra["teacher"]["later"] = 5
    create_dump(tmp_path / "dump", extra)
    assert Dump(tmp_path / "dump").plan["teacher"]["later"] == 5


def test_only_a_plan_with_targets_is_of_format_version_2(tmp_path: Path) -> None:
    """Releases that know no masks refuse the version; all other dumps stay as they were."""
    for name, more, version in (("a", {}, 1), ("b", {"targets": TARGETS}, 2)):
        dump = make_dump(tmp_path / name, shards=1, rows=1, **more)
        assert dump.plan["format_version"] == version
        assert read_json(tmp_path / name / "manifest.json")["format_version"] == version


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"format_version": 3}, FormatVersionError, "dump: format version 3, .* versions 1 and 2"),
        ({"targets": {"version": 2}}, FormatVersionError, "dump: targets of version 2, .* 1; use"),
        ({"targets": {"version": 0}}, CorruptShard, r"plan\.json: targets\.version: expected"),
        ({"targets": {}}, CorruptShard, r"plan\.json: targets\.version: .* found nothing"),
        ({"targets": None}, CorruptShard, r"plan\.json: targets: expected an object"),
        ({"format_version": 1}, CorruptShard, r"format_version: expected 2 in a plan with targets"),
    ],
)
def test_a_plan_says_which_release_reads_it(
    tmp_path: Path, changes: dict[str, Any], error: type, message: str
) -> None:
    make_dump(tmp_path / "dump", shards=1, rows=1, targets=TARGETS)
    seal(tmp_path / "dump", changes)
    with pytest.raises(error, match=message):
        LogitDataset(tmp_path / "dump")
    assert main(["verify", str(tmp_path / "dump")]) == 4
    with pytest.raises(error, match=message.removeprefix("dump")):
        create_dump(tmp_path / "new", plan(**{"targets": TARGETS, **changes}))
    assert not (tmp_path / "new").exists()


def test_targets_cannot_be_taken_out_of_a_plan(tmp_path: Path) -> None:
    make_dump(tmp_path / "dump", shards=1, rows=1, targets=TARGETS)
    there = read_json(tmp_path / "dump" / "plan.json")
    del there["targets"]
    replan(tmp_path / "dump", there)
    with pytest.raises(CorruptShard, match=r"format_version: expected 2 .*, 1 without, found 2"):
        LogitDataset(tmp_path / "dump")
    replan(tmp_path / "dump", {**there, "format_version": 1})
    with pytest.raises(CorruptShard, match=r"manifest\.json: format_version: expected 1"):
        LogitDataset(tmp_path / "dump")
    seal(tmp_path / "dump", manifest={"format_version": 1})
    with pytest.raises(CorruptShard, match=r"00000\.json: positions: expected 19, the tokens"):
        LogitDataset(tmp_path / "dump")[0]
