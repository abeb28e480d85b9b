"""These tests run in Airflow's environment (make test-airflow), the scripts in the project's."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DAGS = ROOT / "pipeline" / "dags"
PROJECT_PYTHON = os.environ.get("MOL_DISTILL_PYTHON", str(ROOT / ".venv" / "bin" / "python"))
HOME = tempfile.mkdtemp(prefix="mol-airflow-")

# Airflow reads these when it is imported.
os.environ.update(
    AIRFLOW_HOME=HOME,
    AIRFLOW__CORE__LOAD_EXAMPLES="False",
    AIRFLOW__CORE__DAGS_FOLDER=str(DAGS),
    AIRFLOW__CORE__UNIT_TEST_MODE="False",
    AIRFLOW__DATABASE__SQL_ALCHEMY_CONN=f"sqlite:///{HOME}/airflow.db",
    AIRFLOW_VAR_MOL_DISTILL_PYTHON=PROJECT_PYTHON,
    HF_HUB_OFFLINE="1",
    OMP_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
)
sys.path.append(str(DAGS))  # Airflow does the same with the folder of a DAG


def pytest_unconfigure() -> None:
    shutil.rmtree(HOME, ignore_errors=True)


@pytest.fixture(scope="session")
def database() -> None:
    """Airflow's tables, in sqlite."""
    from airflow.utils.db import initdb

    initdb()


@pytest.fixture(scope="session")
def run_project() -> Callable[..., str]:
    """A function that runs the project's interpreter and returns its output."""

    def run(*arguments: str | Path) -> str:
        command = [PROJECT_PYTHON, *map(str, arguments)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stderr}"
        return done.stdout

    return run


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, run_project: Callable[..., str]) -> Path:
    """A folder with a tiny model, corpora, configs and `reference`, an undisturbed dump."""
    folder = tmp_path_factory.mktemp("world")
    run_project("-m", "tests.airflow.world", "make", folder)
    return folder


@pytest.fixture(scope="session")
def rows(run_project: Callable[..., str]) -> Callable[[Path], dict[str, str]]:
    """A function that reads all rows of a dump, by document and chunk. Fails on a damaged dump."""

    def read(dump: Path) -> dict[str, str]:
        found: dict[str, str] = json.loads(run_project("-m", "tests.airflow.world", "rows", dump))
        assert found
        return found

    return read


@pytest.fixture(scope="session")
def reference(world: Path, rows: Callable[[Path], dict[str, str]]) -> dict[str, str]:
    return rows(world / "reference")


@pytest.fixture(scope="session")
def params(world: Path) -> dict[str, object]:
    """Values of the trigger form, without the outputs."""
    return {
        "folder": str(world),
        "model": "model",
        "dump_config": str(world / "dump.yaml"),
        "train_config": str(world / "train.yaml"),
        "evaluate_config": str(world / "evaluate.yaml"),
    }


@pytest.fixture(autouse=True)
def no_leftovers() -> Iterator[None]:
    """Restore the environment after each test."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
