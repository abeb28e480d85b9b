"""The demo: the whole job on this machine, offline, in minutes.

    python scripts/quickstart.py --output runs/demo

Trains a small base model on Python's own documentation, dumps it with vLLM, trains two students on
Python code (cross-entropy only, and MoL), and compares the three on held-out documents. Writes
results.json and perplexities.png. Run it again: what is finished is kept.
"""

import argparse
import sys

from pipeline import cli, demo


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", default="runs/demo", help="directory (default: %(default)s)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="STAGE.OPTION=VALUE",
        help="change a setting of base, dump, ce, mol or evaluate, e.g. dump.engine=transformers",
    )
    given = parser.parse_args()
    overrides: dict[str, list[str]] = {}
    for setting in given.set:
        stage, _, option = setting.partition(".")
        if stage not in ("base", "dump", "ce", "mol", "evaluate") or "=" not in option:
            parser.error(f"--set: STAGE.OPTION=VALUE expected, found {setting!r}")
        overrides.setdefault(stage, []).append(f"--{option}")
    return cli.main(lambda: demo.run(given.output, overrides), None)


if __name__ == "__main__":
    sys.exit(main())
