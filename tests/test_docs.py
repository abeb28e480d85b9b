"""What the README tells a user to run can be run, and what it points at is there."""

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

README = (ROOT / "README.md").read_text()
COMMANDS = [
    line.removesuffix("&").strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip() and not line.startswith("#")
]
CONFIGS = {
    "dump": DumpConfig,
    "evaluate": EvalConfig,
    "study": StudyConfig,
    "study_small": StudyConfig,
}


def test_there_are_commands() -> None:
    assert {"make demo", "make test"} <= set(COMMANDS)


@pytest.mark.parametrize("command", [line for line in COMMANDS if "python " in line])
def test_python_commands_take_their_options(command: str) -> None:
    """Scripts parse their arguments and their config; `python -m storage` its arguments."""
    words = shlex.split(command.split("python ", 1)[1], comments=True)
    if words[:2] == ["-m", "storage"]:
        storage_parser().parse_args(words[2:])
        return
    flag = "--print_config" if "--config" in words else "--help"
    done = subprocess.run([sys.executable, *words, flag], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith("make ")])
def test_make_targets_exist(command: str) -> None:
    targets = [word for word in shlex.split(command, comments=True)[1:] if "=" not in word]
    for target in targets:
        assert re.search(rf"^{target}:.*##", (ROOT / "Makefile").read_text(), re.MULTILINE), target


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)#:]+)\)", README))))
def test_links_lead_somewhere(link: str) -> None:
    assert (ROOT / link).exists()


def test_python_examples_run(dump_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(dump_path.parent)
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    for code in blocks:
        exec(code.replace("runs/demo/dump", "dump"), {})


@pytest.mark.parametrize(
    "file", sorted((ROOT / "scripts" / "configs").rglob("*.yaml")), ids=lambda file: file.stem
)
def test_shipped_configs_are_valid(file: Path) -> None:
    kind = CONFIGS.get(file.stem, TrainConfig)
    config, _ = parse(script_parser(kind, ""), kind, ["--config", str(file)])
    assert config
