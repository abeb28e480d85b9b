"""The environment is made once, left alone when whole, and repaired when it is not."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.helpers.paths import SCRIPTS

SCRIPT = SCRIPTS / "setup_venv.py"


def make_wheel(folder: Path, name: str, version: str) -> None:
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}/__init__.py": f"version = {version!r}\n",
        f"{name}/part.py": "",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for path, text in files.items():
            wheel.writestr(path, text)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("setup")
    (root / "wheels").mkdir()
    for name, version in [("alpha", "1.0"), ("alpha", "2.0"), ("beta", "1.0")]:
        make_wheel(root / "wheels", name, version)
    (root / "lock").write_text("# two packages\nalpha==1.0\nbeta==1.0\n")
    assert "is ready" in run(root).stdout
    return root


def run(root: Path) -> subprocess.CompletedProcess:
    """The real script, with pip kept to the wheels of this test."""
    env = {**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(root / "wheels")}
    return subprocess.run(
        [sys.executable, SCRIPT, root / "venv", root / "lock"],
        env=env,
        capture_output=True,
        text=True,
    )


def version_of(root: Path, name: str) -> str:
    code = f"import {name}, {name}.part; print({name}.version)"
    python = root / "venv" / "bin" / "python"
    return subprocess.run([python, "-c", code], capture_output=True, text=True).stdout.strip()


def site(root: Path) -> Path:
    return next((root / "venv" / "lib").glob("python*")) / "site-packages"


def test_second_run_does_nothing(made: Path) -> None:
    ready = made / "venv" / ".ready"
    before = ready.stat().st_mtime_ns
    result = run(made)
    assert (result.returncode, result.stdout) == (0, "")
    assert ready.stat().st_mtime_ns == before


def test_a_package_with_a_lost_file_is_installed_again(made: Path) -> None:
    (site(made) / "beta" / "part.py").unlink()
    result = run(made)
    assert "lacks beta" in result.stdout
    assert version_of(made, "beta") == "1.0"


def test_an_install_killed_half_way_is_finished(made: Path) -> None:
    (made / "venv" / ".ready").unlink()
    shutil.rmtree(site(made) / "alpha")
    assert run(made).returncode == 0
    assert version_of(made, "alpha") == "1.0"


def test_an_environment_without_a_working_python_is_made_anew(made: Path) -> None:
    (made / "venv" / "bin" / "python").unlink()
    assert "making" in run(made).stdout
    assert version_of(made, "alpha") == version_of(made, "beta") == "1.0"


def test_a_changed_lock_is_followed(made: Path) -> None:
    (made / "lock").write_text("alpha==2.0\nbeta==1.0\n")
    assert run(made).returncode == 0
    assert version_of(made, "alpha") == "2.0"


def test_a_missing_package_says_what_to_do(made: Path) -> None:
    (made / "lock").write_text("alpha==2.0\nbeta==1.0\ntorch==9.9+cpu\n")
    result = run(made)
    assert result.returncode == 1
    assert "PIP_FIND_LINKS" in result.stderr
    assert not (made / "venv" / ".ready").exists()
