"""Where the project's scripts are, when one of them starts another."""

import subprocess
import sys
from pathlib import Path

from pipeline.errors import (
    FAILED,
    INTERRUPTED,
    REFUSED,
    ConfigError,
    FailedError,
    Interrupted,
    RefusedError,
)


def script(name: str) -> Path:
    """The script, or a file beside the scripts such as configs/demo.

    It is beside the script that runs, or in the checkout that this package belongs to: an
    installed wheel holds the packages alone. Raises ConfigError where it is in neither place.
    """
    folders = [Path(sys.argv[0]).resolve().parent, Path(__file__).resolve().parents[1] / "scripts"]
    for folder in folders:
        if (folder / name).exists():
            return folder / name
    raise ConfigError(
        f"{name}: neither in {folders[0]} nor in {folders[1]}. Start the script from a checkout's "
        "scripts/, whose files need each other"
    )


def run_script(name: str, *arguments: str, folder: Path | None = None) -> None:
    """Run a script in its own process, in `folder`; its errors are on its own stderr.

    Raises what stands for its exit code: Interrupted, FailedError, RefusedError or ConfigError.
    """
    code = subprocess.run([sys.executable, str(script(name)), *arguments], cwd=folder).returncode
    if code:
        kinds = {INTERRUPTED: Interrupted, FAILED: FailedError, REFUSED: RefusedError}
        kind = kinds.get(code, ConfigError)
        raise kind(f"{name} ended with exit code {code}; see its message above")
