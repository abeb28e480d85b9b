"""What the hosts share, on the third host: Redis, PostgreSQL, an S3 store and Airflow's servers."""

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest

from tests.airflow.conftest import PROJECT_PYTHON, ROOT
from tests.airflow.servers import Airflow, accepts, airflow, free_port, postgres, wait_for
from tests.cluster.hosts import HUB, Host

BUCKET = "bucket"


@contextlib.contextmanager
def program(port: int, *command: str | Path) -> Iterator[None]:
    """A server that runs once it accepts connections at `port`, and is killed at the end."""
    with subprocess.Popen(
        list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT
    ) as server:
        try:
            wait_for(lambda: accepts(port), f"{command[0]}", every=0.1)
            yield
        finally:
            server.kill()


@contextlib.contextmanager
def redis(folder: Path) -> Iterator[str]:
    """A new Redis, which keeps nothing; yields its URL. Skips the test if it is not installed."""
    if shutil.which("redis-server") is None:
        assert not os.environ.get("CI"), "CI installs redis-server, but there is none"
        pytest.skip("Redis is not installed (apt-get install redis-server)")
    port, password = free_port(), secrets.token_hex(16)
    given = ["--port", str(port), "--requirepass", password, "--save", "", "--dir", folder]
    with program(port, "redis-server", *given):
        yield f"redis://:{password}@{HUB}:{port}/0"


@dataclass
class Store:
    """An S3 server."""

    port: int
    environment: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://{HUB}:{self.port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def request(self, method: str, name: str, data: bytes | None = None) -> bytes | None:
        """The body of the answer; None if there is no such object."""
        request = urllib.request.Request(
            f"http://{HUB}:{self.port}/{name}",
            data,
            # moto asks for an authorization, and does not check it; it reads a form as one.
            {"Authorization": "AWS test:test", "Content-Type": "application/octet-stream"},
            method=method,
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return bytes(answer.read())
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return None
            raise

    def put(self, file: Path) -> str:
        """Upload a file; returns its address."""
        self.request("PUT", f"{BUCKET}/{file.name}", file.read_bytes())
        return f"s3://{BUCKET}/{file.name}"


@contextlib.contextmanager
def store() -> Iterator[Store]:
    """A new S3 server with one bucket, which every host can reach."""
    found = Store(free_port())
    command = [PROJECT_PYTHON, "-m", "moto.server", "-H", "0.0.0.0", "-p", str(found.port)]
    with program(found.port, *command):
        found.request("PUT", BUCKET)
        yield found


@dataclass
class Cluster:
    """Airflow with CeleryExecutor on the third host, and workers on the others."""

    airflow: Airflow
    store: Store
    hosts: list[Host]
    logs: Path
    environment: dict[str, str]
    """Of the workers: settings of Airflow, and where the store is."""
    workers: "dict[str, subprocess.Popen[bytes]]" = field(default_factory=dict)

    def add_worker(self, host: Host, queues: str) -> None:
        """Start a worker on a host for tasks of these queues, one at a time, and wait for it.

        It reaches Redis, Airflow's API server and the store, and has no database.
        """
        name = f"{queues.replace(',', '-')}@{host.name}"
        log = self.logs / f"{name}.log"
        worker = self.workers[name] = host.start(
            log,
            ROOT / ".venv-airflow" / "bin" / "airflow",
            *("celery", "worker", "--concurrency", "1", "--queues", queues),
            *("--celery-hostname", name),
            **self.environment,
            AIRFLOW_HOME=str(host.home / "airflow"),
            AIRFLOW__DATABASE__SQL_ALCHEMY_CONN="sqlite:////nowhere/no-database",
        )

        def ready() -> bool:
            said = log.read_text()
            assert worker.poll() is None, f"the worker {name} ended:\n{said[-3000:]}"
            return f"{name} ready." in said

        wait_for(ready, f"the worker {name}", every=0.5)

    def succeed(self, run: str) -> None:
        """Wait for a run of distill to end; AssertionError with what its tasks said if it fails."""
        ended = partial(self.airflow.finished, "distill", run)
        state = wait_for(ended, "the end of the run", patience=3000)
        failed = [t for t in self.airflow.tasks("distill", run) if t["state"] == "failed"]
        said = [
            self.airflow.task_log("distill", run, t["task_id"], t["map_index"], t["try_number"])
            for t in failed
        ]
        assert state == "success", "\n".join(text[-3000:] for text in said)

    def all_answer(self) -> bool:
        """Whether every worker answers."""
        code = (
            "from airflow.providers.celery.executors.celery_executor import app\n"
            "import json; print(json.dumps([list(one)[0] for one in app.control.ping(timeout=5)]))"
        )
        done = subprocess.run(
            [ROOT / ".venv-airflow" / "bin" / "python", "-c", code],
            env={**os.environ, **self.airflow.settings},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return set(json.loads(done.stdout.splitlines()[-1])) == set(self.workers)


@contextlib.contextmanager
def cluster(hosts: list[Host], folder: Path, more: dict[str, str]) -> Iterator[Cluster]:
    """A cluster without workers. `more` are environment variables of the workers."""
    with contextlib.ExitStack() as running:
        database = running.enter_context(postgres())
        broker = running.enter_context(redis(folder))
        files = running.enter_context(store())
        port = free_port()
        settings = {
            "AIRFLOW__API__HOST": "0.0.0.0",
            "AIRFLOW__API__PORT": str(port),
            "AIRFLOW__CORE__EXECUTOR": "CeleryExecutor",
            "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"http://{HUB}:{port}/execution/",
            "AIRFLOW__API_AUTH__JWT_SECRET": secrets.token_hex(32),
            "AIRFLOW__CELERY__BROKER_URL": broker,
            "AIRFLOW__CELERY__RESULT_BACKEND": broker,
        }
        server = running.enter_context(airflow(folder, database, settings))
        yield Cluster(server, files, hosts, folder, {**settings, **files.environment, **more})
