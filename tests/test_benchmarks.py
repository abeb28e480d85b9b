"""The benchmarks: one case that fails does not hide the others, and every part runs."""

import importlib
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.paths import ROOT

sys.path.append(str(ROOT / "scripts" / "benchmarks"))
processes: Any = importlib.import_module("processes")
gpu_bench: Any = importlib.import_module("gpu_bench")


def run(case: str, number: int) -> dict[str, Any]:
    if case == "raises":
        raise ValueError("no such kernel\nand more")
    if case == "dies":
        os._exit(7)
    if case == "hangs":
        os.read(os.pipe()[0], 1)
    return {"number": number, "process": os.getpid()}


@pytest.mark.parametrize("on_gpu", [True, False])
def test_a_case_that_fails_hides_no_other(monkeypatch: pytest.MonkeyPatch, on_gpu: bool) -> None:
    monkeypatch.setattr(processes, "on_gpu", lambda: on_gpu)
    cases = ["first", "raises", "second", "dies", "last"]
    found = processes.in_turn(cases, 2, run)
    assert [one["number"] for name in ("first", "second", "last") for one in found[name]] == [
        *(0, 1),
        *(0, 1),
        *(0, 1),
    ]
    assert found["raises"] == [{"failed": "ValueError: no such kernel"}]
    assert found["dies"] == [{"failed": "its process ended with exit code 7"}]
    first, second = (found[name][0]["process"] for name in ("first", "second"))
    assert (first == second) is on_gpu
    assert os.getpid() not in (first, second)


def test_time_is_bounded() -> None:
    assert processes.in_turn(["hangs", "last"], 1, run, 0.1) == {
        "hangs": [{"failed": "no time left"}],
        "last": [{"failed": "no time left"}],
    }


def test_one_case_is_shown_beside_what_it_is_compared_with(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it fails, and where nothing can be compared with."""
    bench_loss: Any = importlib.import_module("bench_loss")
    words = ["--case", "cross-entropy, fused", "--case", "cross-entropy, quack"]
    for failing in (None, bench_loss.BASE, "cross-entropy, fused"):

        def job(given: Any, job: str, errors: bool, failing: str | None = failing) -> Any:
            if job.endswith(str(failing)):
                raise ValueError("no luck")
            return {"seconds": 2.0, "bytes": 1}

        monkeypatch.setattr(bench_loss, "run_job", job)
        assert bench_loss.main(words) is (failing is not None)
        head, _, *rows = capsys.readouterr().out.splitlines()
        assert head.startswith("N 2,048")
        names = [bench_loss.BASE, "cross-entropy, fused", "cross-entropy, quack"]
        assert len(rows) == len(names)
        for name, row in zip(names, rows, strict=True):
            assert row.startswith(name)
            assert ("ValueError: no luck" in row) is (name == failing)


def fake_part(name: str, **attributes: Any) -> Any:
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(attributes)
    return gpu_bench.Part(name, "", "--small", 5, "nothing")


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    def works(words: list[str]) -> bool:
        print("table of", *words)
        return False

    def stops(words: list[str]) -> bool:
        raise RuntimeError("out of luck")

    def exits(words: list[str]) -> bool:
        raise SystemExit("its engine stopped")

    made = {
        "exits": fake_part("bench_exits", main=exits),
        "stops": fake_part("bench_stops", main=stops),
        "absent": gpu_bench.Part("bench_that_is_not_there", "", "", 5, "nothing"),
        "lacks": gpu_bench.Part("bench_works", "", "", 5, "a package", ("not_installed_here",)),
        "works": fake_part("bench_works", main=works),
    }
    monkeypatch.setattr(gpu_bench, "PARTS", made)
    return tmp_path / "made" / "page.md"


def call(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["gpu_bench.py", *words])
    try:
        gpu_bench.main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def test_a_part_that_fails_hides_no_other(monkeypatch: pytest.MonkeyPatch, parts: Path) -> None:
    assert call(monkeypatch, "--tiny", "--output", str(parts)) == 1
    page = parts.read_text()
    assert "table of --small --seconds 5\n" in page
    assert "failed: RuntimeError: out of luck" in page
    assert "failed: its engine stopped" in page
    assert "not run: No module named 'bench_that_is_not_there'" in page
    assert "not run: No module named 'not_installed_here'" in page
    others = ["--part", "absent", "--part", "works"]
    assert call(monkeypatch, "--tiny", "--output", str(parts), *others) == 0


def test_listing_runs_nothing(
    monkeypatch: pytest.MonkeyPatch, parts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "--list", "--output", str(parts)) == 0
    monkeypatch.setattr(gpu_bench, "on_gpu", lambda: False)
    assert call(monkeypatch, "--output", str(parts)) == 0
    shown = capsys.readouterr().out
    assert shown.count("bench_works.py") == 2 * 2
    assert "nothing was run: no CUDA device" in shown
    assert not parts.exists()


def test_make_passes_the_parts_on() -> None:
    command = ["make", "-n", "gpu-bench", "LIST=1", "PART=loss head"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "gpu_bench.py --list --part loss --part head\n" in done.stdout


@pytest.mark.slow
def test_every_part_runs_on_a_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All but stage one, whose engine takes a minute."""
    page = tmp_path / "page.md"
    parts = [word for part in gpu_bench.PARTS if part != "dump" for word in ("--part", part)]
    assert call(monkeypatch, "--tiny", "--output", str(page), *parts) == 0
    shown = page.read_text()
    assert shown.count("not on CPU") == 16  # of two vocabularies
    for line in ("top-k forward KL, fused", "matrix products alone", "mol from disk", "packing"):
        assert line in shown
    assert "not run" not in shown
    assert "failed" not in shown
