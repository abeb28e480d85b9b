"""A script finds the others beside itself, also where the package is installed elsewhere."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import ConfigError, FailedError, Interrupted, RefusedError
from pipeline.script_files import run_script, script
from tests.helpers.paths import ROOT, SCRIPTS


def test_scripts_of_the_checkout_are_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "python")])
    assert script("dump_logits.py") == SCRIPTS / "dump_logits.py"
    with pytest.raises(ConfigError, match="neither in"):
        script("nothing.py")


def test_an_installed_package_uses_the_scripts_that_run(tmp_path: Path) -> None:
    """Copies of the packages stand for a wheel."""
    for name in ("pipeline", "storage"):
        shutil.copytree(ROOT / name, tmp_path / "site" / name)
    mine = tmp_path / "scripts"
    (mine / "configs" / "demo").mkdir(parents=True)
    (mine / "dump_logits.py").write_text("")
    lines = [
        "from pipeline.script_files import script",
        "import pipeline.demo as demo",
        "print(script('dump_logits.py'), script(demo.CONFIGS))",
    ]
    (mine / "study.py").write_text("\n".join(lines))
    done = subprocess.run(
        [sys.executable, str(mine / "study.py")],
        env={"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == [str(mine / "dump_logits.py"), str(mine / "configs" / "demo")]


@pytest.mark.parametrize(
    ("code", "error"),
    [(1, FailedError), (2, ConfigError), (3, RefusedError), (4, ConfigError), (75, Interrupted)],
)
def test_the_exit_code_of_a_script_decides_the_error(
    code: int, error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ends.py").write_text("import sys\nsys.exit(int(sys.argv[1]))\n")
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "main.py")])
    run_script("ends.py", "0")
    with pytest.raises(error, match=rf"ends\.py ended with exit code {code}"):
        run_script("ends.py", str(code), folder=tmp_path)
