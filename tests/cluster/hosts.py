"""Hosts on a network of their own: namespaces of Linux, joined by a bridge.

`make test-cluster` starts pytest in network, mount and process namespaces of their own. There the
test is the third host, which the others see as `hub`. Everything ends with pytest: the kernel kills
what is left in its process namespace, and then the networks have no user.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.airflow.servers import wait_for

HUB = "10.77.0.1"
NAMESPACES = ["--net", "--uts", "--mount"]


def run(*command: str | Path) -> None:
    """Run a command; AssertionError with its message if it fails."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, f"{command} ended with {done.returncode}: {done.stderr}"


def alone() -> bool:
    """Whether this process has a network of its own, as `make test-cluster` makes it.

    Nothing is up there yet.
    """
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    return subprocess.check_output(["ip", "link", "show", "up"]) == b""


class Host:
    """A host with a network address, a name, and `files` of its own.

    It sees them as `home`, and no other host's.
    """

    def __init__(self, number: int, home: Path, names: Path) -> None:
        self.name, self.address = f"host{number}", f"10.77.0.{number + 1}"
        self.home, self.files = home, home.parent / "files" / self.name
        (self.files / "tmp").mkdir(parents=True)
        script = (
            f"mount --bind {self.files} {home} && mount -t tmpfs none {self.files.parent}"
            f" && mount --bind {names} /etc/hosts && hostname {self.name} && ip link set lo up"
            " && echo ready && exec sleep infinity"
        )
        self.holder = subprocess.Popen(
            ["unshare", *NAMESPACES, "sh", "-ec", script], stdout=subprocess.PIPE, text=True
        )
        assert self.holder.stdout is not None
        assert self.holder.stdout.readline() == "ready\n", f"{self.name} does not start"
        pid = str(self.holder.pid)
        run("ip", "link", "add", self.name, "type", "veth", "peer", "eth0", "netns", pid)
        run("ip", "link", "set", self.name, "master", "hub", "up")
        run(*self.inside("ip", "address", "add", f"{self.address}/24", "dev", "eth0"))
        run(*self.inside("ip", "link", "set", "eth0", "up"))
        self.network = os.readlink(f"/proc/{pid}/ns/net")

    def inside(self, *command: str | Path) -> list[str]:
        """The command that runs another one on this host, in `home`."""
        enter = ["nsenter", "--target", str(self.holder.pid), *NAMESPACES, f"--wd={self.home}"]
        return [*enter, "--", *map(str, command)]

    def start(self, log: Path, *command: str | Path, **env: str) -> "subprocess.Popen[bytes]":
        """Start a program on this host, which writes to `log`."""
        own = {"HOME": str(self.home), "TMPDIR": str(self.home / "tmp")}
        with log.open("w") as file:
            return subprocess.Popen(
                self.inside(*command),
                env={**os.environ, **own, **env},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def link(self, state: str) -> None:
        """`down` cuts the host off: its packets and those to it are lost. `up` brings it back."""
        run("ip", "link", "set", self.name, state)

    def running(self) -> dict[int, list[str]]:
        """The arguments of this host's processes."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended
                if os.readlink(folder / "ns" / "net") == self.network:
                    text = (folder / "cmdline").read_bytes().decode(errors="replace")
                    found[int(folder.name)] = text.split("\0")
        return found

    def processes(self, word: str) -> list[int]:
        """Ids of this host's processes with this argument."""
        return [pid for pid, arguments in self.running().items() if word in arguments]

    def stop(self) -> None:
        """Kill every process of this host."""

        def killed() -> bool:
            left = self.running()
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.holder.poll()
            return not left

        wait_for(killed, f"the processes of {self.name} to end", every=0.1)
        self.holder.wait()
        assert self.holder.stdout is not None
        self.holder.stdout.close()


@contextlib.contextmanager
def network(folder: Path, count: int) -> Iterator[list[Host]]:
    """`count` hosts that see `folder/home`, each with files of its own there."""
    home, names = folder / "home", folder / "hosts"
    home.mkdir(parents=True)
    known = {"localhost": "127.0.0.1", "hub": HUB, socket.gethostname(): HUB}
    known |= {f"host{number}": f"10.77.0.{number + 1}" for number in range(1, count + 1)}
    names.write_text("".join(f"{address} {name}\n" for name, address in known.items()))
    run("mount", "--bind", names, "/etc/hosts")
    run("ip", "link", "set", "lo", "up")
    run("ip", "link", "add", "hub", "type", "bridge")
    run("ip", "address", "add", f"{HUB}/24", "dev", "hub")
    run("ip", "link", "set", "hub", "up")
    hosts: list[Host] = []
    try:
        for number in range(1, count + 1):
            hosts.append(Host(number, home, names))
        yield hosts
    finally:
        for host in hosts:
            host.stop()
        run("ip", "link", "delete", "hub")
        run("umount", "/etc/hosts")
