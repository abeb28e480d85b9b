"""These tests run in Airflow's environment and a network of their own (make test-cluster)."""

import os
from collections.abc import Iterator

import pytest

from tests.airflow.conftest import (  # noqa: F401  fixtures, and the environment of Airflow
    no_leftovers,
    pytest_unconfigure,
    run_project,
    world,
)
from tests.cluster.hosts import Host, alone, network
from tests.cluster.services import Cluster, cluster

# An orphan never gives up. Else Airflow ends it after three heartbeats that fail, or the store's
# patience is at an end.
STUBBORN = {"AIRFLOW__WORKERS__MAX_FAILED_HEARTBEATS": "1000000", "MOL_STORE_PATIENCE": "3600"}
PATIENT = {"AIRFLOW__WORKERS__EXECUTION_API_TIMEOUT": "20"}  # a slow machine is not a failure


@pytest.fixture(scope="session")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Host]]:
    """Two hosts. Skips the test where it has no network of its own; in CI it then fails."""
    if not alone():
        reason = "needs a network of its own: run `make test-cluster` as root on Linux"
        assert not os.environ.get("CI"), reason
        pytest.skip(reason)
    with network(tmp_path_factory.mktemp("cluster"), 2) as found:
        yield found


@pytest.fixture(scope="session")
def airflow(hosts: list[Host], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster with a worker for all tasks on host1, and one that only dumps on host2."""
    with cluster(hosts, tmp_path_factory.mktemp("airflow"), STUBBORN | PATIENT) as found:
        found.add_worker(hosts[0], "gpu,train,default")
        found.add_worker(hosts[1], "gpu")
        slots = {"pool": "gpu", "slots": 2, "include_deferred": False}
        found.airflow.request("PATCH", "/api/v2/pools/gpu", slots)
        yield found
