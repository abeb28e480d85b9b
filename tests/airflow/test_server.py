"""A real scheduler and API server, with kill -9 in the middle of the dump."""

import contextlib
import os
import signal
import urllib.error
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.airflow.servers import Airflow, airflow, parent, postgres, processes, wait_for

pytestmark = pytest.mark.timeout(3600)


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Airflow]:
    home = tmp_path_factory.mktemp(f"airflow-{request.param}")
    with contextlib.ExitStack() as running:
        database = f"sqlite:///{home}/airflow.db"
        if request.param == "postgresql":
            database = running.enter_context(postgres())
        found = running.enter_context(airflow(home, database))
        slots = {"pool": "gpu", "slots": 2, "include_deferred": False}
        found.request("PATCH", "/api/v2/pools/gpu", slots)
        yield found


def kill(dump: Path, partition: int) -> bool:
    """Kill the writer of this partition once it has committed two shards; False before that.

    For partition 0 this is the script, for partition 1 the Airflow worker process that runs it.
    """
    shards = dump / f"{partition:05d}"
    if not (shards / "00001.json").exists():
        return False
    assert not (shards / "complete.json").exists(), "the partition was complete before the kill"
    [script] = processes(f"--partition={partition}/4", f"--output={dump.name}")
    os.kill(script if partition == 0 else parent(parent(script)), signal.SIGKILL)
    return True


def retrained(server: Airflow) -> list[dict[str, str]] | None:
    """The grid of a run of retrain, or None; ends that run, which only has to start."""
    for run in server.request("GET", "/api/v2/dags/retrain/dagRuns")["dag_runs"]:
        path = f"/api/v2/dags/retrain/dagRuns/{run['dag_run_id']}"
        with contextlib.suppress(urllib.error.HTTPError):  # grid has no result yet
            where = f"{path}/taskInstances/grid/xcomEntries/return_value?deserialize=true"
            found: list[dict[str, str]] = server.request("GET", where)["value"]
            server.request("PATCH", path, {"state": "failed"})
            return found
    return None


def test_params_out_of_range_are_refused(server: Airflow) -> None:
    for dag, conf in [("distill", {"partitions": 0}), ("retrain", {"alphas": [-1]})]:
        with pytest.raises(urllib.error.HTTPError) as caught:
            server.trigger(dag, conf)
        assert caught.value.code in (400, 422)


def test_kills_in_mid_dump_change_nothing(
    server: Airflow,
    world: Path,
    params: dict[str, object],
    rows: Callable[[Path], dict[str, str]],
    reference: dict[str, str],
) -> None:
    """The script of partition 0 and the worker process of partition 1 are killed."""
    dump = world / server.home.name
    server.request("PATCH", "/api/v2/dags/retrain", {"is_paused": False})
    run = server.trigger(
        "distill",
        {**params, "dump": dump.name, "student": f"{dump.name}-student", "partitions": 4},
    )
    alive = [0, 1]  # both run at the same time: the pool has two slots

    def kill_them() -> bool:
        alive[:] = [partition for partition in alive if not kill(dump, partition)]
        return not alive

    wait_for(kill_them, "partitions 0 and 1 to be in mid-dump", every=0.05)
    grid = wait_for(lambda: retrained(server), "the new dump to start retrain")
    assert wait_for(lambda: server.finished("distill", run), "the run to end") == "success"

    tasks = server.tasks("distill", run)
    dumped = sorted(
        (task for task in tasks if task["task_id"] == "dump"), key=lambda t: t["map_index"]
    )
    assert [task["rendered_map_index"] for task in dumped] == [
        f"partition {index}/4" for index in range(4)
    ]
    assert [task["try_number"] for task in dumped] == [2, 2, 1, 1]
    assert {task["state"] for task in tasks} == {"success"}
    first = server.task_log("distill", run, "dump", 0, attempt=1)
    assert "killed by signal 9" in first
    assert "resuming after" in server.task_log("distill", run, "dump", 0, attempt=2)
    assert rows(dump) == reference

    # retrain got the folders of the new dump, and the assets got the summaries.
    assert len(grid) == 6
    folder = f"airflow/students/{dump.name}/"
    assert all(point["student"].startswith(folder) for point in grid)
    events = server.request("GET", "/api/v2/assets/events")["asset_events"]
    extra = {event["source_task_id"]: event["extra"] for event in events}
    assert {"rows", "tokens", "bytes_per_token", "settings"} <= set(extra["verify"])
    assert {"student", "steps"} <= set(extra["evaluate"])
