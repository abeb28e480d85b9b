"""Pages about a dump, a run and a study; looked at by a browser where there is one."""

import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.agreement import Answer
from pipeline.errors import ConfigError
from pipeline.json_files import strict
from pipeline.report import dump_page, report, run_page, study_page
from pipeline.report.html import page, pairs, quote
from storage import Dump, LogitDataset, Record, ShardWriter, TopK, create_dump
from tests.helpers.forged import replan
from tests.helpers.paths import SCRIPTS
from tests.helpers.records import make_dump

SCRIPT = SCRIPTS / "report.py"
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


class Links(HTMLParser):
    """Whatever a page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        self.found += [value for value in values if not value.startswith("#")]


def fetched(text: str) -> list[str]:
    links = Links()
    links.feed(text)
    return links.found + re.findall(r"url\((?!#)[^)]*\)|@import", text)


@pytest.fixture(scope="module")
def training_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    lines = [
        {"step": step, "ce": 5 / step, "kl": 0.01 * step, "tokens_per_s": 900.0, "wait_share": 0.1}
        for step in range(1, 8)
    ]
    lines += [{"step": 7, "eval_domain_perplexity": 80.0, "eval_general_perplexity": 13.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = {"steps": 7, "null_test_kl": 4.2e-5, "identity": {"loss": {"alpha": 1.5}}}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def one_run(arm: str, seed: int, gain: float, loss: float) -> dict[str, Any]:
    text = {
        "perplexity": 20.0,
        "forward_kl": 0.1,
        "reverse_kl": 0.3,
        "tail_kl": 0.2,
        "ece": 0.01,
        "documents": 9,
        "documents_worse": 4,
        "intervals": {"perplexity": [18.0, 22.0], "forward_kl": [0.08, 0.12]},
        "worst": [
            {
                "document": 3,
                "tokens": 90,
                "nats_per_token": 3.0,
                "base_nats_per_token": 2.0,
                "text": f"<b>{arm}</b> & a very_long_word" + "x" * 300,
            }
        ],
    }
    return {
        "arm": arm,
        "learning_rate": 1e-3,
        "seed": seed,
        "domain_perplexity": 20.0,
        "general_perplexity": 12.0,
        "domain_gain": gain,
        "general_loss": loss,
        "forward_kl": 0.1,
        "reverse_kl": 0.1,
        "top1_agreement": 0.9,
        "other_loss": loss / 2,
        "other_forward_kl": 0.1,
        "other_reverse_kl": 0.1,
        "curve": {"step": [0, 5], "domain": [90.0, 20.0], "general": [12.0, 12.5]},
        "domain": text,
        "general": text,
        "other": text | {"perplexity": 31.25},
    }


@pytest.fixture(scope="module")
def study_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from pipeline.study.results import HEADLINE, spread

    runs = {
        "ce-0": one_run("ce", 0, 1.5, 0.30),
        "ce-1": one_run("ce", 1, 1.4, 0.35),
        "mol-0": one_run("mol", 0, 1.4, 0.05),
        "mol-1": one_run("mol", 1, 1.45, 0.06),
    }
    arms = [
        {"arm": arm, "learning_rate": 1e-3, "seeds": [0, 1]}
        | {
            name: spread([of[name] for of in runs.values() if of["arm"] == arm])
            for name in HEADLINE
            if not name.startswith("tasks_")  # this study has none
        }
        for arm in ("ce", "mol")
    ]
    results = {
        "model": "a/model",
        "max_length": 64,
        "machine": {"torch": "2", "device": "CPU", "threads": 2},
        "base": one_run("base", 0, 0.0, 0.0),
        "arms": arms,
        "runs": runs,
    }
    folder = tmp_path_factory.mktemp("study")
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def test_pages_say_what_was_measured(
    dump_path: Path, training_run: Path, study_folder: Path
) -> None:
    text, kind = report.make(str(dump_path))
    assert kind == "dump"
    manifest = LogitDataset(dump_path).manifest
    assert f"{manifest.tokens:,}" in text
    assert "tokenizer.fingerprint" in text
    text, kind = report.make(str(training_run))
    assert kind == "training run"
    assert "4.2e-05" in text
    assert "loss.alpha" in text
    text, kind = report.make(str(study_folder))
    assert kind == "study"
    assert "1.425 ± 0.035" in text, "mean and spread of the domain gain of mol"
    assert "<td>other</td><td>31.25</td>" in text
    assert "&lt;b&gt;mol&lt;/b&gt; &amp; a" in text
    assert "document 3, 90 targets: 2.00 → 3.00" in text
    for path in (dump_path, training_run, study_folder):
        text = report.make(str(path))[0]
        assert text.count("<svg") >= 1
        assert fetched(text) == []
        assert text == report.make(str(path))[0], "the same numbers, the same page"


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_pages_of_what_diverged(
    tmp_path: Path, training_run: Path, study_folder: Path, number: float
) -> None:
    """In the files such numbers are texts."""
    results = json.loads((study_folder / "results.json").read_text())
    ce = results["runs"]["ce-0"]
    ce["general_loss"] = ce["general"]["perplexity"] = number
    results["arms"][0]["general_loss"]["mean"] = number
    (tmp_path / "results.json").write_text(json.dumps(strict(results)))
    assert f"<td>{number:.2f}</td>" in report.make(str(tmp_path))[0]

    run = tmp_path / "run"
    shutil.copytree(training_run, run)
    line = {"step": 9, "ce": number, "kl": 0.1, "grad_norm": number}
    with (run / "metrics.jsonl").open("a") as metrics:
        metrics.write(json.dumps(strict(line)) + "\n")
    assert strict(number) not in report.make(str(run))[0]  # no axis of texts


def test_a_dump_row_against_plain_counting(dump_path: Path) -> None:
    record = LogitDataset(dump_path)[3]
    found_mass, found_hits, entropy = dump_page.look(record, 8)
    ids, logprobs = record.topk.dense()
    mass, hits = [0.0] * 8, [0] * 8
    for t in range(len(record.topk)):
        p = [math.exp(value) for value in logprobs[t]]
        tail = math.exp(record.topk.tail_logprob[t])
        for k in range(8):
            mass[k] += sum(p[: k + 1])
            hits[k] += record.input_ids[t + 1] in ids[t][: k + 1]
        assert entropy[t] == pytest.approx(-sum(x * math.log(x) for x in [*p, tail] if x > 0))
    assert found_mass == pytest.approx(mass)
    assert found_hits.tolist() == hits


def masked_dump(folder: Path, source: Path, draws: int = 0) -> LogitDataset:
    """Two of five tokens are targets: 8, which is the best entry, and 10, which is none. Ids drawn
    from the tail are 10."""
    targets = {"version": 1, "which": "mask"}
    samples = {"samples": draws, "sample_seed": 0} if draws else {}
    dump = empty_dump(folder, source, k=2, targets=targets, **samples)
    writer = ShardWriter(dump.partition(0))
    input_ids = np.array([1, 7, 8, 9, 10], np.int32)
    mask = np.array([False, False, True, False, True])
    ids = np.array([[8, 7], [8, 7]], np.int32)
    logprobs = np.log(np.array([[0.5, 0.3], [0.5, 0.3]], np.float32))
    drawn = np.full((2, draws), 10, np.int32) if draws else None
    topk = TopK.from_dense(ids, logprobs, np.log([0.2, 0.2]), drawn)
    writer.write(Record("a", 0, input_ids, topk, mask))
    writer.commit(cursor={"document": 1}, stats={"documents": 1})
    return LogitDataset(folder, partial=True)


def test_the_page_of_a_dump_with_masks_is_about_its_targets(
    tmp_path: Path, dump_path: Path
) -> None:
    (record,) = masked_dump(tmp_path / "dump", dump_path)
    mass, hits, entropy = dump_page.look(record, 2)
    assert mass == pytest.approx([1.0, 1.6], abs=0.02)
    assert hits.tolist() == [1, 1]
    assert len(entropy) == 2
    text, _ = report.make(str(tmp_path / "dump"))
    assert "<td>targets</td><td>2</td>" in text
    assert "bytes per target" in text
    assert "bytes per target" not in report.make(str(dump_path))[0]
    masked_dump(tmp_path / "drawn", dump_path, draws=3)
    text, _ = report.make(str(tmp_path / "drawn"))
    assert "<td>3</td><td>1.00</td><td>0.5000</td>" in text


@pytest.mark.parametrize("k", [65_535, None])
def test_the_page_goes_by_the_entries_of_the_rows(tmp_path: Path, k: int | None) -> None:
    """A plan may name any k, or none: a column for each would be gigabytes."""
    make_dump(tmp_path / "dump", shards=1, rows=3)
    plan = LogitDataset(tmp_path / "dump").plan
    changed = {**plan, "k": k} if k else {key: plan[key] for key in plan if key != "k"}
    replan(tmp_path / "dump", changed)
    text, _ = report.make(str(tmp_path / "dump"))
    assert "<td>8</td>" in text
    assert "65535</td><td>" not in text


def empty_dump(folder: Path, source: Path, **changes: object) -> Dump:
    """A dump of the same plan without a shard."""
    plan = LogitDataset(source).plan
    return create_dump(
        folder, {name: value for name, value in plan.items() if name != "format_version"} | changes
    )


def test_a_dump_without_a_shard_has_a_page(tmp_path: Path, dump_path: Path) -> None:
    empty_dump(tmp_path / "dump", dump_path)
    text, kind = report.make(str(tmp_path / "dump"))
    assert kind == "dump"
    assert "No shard is committed yet" in text
    assert "not finished" in text
    assert "tokenizer.fingerprint" in text


@pytest.mark.parametrize("k", [0, 4])
def test_a_dump_with_samples_has_a_page(tmp_path: Path, dump_path: Path, k: int) -> None:
    """Two draws of id 7 and one of another at each position; 7 is the next token in one of four."""
    dump = empty_dump(tmp_path / "dump", dump_path, k=k, samples=3, sample_seed=0)
    writer = ShardWriter(dump.partition(0))
    input_ids = np.array([1, 7, 8, 9, 10], np.int32)
    drawn = np.array([[7, 7, 3]] * 4, np.int32)
    ids = np.tile(np.arange(20, 20 + k, dtype=np.int32), (4, 1))
    logprobs = np.full((4, k), np.log(0.1), np.float32)
    tail = np.full(4, np.log(1 - 0.1 * k), np.float32)
    writer.write(Record("a", 0, input_ids, TopK.from_dense(ids, logprobs, tail, drawn)))
    writer.commit(cursor={"document": 1}, stats={"documents": 1})
    text, _ = report.make(str(tmp_path / "dump"))
    assert "<td>3</td><td>2.00</td><td>0.2500</td>" in text
    assert ("Mass and coverage" in text) == (k > 0)


def test_the_first_paragraph_says_what_was_found(
    dump_path: Path, training_run: Path, study_folder: Path
) -> None:
    first = {}
    for path in (dump_path, training_run, study_folder):
        text, kind = report.make(str(path))
        first[kind] = re.split("</?p>", text)[1]
        assert text.index("</h1>") < text.index("<p>") < text.index("<table")
    manifest = LogitDataset(dump_path).manifest
    assert f"read {manifest.tokens:,} tokens in {manifest.rows:,} sequences" in first["dump"]
    assert " bytes. At a position, the stored entries hold " in first["dump"]
    assert first["training run"] == (
        "The run took 7 steps. Cross-entropy on the domain went from 5 to 0.714 nats. "
        "KL to the base went from 0.01 to 0.07 nats."
    )
    assert first["study"] == (
        "ce gains most on the domain: 1.450 nats of log-perplexity. On general text it loses 0.325 "
        "nats. Of the arms that gain at least 95% of that, mol loses least: it gains 1.425 nats, "
        "and on general text it loses 0.055 nats."
    )


def test_a_loss_below_zero_is_a_gain() -> None:
    assert study_page.moved(0.25) == "loses 0.250 nats"
    assert study_page.moved(-0.434) == "gains 0.434 nats"


def test_numbers_have_separators_and_fingerprints_are_cut() -> None:
    values = {"rows": 1234567, "seconds": 12345.678, "kl": 0.00012345, "on": True, "sha": "ab" * 32}
    found = re.findall(r"<td[^>]*>([^<]*)</td>", pairs(values))[1::2]
    assert found == ["1,234,567", "12,346", "0.0001234", "True", "abababababab…"]
    assert f'title="{"ab" * 32}"' in pairs(values)


def test_pareto_front() -> None:
    points = [(0.3, 1.5), (0.05, 1.4), (0.06, 1.45), (0.35, 1.4), (0.0, 0.0), (0.05, 1.2)]
    assert study_page.pareto(points) == [(0.0, 0.0), (0.05, 1.4), (0.06, 1.45), (0.3, 1.5)]
    generator = np.random.default_rng(0)
    many = [(float(a), float(b)) for a, b in generator.random((60, 2))]
    front = study_page.pareto(many)
    for loss, gain in many:
        beaten = any(a <= loss and b >= gain and (a, b) != (loss, gain) for a, b in many)
        assert ((loss, gain) in front) == (not beaten)


def test_text_is_escaped() -> None:
    text = page("<i>", [quote("<script>"), pairs({"a": {"<b>": "&"}})])
    assert "<script>" not in text
    assert "<i>" not in text
    assert "<b>" not in text


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("$\\frac{1}{0$", "$\\frac{1}{0$"),
        ("$\\alpha$", "$\\alpha$"),
        ("a\ud800b", "a\\ud800b"),
        ("a\x1b[31m\u202eb", "a\\x1b[31m\\u202eb"),
        ("_hidden", "_hidden"),
    ],
)
def test_any_name_of_an_arm_is_shown_as_it_is(
    tmp_path: Path, study_folder: Path, name: str, shown: str
) -> None:
    text = (study_folder / "results.json").read_text()
    named = text.replace(json.dumps("ce"), json.dumps(name))
    (tmp_path / "results.json").write_text(named)
    report.run(str(tmp_path), str(tmp_path / "page.html"))
    written = (tmp_path / "page.html").read_text()
    assert re.search(rf"<text[^>]*>\s*{re.escape(shown)}</text>", written), "in the legend"
    assert re.search(rf"<td>\s*{re.escape(shown)}</td>", written), "in the table"


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("results.json", "{", "results.json: expected a JSON object, found what is not JSON"),
        ("results.json", "[" * 20_000, "results.json: expected a JSON object"),
        ("results.json", '{"arms": 5}', "results.json: not what a study writes"),
        ("metrics.jsonl", "not json\n", "metrics.jsonl, line 1: expected a JSON object"),
        ("metrics.jsonl", '{"step": 1}\n[1]\n', "metrics.jsonl, line 2: expected a JSON object"),
        ("metrics.jsonl", '{"ce": 1}\n', "metrics.jsonl: not what a training run writes"),
    ],
)
def test_files_of_others_are_named(tmp_path: Path, file: str, content: str, expected: str) -> None:
    (tmp_path / file).write_text(content)
    with pytest.raises(ConfigError, match=re.escape(expected)):
        report.make(str(tmp_path))


def test_a_log_that_a_crash_cut_short_has_a_page(tmp_path: Path, training_run: Path) -> None:
    log = (training_run / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(log + '{"step": 8, "c')
    assert report.make(str(tmp_path))[1] == "training run"


def test_another_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither a study"):
        report.make(str(tmp_path))


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_a_phone_needs_no_sideways_scrolling(
    tmp_path: Path, dump_path: Path, training_run: Path, study_folder: Path
) -> None:
    """The real script's page in a real browser, in a frame as wide as a phone."""
    for path in (dump_path, training_run, study_folder):
        output = tmp_path / "page.html"
        command = [sys.executable, str(SCRIPT), str(path), "--output", str(output)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        text = output.read_text()
        measure = (
            "<script>onload = () => document.title = "
            "[innerWidth, document.documentElement.scrollWidth].join()</script>"
        )
        output.write_text(text.replace("</body>", f"{measure}</body>"))
        frame = tmp_path / "frame.html"
        frame.write_text(
            '<iframe id="f" src="page.html" width="390" height="800"></iframe><script>onload = () '
            "=> document.title = document.getElementById('f').contentDocument.title</script>"
        )
        assert BROWSER
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
        shown = subprocess.run(
            [BROWSER, *options, f"--user-data-dir={tmp_path}/b", "--dump-dom", frame.as_uri()],
            capture_output=True,
            text=True,
            timeout=120,
        )
        found = re.search(r"<title>(\d+),(\d+)</title>", shown.stdout)
        assert found, shown.stderr[-1000:]
        width, needed = map(int, found.groups())
        assert width < 400
        assert needed <= width


def test_an_accepted_difference_is_on_the_pages(training_run: Path, tmp_path: Path) -> None:
    shutil.copytree(training_run, tmp_path / "run")
    summary = json.loads((training_run / "summary.json").read_text())
    answer = {"kl": 6e-3, "answer": str(Answer.DIFFERENT), "where": "It begins at position 64"}
    (tmp_path / "run/summary.json").write_text(json.dumps(summary | {"null_test": answer}))
    told = run_page.report(tmp_path / "run")
    assert Answer.DIFFERENT in told
    assert "begins at position 64" in told
    assert Answer.DIFFERENT not in run_page.report(training_run)
    runs = {"one": {"null_test": answer["answer"], "null_test_kl": 6e-3}, "two": {}}
    (note,) = study_page.differences({"runs": runs})
    assert "6.0e-03 nats at most, accepted in one." in note
    assert study_page.differences({"runs": {"two": {"null_test": "the same"}}}) == []
