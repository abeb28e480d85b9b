"""Where the hosts of a training meet, and how each is started; no scheduler, and no network."""

import contextlib
import socket
from collections.abc import Iterator
from typing import Any

import distill
import distill_hosts
import pytest
from airflow.sdk.exceptions import AirflowException


class Task:
    """Stands for a mapped task, with the XCom that host 0 pushed."""

    task_id = "train"

    def __init__(self, endpoints: Iterator[str | None]) -> None:
        self.endpoints, self.pushed = endpoints, {}

    def xcom_push(self, key: str, value: str) -> None:
        self.pushed[key] = value

    def xcom_pull(self, *, task_ids: str, map_indexes: int, key: str) -> str | None:
        assert (task_ids, map_indexes, key) == ("train", 0, "endpoint")
        return next(self.endpoints)


@pytest.fixture
def running(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that makes this process the task; nothing waits."""

    def become(*endpoints: str | None) -> Task:
        task = Task(iter(endpoints))
        monkeypatch.setattr(distill_hosts, "get_current_context", lambda: {"ti": task})
        return task

    monkeypatch.setattr("time.sleep", lambda seconds: None)
    return become


@contextlib.contextmanager
def listening() -> Iterator[str]:
    with socket.create_server(("localhost", 0)) as server:
        yield f"localhost:{server.getsockname()[1]}"


def test_host_0_says_where_it_listens(running: Any) -> None:
    task = running()
    endpoint = distill_hosts.meet(0)
    assert task.pushed == {"endpoint": endpoint}
    name, _, port = endpoint.rpartition(":")
    assert name == socket.gethostname()
    with socket.create_server(("", int(port))):  # nobody else has it
        pass


def test_others_wait_until_host_0_answers(running: Any) -> None:
    """The first try of host 0 left an endpoint where nobody listens any more."""
    with listening() as old:
        pass
    with listening() as new:
        running(None, old, new)
        assert distill_hosts.meet(1) == new


def test_a_host_0_that_never_listens_is_retried(
    running: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distill_hosts, "PATIENCE", -1)
    running(None)
    with pytest.raises(AirflowException, match="slots of the pool `gpu`"):
        distill_hosts.meet(1)


def test_each_host_starts_its_ranks(running: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    params = {"train_config": "t.yaml", "model": "m", "dump": "d", "domain": None, "folder": "/"}
    monkeypatch.setattr(distill, "settings", lambda: {**params, "overrides": None})
    monkeypatch.setattr(distill, "start", lambda *given, **named: started.append((given, named)))
    monkeypatch.setattr(distill, "scalars", lambda found: {})
    monkeypatch.setattr(distill, "meet", lambda host: "node0:4000")
    distill.train_script("student", None, None)
    distill.train_script("student", None, None, host=1, hosts=2)
    (one, alone), (two, together) = started
    script, *words = one[0]
    assert script.endswith("scripts/train_student.py")
    assert two[0][0].endswith("scripts/train_hosts.py")
    assert two[0][1:] == ["--hosts=2", "--host=1", "--endpoint=node0:4000", "--", *words]
    # Two hosts of one run may be on one machine, so a lock keeps out only another try of each.
    assert (alone["alone"], together["alone"]) == ("student", "student/host-1")
