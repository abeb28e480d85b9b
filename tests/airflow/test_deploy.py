"""The deployment files without a cluster: Airflow's own pod builder makes the pods, the Kubernetes
API's types know all fields, and the files agree on names and paths."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from airflow.dag_processing.dagbag import DagBag
from kubernetes import client

from tests.airflow.conftest import DAGS, ROOT

DEPLOY = ROOT / "deploy"


@pytest.fixture(scope="module")
def tasks() -> list[Any]:
    return [task for dag in DagBag(DAGS).dags.values() for task in dag.tasks]


def build_pod(task: Any) -> client.V1Pod:
    """Build a pod as KubernetesExecutor does: the task's template, then Airflow's own fields."""
    from airflow.providers.cncf.kubernetes.executors.kubernetes_executor_utils import (
        get_base_pod_from_template,
    )
    from airflow.providers.cncf.kubernetes.pod_generator import PodGenerator

    config = task.executor_config
    base = get_base_pod_from_template(config["pod_template_file"], None)
    return PodGenerator.construct_pod(
        scheduler_job_id="1",
        pod_id="pod",
        namespace="airflow",
        dag_id=task.dag_id,
        task_id=task.task_id,
        kube_image=base.spec.containers[0].image,
        try_number=1,
        map_index=0,
        date=None,
        run_id="manual",
        args=["airflow"],
        pod_override_object=PodGenerator.from_obj(config),
        base_worker_pod=base,
        with_mutation_hook=False,
    )


def test_the_executor_builds_a_pod_for_every_task(tasks: list[Any]) -> None:
    for task in tasks:
        pod = build_pod(task)
        [container] = pod.spec.containers
        assert container.name == "base"
        assert container.image == "mol-distill:latest"
        gpus = (container.resources.limits or {}).get("nvidia.com/gpu", "0")
        assert gpus == ("1" if task.pool == "gpu" else "0"), task.task_id
        claims = [volume.persistent_volume_claim for volume in pod.spec.volumes]
        assert "mol-distill" in [claim.claim_name for claim in claims if claim]


@pytest.mark.parametrize("name", ["gpu", "cpu"])
def test_no_field_of_a_pod_is_unknown(name: str) -> None:
    """The pod builder drops unknown fields, such as misspelt ones, without an error."""
    written = yaml.safe_load((DEPLOY / "kubernetes" / f"{name}.yaml").read_text())
    api = client.ApiClient()
    pod = api._ApiClient__deserialize(written, "V1Pod")  # type: ignore[attr-defined]
    assert api.sanitize_for_serialization(pod) == written


def test_compose() -> None:
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    services = compose["services"]
    assert set(services) == {"postgres", "migrate", "api-server", "dag-processor", "scheduler"}
    for name, service in services.items():
        assert set(service.get("depends_on", {})) <= set(services), name
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert source in compose["volumes"] or source.startswith("${WORK"), volume
    for service in services.values():  # reachable only from this machine
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    example = (DEPLOY / "compose.env.example").read_text()
    asked = set(re.findall(r"(?<!\$)\$\{(\w+)", (DEPLOY / "compose.yaml").read_text()))
    assert asked == set(re.findall(r"^(\w+)=", example, re.MULTILINE))


def test_versions_agree() -> None:
    lock = (ROOT / "requirements" / "airflow.lock").read_text()
    version = re.search(r"^apache-airflow==(.*)$", lock, re.MULTILINE)
    assert version is not None
    image = re.search(r"^FROM apache/airflow:([\d.]+)-", (DEPLOY / "Dockerfile").read_text(), re.M)
    assert image is not None
    values = yaml.safe_load((DEPLOY / "kubernetes" / "values.yaml").read_text())
    assert image[1] == values["airflowVersion"] == version[1]
    assert "://" not in lock


def test_paths_agree() -> None:
    """The pods and values.yaml name the interpreter and the DAGs folder of the image."""
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    for file in [Path("kubernetes/gpu.yaml"), Path("kubernetes/cpu.yaml")]:
        pod = yaml.safe_load((DEPLOY / file).read_text())
        env = {item["name"]: item["value"] for item in pod["spec"]["containers"][0]["env"]}
        name = "AIRFLOW_VAR_MOL_DISTILL_PYTHON"
        assert f"{name}={env[name]}" in dockerfile
    values = yaml.safe_load((DEPLOY / "kubernetes" / "values.yaml").read_text())
    env = {item["name"]: item["value"] for item in values["env"]}
    folder = env["AIRFLOW__CORE__DAGS_FOLDER"]
    assert f"AIRFLOW__CORE__DAGS_FOLDER={folder}" in dockerfile
    assert (ROOT / Path(folder).relative_to("/opt/mol-distill") / "distill.py").is_file()


def test_the_filled_in_env_file_stays_here() -> None:
    """Neither committed nor copied into the image: it holds the keys."""
    assert ".env" in (ROOT / ".gitignore").read_text().splitlines()
    assert "**/.env" in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
