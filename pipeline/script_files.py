"""Where the project's scripts are, when one of them starts another."""

import sys
from pathlib import Path

from pipeline.errors import ConfigError


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
