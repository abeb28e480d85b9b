"""What the documents tell a user to run can be run, and what they point at is there."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.cli import parse, script_parser
from pipeline.config import DumpConfig, EvalConfig, TrainConfig
from pipeline.study.config import StudyConfig
from storage.__main__ import parser as storage_parser
from tests.helpers.paths import ROOT

PAGES = [
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "deploy/README.md",
    "deploy/SIZING.md",
    "pipeline/INTEGRATIONS.md",
    "pipeline/README.md",
    "pipeline/dump/README.md",
    "pipeline/evaluation/README.md",
    "pipeline/models/SUPPORTED.md",
    "pipeline/study/BYTES.md",
    "pipeline/study/RATIO.md",
    "pipeline/study/README.md",
    "pipeline/study/SMOLLM2.md",
    "pipeline/training/README.md",
    "scripts/benchmarks/GPU.md",
    "storage/BENCHMARKS.md",
    "storage/FORMAT.md",
]
TEXTS = {page: (ROOT / page).read_text() for page in PAGES}
CONFIGS = {
    "dump": DumpConfig,
    "evaluate": EvalConfig,
    "study": StudyConfig,
    "study_small": StudyConfig,
}
# Runs a script until its arguments and settings are parsed; its work is never reached.
PARSE_ONLY = """
import argparse, runpy, sys
from pipeline import cli

def parsed(parse):
    def once(*arguments, **options):
        parse(*arguments, **options)
        sys.exit(0)
    return once

cli.parse = parsed(cli.parse)
argparse.ArgumentParser.parse_args = parsed(argparse.ArgumentParser.parse_args)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
sys.exit("the script parsed nothing")
"""


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXTS[page], re.DOTALL | re.MULTILINE)


def commands(page: str) -> list[str]:
    """Each line of the page's bash blocks; commands with placeholders stand in other blocks."""
    return [
        line.removesuffix("&").strip()
        for block in blocks(page, "bash")
        for line in block.replace("\\\n", " ").splitlines()
        if line.strip() and not line.startswith("#")
    ]


def links(page: str) -> list[str]:
    """What the page links to in this repository: a path, an #anchor or both."""
    text = re.sub(r"^```.*?^```", "", TEXTS[page], flags=re.DOTALL | re.MULTILINE)
    return sorted({link for link in re.findall(r"\]\(([^)\s]+)\)", text) if ":" not in link})


def anchors(page: Path) -> set[str]:
    """Those that GitHub gives to the headings of a page."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    heads = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def test_the_readme_is_short_and_says_how_to_begin() -> None:
    assert len(TEXTS["README.md"].splitlines()) <= 150
    assert {"make demo", "make test"} <= set(commands("README.md"))


def test_every_page_is_known() -> None:
    found = subprocess.run(
        ["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split()
    assert set(found) <= set(PAGES)


@pytest.mark.parametrize("command", sorted({line for page in PAGES for line in commands(page)}))
def test_commands_take_their_options(command: str) -> None:
    check_command(command)


def check_command(command: str) -> None:
    """Fails where a command, its options or its settings are not what the project takes."""
    words = shlex.split(command, comments=True)
    scripts = [at for at, word in enumerate(words) if word.endswith(".py") and "/" in word]
    if words[0] == "make":
        for target in [word for word in words[1:] if "=" not in word]:
            assert re.search(rf"^{target}:.*##", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif words[1:3] == ["-m", "storage"]:
        storage_parser().parse_args(words[3:])
    elif words[1:3] == ["-m", "pytest"]:
        run([sys.executable, "-m", "pytest", "--collect-only", "-q", *words[3:]])
    elif words[1] == "-m" and words[2].startswith("tests.helpers."):
        run([sys.executable, "-c", PARSE_ONLY, words[2].replace(".", "/") + ".py", *words[3:]])
    elif scripts and words[scripts[0]].startswith("scripts/"):
        run([sys.executable, "-c", PARSE_ONLY, *words[scripts[0] :]])
    else:
        pytest.fail(f"no check for {command!r}; commands with placeholders go into a plain block")


def run(command: list[str]) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr


@pytest.mark.parametrize(
    "command",
    [
        "make dmeo",
        "python scripts/evaluate.py --config scripts/configs/evaluate.yaml --domian.path x",
        "python scripts/train_student.py --model M --domain.path D --output O",  # no dump
        "python scripts/report.py runs/study --outptu study.html",
        "python scripts/none.py",
        "python -m storage inspcet runs/demo/dump",
        "python -m pytest tests/test_none.py",
        "rm -rf runs",
    ],
)
def test_a_wrong_command_is_found(command: str) -> None:
    with pytest.raises((AssertionError, SystemExit, pytest.fail.Exception)):
        check_command(command)


@pytest.mark.parametrize(("page", "link"), [(page, link) for page in PAGES for link in links(page)])
def test_links_lead_somewhere(page: str, link: str) -> None:
    path, _, anchor = link.partition("#")
    target = (ROOT / page).parent / path if path else ROOT / page
    assert target.exists()
    if anchor:
        assert anchor in anchors(target)


@pytest.mark.parametrize(
    ("page", "code"),
    [
        pytest.param(page, code, id=f"{page}-{number}")
        for page in PAGES
        if page != "storage/FORMAT.md"  # its readers are tested in tests/storage/test_package.py
        for number, code in enumerate(blocks(page, "python"))
    ],
)
def test_python_examples_run(
    page: str, code: str, dump_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(dump_path.parent)
    exec(code.replace("runs/demo/dump", "dump"), {})


@pytest.mark.parametrize(
    "file", sorted((ROOT / "scripts" / "configs").rglob("*.yaml")), ids=lambda file: file.stem
)
def test_shipped_configs_are_valid(file: Path) -> None:
    kind = CONFIGS.get(file.stem, TrainConfig)
    config, _ = parse(script_parser(kind, ""), kind, ["--config", str(file)])
    assert config
