"""A real Airflow (deploy/local.sh) and a real PostgreSQL, as context managers."""

import contextlib
import json
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.airflow.conftest import PROJECT_PYTHON, ROOT

PATIENCE = 600  # seconds until a wait fails; long, because a slow machine is not a failure


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def wait_for(
    condition: Callable[[], Any], what: str, every: float = 2.0, patience: float = PATIENCE
) -> Any:
    """Call `condition` every so many seconds until it is true; returns its value."""
    until = time.monotonic() + patience
    while True:
        if found := condition():
            return found
        if time.monotonic() > until:
            raise AssertionError(f"waited {patience} s for {what}")
        time.sleep(every)


class Airflow:
    """deploy/local.sh on a free port, and its REST API. `settings` are Airflow's, as variables."""

    def __init__(self, home: Path, database: str, settings: Mapping[str, str]) -> None:
        self.home, self.token = home, ""
        self.log = (home / "airflow.log").open("w+")
        self.settings = {
            "AIRFLOW_HOME": str(home),
            "AIRFLOW__API__PORT": str(free_port()),
            "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": database,
            "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "30",
            "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT_DETECTION_INTERVAL": "5",
            "AIRFLOW_VAR_MOL_DISTILL_PYTHON": PROJECT_PYTHON,
            **settings,
        }
        self.url = f"http://127.0.0.1:{self.settings['AIRFLOW__API__PORT']}"
        self.process = subprocess.Popen(
            [ROOT / "deploy" / "local.sh"],
            env={**os.environ, **self.settings},
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def request(self, method: str, path: str, body: object = None) -> Any:
        """Send a request; returns the JSON of the answer. Raises urllib.error.HTTPError."""
        request = urllib.request.Request(
            self.url + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json", "Authorization": f"Bearer {self.token}"},
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.loads(answer.read() or b"null")

    def ready(self) -> bool:
        """Whether the client is logged in, scheduler and DAG processor are healthy, and both DAGs
        are known."""
        if self.process.poll() is not None:
            raise AssertionError(f"airflow ended with {self.process.returncode}:\n{self.tail()}")
        try:
            health = self.request("GET", "/api/v2/monitor/health")
            parts = [health[part]["status"] for part in ("scheduler", "dag_processor")]
            if not self.token:
                passwords = self.home / "simple_auth_manager_passwords.json.generated"
                [(user, password)] = json.loads(passwords.read_text()).items()
                login = {"username": user, "password": password}
                self.token = self.request("POST", "/auth/token", login)["access_token"]
            dags = self.request("GET", "/api/v2/dags")["dags"]
        except (OSError, ValueError, KeyError):
            return False
        return parts == ["healthy"] * 2 and {dag["dag_id"] for dag in dags} == {
            "distill",
            "retrain",
        }

    def trigger(self, dag: str, conf: dict[str, object]) -> str:
        """Start a run; returns its id."""
        body = {"logical_date": None, "conf": conf}
        return str(self.request("POST", f"/api/v2/dags/{dag}/dagRuns", body)["dag_run_id"])

    def finished(self, dag: str, run: str) -> str | None:
        """The state of a run that has ended (success or failed); None before."""
        state = str(self.request("GET", f"/api/v2/dags/{dag}/dagRuns/{run}")["state"])
        return state if state in ("success", "failed") else None

    def tasks(self, dag: str, run: str) -> list[dict[str, Any]]:
        path = f"/api/v2/dags/{dag}/dagRuns/{run}/taskInstances?limit=100"
        found: list[dict[str, Any]] = self.request("GET", path)["task_instances"]
        return found

    def task_log(self, dag: str, run: str, task: str, map_index: int, attempt: int) -> str:
        path = f"/api/v2/dags/{dag}/dagRuns/{run}/taskInstances/{task}/logs/{attempt}"
        return json.dumps(self.request("GET", f"{path}?map_index={map_index}")["content"])

    def tail(self) -> str:
        self.log.flush()
        return Path(self.log.name).read_text()[-5000:]

    def stop(self) -> None:
        """Stop the whole session: SIGTERM to the parent alone would leave its children running."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(15)
        for pid in descendants_of_session(self.process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.log.close()


def descendants_of_session(session: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError):
            if int(stat.read_text().rsplit(")", 1)[1].split()[3]) == session:
                found.append(int(stat.parent.name))
    return found


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


def processes(*words: str) -> list[int]:
    """Ids of the processes whose arguments contain all the words."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            arguments = file.read_bytes().decode(errors="replace").split("\0")
            if all(word in arguments for word in words):
                found.append(int(file.parent.name))
    return found


@contextlib.contextmanager
def airflow(
    home: Path, database: str, settings: Mapping[str, str] | None = None
) -> Iterator[Airflow]:
    server = Airflow(home, database, settings or {})
    try:
        wait_for(server.ready, "Airflow to be ready")
        yield server
    finally:
        server.stop()


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """A new PostgreSQL on loopback; yields its SQLAlchemy URL.

    Skips the test if PostgreSQL is not installed; in CI it then fails.
    """
    binaries = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    found = str(binaries[-1]) if binaries else shutil.which("initdb")
    if found is None:
        if os.environ.get("CI"):
            raise AssertionError("CI installs postgresql, but there is no initdb")
        pytest.skip("PostgreSQL is not installed (apt-get install postgresql)")
    folder = Path(tempfile.mkdtemp(prefix="mol-postgres-"))
    as_user = []
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        owner = pwd.getpwnam("postgres")
        as_user = [
            "setpriv",
            f"--reuid={owner.pw_uid}",
            f"--regid={owner.pw_gid}",
            "--clear-groups",
        ]
        os.chown(folder, owner.pw_uid, owner.pw_gid)
    password, port, data = secrets.token_hex(16), free_port(), folder / "data"
    phrase = folder / "password"
    phrase.write_text(password)
    if as_user:
        os.chown(phrase, owner.pw_uid, owner.pw_gid)
    initdb = [found, "-D", str(data), "-U", "airflow", "-A", "scram-sha-256"]
    subprocess.run(
        [*as_user, *initdb, f"--pwfile={phrase}", "-E", "UTF8", "--no-sync"],
        check=True,
        capture_output=True,
        cwd=folder,
    )
    program = [str(Path(found).with_name("postgres")), "-D", str(data), "-k", str(folder)]
    given = ["-h", "127.0.0.1", "-p", str(port), "-c", "fsync=off", "-c", "max_connections=200"]
    server = subprocess.Popen(
        [*as_user, *program, *given],
        stdout=subprocess.DEVNULL,
        stderr=(folder / "log").open("w"),
        cwd=folder,
    )
    try:
        wait_for(lambda: (data / "postmaster.pid").exists() and accepts(port), "PostgreSQL", 0.2)
        yield f"postgresql+psycopg2://airflow:{password}@127.0.0.1:{port}/postgres"
    finally:
        server.send_signal(signal.SIGINT)  # PostgreSQL's fast shutdown
        server.wait()
        shutil.rmtree(folder, ignore_errors=True)


def accepts(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0
