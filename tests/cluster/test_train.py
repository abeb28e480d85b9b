"""A student that two hosts train together, of which one loses its rank."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.airflow.conftest import ROOT
from tests.airflow.servers import wait_for
from tests.cluster.services import Cluster

pytestmark = pytest.mark.timeout(7200)

SCRIPT = ROOT / "scripts" / "train_student.py"
SETTINGS = {
    "fsdp": "true",
    "max_steps": "40",
    "save_strategy": "steps",
    "save_steps": "5",
    "logging_steps": "1",
    "learning_rate": "0.001",
}
UNTIMED = {"tokens_per_s", "wait_share"}


def steps(run: Path) -> list[dict[str, Any]]:
    """The logged steps, without timings."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{name: line[name] for name in line.keys() - UNTIMED} for line in lines]


def test_losses_go_on_after_a_rank_was_killed(
    airflow: Cluster, world: Path, run_project: Callable[..., str]
) -> None:
    """The hosts share the working folder, and each has one rank."""
    airflow.add_worker(airflow.hosts[1], "train")
    run = airflow.airflow.trigger(
        "distill",
        {
            "folder": str(world),
            "model": "model",
            "dump": "reference",
            "student": "together",
            "partitions": 1,
            "hosts": 2,
            "max_kl": None,
            "max_general_ratio": None,
            **{f"{name}_config": str(world / f"{name}.yaml") for name in ("dump", "train")},
            "evaluate_config": str(world / "evaluate.yaml"),
            "overrides": [f"train.training.{name}={value}" for name, value in SETTINGS.items()],
        },
    )
    student = world / "together"
    # Written last into a checkpoint.
    wait_for((student / "checkpoint-5" / "distill.json").exists, "a checkpoint", every=0.1)
    [rank] = airflow.hosts[1].processes(str(SCRIPT))
    os.kill(rank, signal.SIGKILL)
    assert not (student / "summary.json").exists(), "the training had ended before the kill"
    airflow.succeed(run)

    tasks = [t for t in airflow.airflow.tasks("distill", run) if t["task_id"] == "train"]
    assert {task["hostname"] for task in tasks} == {"host1", "host2"}
    assert [task["try_number"] for task in tasks] == [2, 2]
    logs = [log for host in airflow.hosts for log in host.files.rglob("attempt=2.log")]
    assert any("resuming from checkpoint-" in log.read_text() for log in logs)
    alone = [f"--training.{name}={value}" for name, value in SETTINGS.items()]
    run_project(
        *("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", SCRIPT),
        *("--config", world / "train.yaml", "--model", world / "model", *alone),
        *("--dump", world / "reference", "--domain.path", world / "domain.jsonl"),
        *("--output", world / "undisturbed"),
    )
    found, expected = steps(student), steps(world / "undisturbed")
    assert [line["step"] for line in found] == list(range(1, 41))
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=2e-4, abs=1e-6)
