"""What a run reads of a dump's plan is there, or named, before weights are read."""

import shutil
from pathlib import Path

import pytest

from pipeline import cli
from pipeline.config import CorpusConfig, HeldOutConfig
from pipeline.errors import DAMAGED, ConfigError, RefusedError
from pipeline.training.arguments import training_arguments
from pipeline.training.identity import make_identity
from pipeline.training.inputs import Inputs, check, check_one_teacher
from pipeline.training.train import describe, mixed_dataset
from pipeline.types import Json
from storage import LogitDataset
from storage.plan import ALWAYS, FIELDS, look_up
from tests.helpers.corpora import no_document, some_texts, write_texts
from tests.helpers.forged import replan
from tests.helpers.masks import give_masks
from tests.helpers.plans import with_field, without_field
from tests.helpers.runs import settings

NEEDED = (
    *ALWAYS, "max_length", "add_eos", "teacher", "teacher.name", "teacher.fingerprint",
    "tokenizer", "tokenizer.fingerprint",
)  # fmt: skip


@pytest.fixture
def dump(dump_path: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dump_path, tmp_path / "dump"))


def start(tmp_path: Path, model: Path, dump: Path) -> int:
    corpus = write_texts(tmp_path / "domain.jsonl", some_texts(2))

    def work() -> dict[str, object]:
        inputs = Inputs(settings(tmp_path, model, dump, corpus))
        check(inputs)
        assert len(inputs.domain)
        return {}

    return cli.main(work, None)


@pytest.mark.parametrize("name", sorted(FIELDS))
def test_a_field_that_is_missing_is_named(
    dump: Path, model_path: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = LogitDataset(dump).plan
    if not look_up(plan, name)[1]:
        return
    replan(dump, without_field(plan, name))
    shutil.rmtree(dump / "tokenizer")  # its files would say what the fingerprint says
    code = start(tmp_path, model_path, dump)
    if name in NEEDED:
        assert code == DAMAGED
        assert f"plan.json: {name}" in capsys.readouterr().err
    else:
        assert code == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("teacher", "x"),
        ("tokenizer", 5),
        ("tokenizer.fingerprint", ["a"]),
        ("teacher.fingerprint", {"a": 1}),
        ("teacher.name", None),
        ("max_length", 0),
        ("max_length", -5),
        ("max_length", 2**60),
        ("max_length", True),
        ("add_eos", "yes"),
        ("add_eos", None),
        ("engine", [1]),
        ("temperature", 2.0),
    ],
)
def test_a_field_that_is_wrong_is_named(
    dump: Path,
    model_path: Path,
    tmp_path: Path,
    name: str,
    value: object,
    capsys: pytest.CaptureFixture[str],
) -> None:
    replan(dump, with_field(LogitDataset(dump).plan, name, value))
    assert start(tmp_path, model_path, dump) == DAMAGED
    assert f"plan.json: {name}: expected " in capsys.readouterr().err


def test_a_long_dump_is_longer_than_the_student_reads(
    dump: Path, model_path: Path, tmp_path: Path
) -> None:
    replan(dump, with_field(LogitDataset(dump).plan, "max_length", 10**9))
    inputs = Inputs(settings(tmp_path, model_path, dump, tmp_path / "none.jsonl"))
    with pytest.raises(ConfigError, match="the student reads at most"):
        check(inputs)


def test_a_dump_without_k_has_entries(dump: Path) -> None:
    assert LogitDataset(dump).k == 8
    plan = LogitDataset(dump).plan
    replan(dump, without_field(plan, "k"))
    assert LogitDataset(dump).k == plan["vocab_size"]


def test_a_second_start_reads_no_document(
    tmp_path: Path, model_path: Path, dump_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that a run asks of its corpora before the first step, and its items."""
    corpus = write_texts(tmp_path / "domain.jsonl", some_texts(9))
    held_out = HeldOutConfig(general=CorpusConfig(str(corpus), limit=4), sequences=3)
    config = settings(tmp_path, model_path, dump_path, corpus, mix_by="tokens", held_out=held_out)
    args = training_arguments(config)

    def start() -> list[object]:
        inputs = Inputs(config)
        check(inputs)
        identity, dataset = make_identity(inputs, args), mixed_dataset(inputs, args)
        texts = [one.input_ids.tolist() for one in inputs.held_out()["general"]]
        rows = inputs.row_tokens(args, dataset.rows_an_item), inputs.target_share
        items = [dataset[at].domain.input_ids.tolist() for at in range(len(dataset))]
        return [identity, describe(inputs, dataset, 2), texts, rows, items]

    first = start()
    no_document(monkeypatch)
    assert start() == first


def test_masks_are_told_and_counted(
    tmp_path: Path, model_path: Path, dump_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first line names the targets; the longest row has the general tokens that it takes."""
    corpus = write_texts(tmp_path / "domain.jsonl", some_texts(5))
    config = settings(tmp_path, model_path, dump_path, corpus, mix_by="tokens")
    args = training_arguments(config)
    plain = Inputs(config)
    assert plain.target_share == 1
    assert "targets" not in describe(plain, mixed_dataset(plain, args), 2)
    give_masks(monkeypatch)
    masked = Inputs(config)
    (dump,) = masked.dumps
    tokens, targets = masked.domain.lengths.sum(), masked.domain.target_counts.sum()
    shares = [targets / tokens, dump.target_counts.sum() / dump.lengths.sum()]
    assert masked.target_share == pytest.approx(max(shares))
    assert 0.2 < masked.target_share < 0.7
    expected = f"({tokens:,} tokens, {targets:,} of them targets)"
    assert expected in describe(masked, mixed_dataset(masked, args), 2)
    for inputs, beside in ((plain, 1), (masked, shares[0] / shares[1])):
        # Two items: the longest domain sequence, and as many general targets as it has on average.
        longest, mean = inputs.domain.lengths.max(), inputs.domain.lengths.mean()
        found = inputs.row_tokens(args, mixed_dataset(inputs, args).rows_an_item)
        assert found == int(2 * (longest + beside * mean))


def test_dumps_of_one_model_that_was_run_in_two_ways_are_refused() -> None:
    """Those of before do not say how it was run."""

    def of(config: Json | None, args: Json | None = None, weights: str = "a") -> Json:
        teacher = {"name": weights, "fingerprint": weights}
        engine = {"name": "vllm"} if args is None else {"name": "vllm", "args": args}
        return {
            "teacher": teacher if config is None else {**teacher, "config": config},
            "engine": engine,
        }

    one, other = {"eps": "1"}, {"eps": "2"}
    check_one_teacher([of(one), of(None), of(one)])
    check_one_teacher([of(None), of(None, {"quantization": "fp8"})])
    with pytest.raises(RefusedError, match=r"config\.json\.eps: '1' in the first dump, '2'"):
        check_one_teacher([of(None), of(one), of(other)])
    with pytest.raises(RefusedError, match="engine_args: None in the first dump"):
        check_one_teacher([of(one), of(one, {"quantization": "fp8"})])
    with pytest.raises(RefusedError, match=r"different teachers \(a, b\)"):
        check_one_teacher([of(one), of(one, weights="b")])
