"""Make a virtual environment match a lock file exactly; repair it when it does not.

    python3 scripts/setup_venv.py .venv requirements/cpu.lock --editable

The lock names every package with its version, so pip runs with --no-deps: nothing that the lock
leaves out (torchvision, CUDA) can come in through a dependency. pip's own configuration (index,
find-links, proxies) is the user's and is left alone. Runs in a fraction of a second when there is
nothing to do, so `make` calls it every time. Standard library only.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Run by the environment's own interpreter. A package counts as installed when every file that its
# RECORD lists outside bytecode is there; that catches an install that was killed half way.
PROBE = """
import importlib.metadata as md, json, os, re, sys
found = {}
for dist in md.distributions():
    name = re.sub(r"[-_.]+", "-", dist.metadata["Name"] or "").lower()
    if name in found:  # two versions of one package: neither can be trusted
        found[name] = "twice"
        continue
    files = [f for f in dist.files or [] if f.suffix != ".pyc"]
    whole = files and all(os.path.exists(dist.locate_file(f)) for f in files)
    found[name] = dist.version if whole else "incomplete"
json.dump({"python": sys.version_info[:2], "packages": found}, sys.stdout)
"""


def normalise(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def read_lock(path: Path) -> dict[str, str]:
    """Return {package: version}; markers and comments are not used in our locks."""
    pins = {}
    for line in path.read_text().splitlines():
        line = line.split("#")[0].strip()
        if line and not line.startswith("-"):
            name, _, version = line.partition("==")
            pins[normalise(name)] = version
    return pins


def probe(venv: Path) -> dict | None:
    """What the environment holds, or None where it cannot even start Python and pip."""
    python = venv / "bin" / "python"
    try:
        subprocess.run([python, "-m", "pip", "--version"], check=True, capture_output=True)
        found = subprocess.run([python, "-c", PROBE], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return json.loads(found.stdout)


def missing(found: dict, pins: dict[str, str]) -> list[str]:
    return [name for name, version in pins.items() if found["packages"].get(name) != version]


def stamp(lock: Path) -> str:
    """What a finished environment was made from; the project itself counts through pyproject."""
    return lock.read_text() + (ROOT / "pyproject.toml").read_text()


def install(python: Path, *arguments: str) -> None:
    command = [str(python), "-m", "pip", "install", "--no-deps", *arguments]
    if subprocess.run(command).returncode:
        sys.exit(
            "setup_venv: pip failed (its message is above). Once that is mended, run the same "
            "command again: it goes on from here."
        )


def check_torch(python: Path, pin: str) -> None:
    """Fail early, before gigabytes are downloaded, where pip is offered no such build of torch."""
    arguments = ["install", "--quiet", "--dry-run", "--ignore-installed", "--no-deps"]
    command = [str(python), "-m", "pip", *arguments, f"torch=={pin}"]
    if subprocess.run(command).returncode:
        sys.exit(
            f"setup_venv: pip finds no torch=={pin} (its message is above). PyTorch's CPU build is "
            "not on the default index: name an index or a folder that has it in pip's own "
            "configuration (PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS; PyTorch's install page names "
            "its index), or use `make ENGINE=gpu` on a machine with an NVIDIA GPU."
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("venv", type=Path)
    parser.add_argument("lock", type=Path)
    parser.add_argument("--editable", action="store_true", help="install this project as well")
    args = parser.parse_args()
    if sys.version_info < (3, 11):  # noqa: UP036 - run by whatever python3 the user has
        sys.exit(f"setup_venv: Python 3.11 or newer is needed, this is {sys.version.split()[0]}")

    ready = args.venv / ".ready"
    python = args.venv / "bin" / "python"
    pins = read_lock(args.lock)
    found = probe(args.venv)
    if found and ready.exists() and ready.read_text() == stamp(args.lock):
        if not missing(found, pins):
            return
        print(f"setup_venv: {args.venv} lacks {', '.join(missing(found, pins))}: repairing it")
    ready.unlink(missing_ok=True)
    if found is None:
        print(f"setup_venv: making {args.venv}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(args.venv)], check=True)
        found = probe(args.venv) or {"packages": {}}
    if missing(found, pins):
        if "torch" in missing(found, pins):
            check_torch(python, pins["torch"])
        print(f"setup_venv: installing {len(pins)} packages from {args.lock}", flush=True)
        broken = [name for name in missing(found, pins) if name in found["packages"]]
        if broken:  # pip takes a package whose files are gone for installed
            pinned = [f"{name}=={pins[name]}" for name in broken]
            install(python, "--quiet", "--force-reinstall", *pinned)
        install(python, "--quiet", "--requirement", str(args.lock))
    if args.editable:
        install(python, "--quiet", "--editable", str(ROOT))
    left = missing(probe(args.venv) or {"packages": {}}, pins)
    if left:
        sys.exit(f"setup_venv: {args.venv} still lacks {', '.join(left)}; remove it and try again")
    ready.write_text(stamp(args.lock))
    print(f"setup_venv: {args.venv} is ready")


if __name__ == "__main__":
    os.environ.setdefault("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    main()
