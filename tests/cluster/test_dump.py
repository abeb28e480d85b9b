"""A dump over two hosts, of which one is cut off in mid-dump while its orphan goes on writing."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.airflow.servers import wait_for
from tests.cluster.hosts import Host
from tests.cluster.services import BUCKET, Cluster

pytestmark = pytest.mark.timeout(7200)

PARTITIONS = 4
DUMP = f"{BUCKET}/dump"


def in_mid_dump(cluster: Cluster, host: Host) -> list[int]:
    """The partition that this host dumps, once it has committed two shards; none before that."""
    words = {word for arguments in host.running().values() for word in arguments}
    found = [partition for partition in range(PARTITIONS) if option(partition) in words]
    second = f"{DUMP}/{{:05d}}/00001.json"
    return [at for at in found if cluster.store.request("GET", second.format(at)) is not None]


def option(partition: int) -> str:
    return f"--partition={partition}/{PARTITIONS}"


def dumps(cluster: Cluster, run: str) -> dict[int, dict[str, Any]]:
    """The dump tasks by partition."""
    tasks = cluster.airflow.tasks("distill", run)
    return {task["map_index"]: task for task in tasks if task["task_id"] == "dump"}


def test_a_host_that_is_cut_off_changes_nothing(
    airflow: Cluster,
    hosts: list[Host],
    world: Path,
    run_project: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """host1 takes all tasks, host2 only dumps: all it has is the model and a config."""
    home, other = hosts[0].home, hosts[1]
    for name in ("model", "dump.yaml"):
        for host in hosts:
            copy = shutil.copytree if (world / name).is_dir() else shutil.copy
            copy(world / name, host.files / name)
    for name in ("train.yaml", "evaluate.yaml", "domain.jsonl", "held-out.jsonl"):
        shutil.copy(world / name, hosts[0].files / name)
    airflow.store.put(world / "general.jsonl")
    run = airflow.airflow.trigger(
        "distill",
        {
            "folder": str(home),
            "model": "model",
            "dump": f"s3://{DUMP}",
            "corpus": f"s3://{BUCKET}/general.jsonl",
            "student": "student",
            "partitions": PARTITIONS,
            **{f"{name}_config": str(home / f"{name}.yaml") for name in ("train", "evaluate")},
            "dump_config": str(home / "dump.yaml"),
        },
    )
    [cut] = wait_for(lambda: in_mid_dump(airflow, other), "host2 to be in mid-dump", every=0.1)
    other.link("down")
    complete = airflow.store.request("GET", f"{DUMP}/{cut:05d}/complete.json")
    assert complete is None, "the partition was complete before the cut"

    def retried() -> bool:
        task = dumps(airflow, run)[cut]
        return task["try_number"] == 2 and bool(hosts[0].processes(option(cut)))

    wait_for(retried, "host1 to retry the partition", every=0.5)
    assert other.processes(option(cut)), "the orphan ended while its host was cut off"
    other.link("up")
    airflow.succeed(run)

    tries = {partition: task["try_number"] for partition, task in dumps(airflow, run).items()}
    assert tries == {partition: 1 + (partition == cut) for partition in range(PARTITIONS)}
    wait_for(lambda: not other.processes(option(cut)), "Airflow to end the orphan", every=0.5)
    wait_for(airflow.all_answer, "host2 to be back")
    for name, value in airflow.store.environment.items():
        monkeypatch.setenv(name, value)
    read = ("-m", "tests.airflow.world", "rows")
    expected = json.loads(run_project(*read, world / "reference"))
    assert json.loads(run_project(*read, f"s3://{DUMP}")) == expected
    assert (hosts[0].files / "student" / "evaluation.json").is_file()
    assert not (hosts[1].files / "student").exists()
