"""Where the hosts of one training meet: the task of host 0 says it to the others through XCom."""

import socket
import time

from airflow.sdk import get_current_context
from airflow.sdk.exceptions import AirflowException

KEY = "endpoint"
PATIENCE = 1800  # seconds for which a host waits for host 0


def meet(host: int) -> str:
    """NAME:PORT where the hosts of this mapped task meet.

    Host 0 chooses a free port of its own. A retry of it chooses another one, so the others wait
    until what they read answers. Raises AirflowException if host 0 does not listen in time.
    """
    ti = get_current_context()["ti"]
    if host == 0:
        endpoint = f"{socket.gethostname()}:{free_port()}"
        ti.xcom_push(KEY, endpoint)
        return endpoint
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        endpoint = ti.xcom_pull(task_ids=ti.task_id, map_indexes=0, key=KEY)
        if endpoint and answers(endpoint):
            return endpoint
        print(f"waiting for host 0{f' at {endpoint}' if endpoint else ''}", flush=True)
        time.sleep(5)
    raise AirflowException(
        f"host 0 did not listen within {PATIENCE} s. Are there as many slots of the pool `gpu`, "
        "and as many workers, as the training has hosts?"
    )


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("", 0))
        return int(found.getsockname()[1])


def answers(endpoint: str) -> bool:
    """Whether something listens at NAME:PORT."""
    name, _, port = endpoint.rpartition(":")
    try:
        socket.create_connection((name, int(port)), 5).close()
    except OSError:
        return False
    return True
