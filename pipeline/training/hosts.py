"""Training over several hosts: start this host's ranks together with the others'.

torch's elastic agent does the work, as under `torchrun`; this adds the exit codes of the scripts,
so that a scheduler knows what to retry, and the ranks die with the agent.
"""

import sys
from dataclasses import dataclass

import torch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from pipeline.errors import (
    BAD_INPUT,
    DAMAGED,
    INTERRUPTED,
    REFUSED,
    ConfigError,
    FailedError,
    Interrupted,
    RefusedError,
)
from pipeline.progress import say
from pipeline.script_files import script
from pipeline.types import Json
from storage import StorageError

KINDS: dict[int, type[Exception]] = {
    BAD_INPUT: ConfigError,
    REFUSED: RefusedError,
    DAMAGED: StorageError,
    INTERRUPTED: Interrupted,
}
PATIENCE = 1800
"""Seconds for which a host waits for the others."""


@dataclass
class Meeting:
    """Which host this is, and where all of them meet."""

    hosts: int
    """How many hosts train together."""
    host: int
    """The number of this host, from 0. Host 0 listens at `endpoint`."""
    endpoint: str
    """NAME:PORT of host 0. The port must be free there, and the others must reach it."""

    def __post_init__(self) -> None:
        name, _, port = self.endpoint.rpartition(":")
        if not (name and port.isdecimal() and 0 < int(port) < 65536):
            raise ConfigError(
                f"--endpoint {self.endpoint}: expected HOST:PORT, such as node0:29500"
            )
        if not 0 <= self.host < self.hosts:
            raise ConfigError(f"--host {self.host}: there are {self.hosts}, numbered from 0")


def run(meeting: Meeting, arguments: list[str]) -> Json:
    """Run scripts/train_student.py with the arguments, a rank for each GPU; without any, one rank.

    Raises FailedError where the hosts do not meet, Interrupted after a signal, once the ranks have
    stopped, and otherwise what stands for the exit codes of the ranks.
    """
    ranks = max(torch.accelerator.device_count(), 1)
    say(f"host {meeting.host} of {meeting.hosts}, ranks {ranks}: meeting at {meeting.endpoint}")
    config = LaunchConfig(
        min_nodes=meeting.hosts,
        max_nodes=meeting.hosts,
        nproc_per_node=ranks,
        run_id="train",
        rdzv_backend="c10d",
        rdzv_endpoint=meeting.endpoint,
        rdzv_configs={"is_host": meeting.host == 0, "join_timeout": PATIENCE},
        max_restarts=0,  # the scheduler retries, on all hosts
    )
    # The agent gives each rank a session of its own, in which it would outlive the agent.
    command = ["setpriv", "--pdeathsig", "KILL", "--", sys.executable]
    try:
        elastic_launch(config, command[0])(
            *command[1:], str(script("train_student.py")), *arguments
        )
    except ChildFailedError as error:
        raise verdict({rank: found.exitcode for rank, found in error.failures.items()}) from None
    except SignalException as error:
        raise Interrupted(f"stopped by {error.sigval.name}") from None
    except RendezvousError as error:
        raise FailedError(f"{meeting.endpoint}: the hosts did not meet there ({error})") from error
    return {}


def verdict(codes: dict[int, int]) -> Exception:
    """What stands for the exit codes of ranks, below 0 the signals that killed them.

    A rank that another one has left fails, too. So what a rank says of its input counts first, then
    an interruption.
    """
    said = "; ".join(
        f"rank {rank} was killed by signal {-code}"
        if code < 0
        else f"rank {rank} ended with {code}"
        for rank, code in sorted(codes.items())
    )
    for code, kind in KINDS.items():
        if code in codes.values():
            return kind(f"{said} (its message is above)")
    return FailedError(said)
