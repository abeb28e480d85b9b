"""The demo: the whole pipeline on this machine, offline, in minutes.

    python scripts/quickstart.py --output runs/demo
    python scripts/quickstart.py --output runs/short --set dump.engine=transformers \\
        --set mol.loss.alpha=2 --set mol.training.max_steps=50

Trains a small base model on Python's own documentation, dumps it with vLLM, trains two students on
Python code (cross-entropy only, and MoL), and compares the three on held-out documents. Writes
results.json and perplexities.png. After an interruption, run the same command again to resume:
finished stages are kept.

Exit codes: 0 done, 1, 2, 3 or 75 as the stage that failed (its message is above), 3 refused (the
directory holds a demo with other settings).
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
        help="change a setting of a stage (base, dump, ce, mol or evaluate); may be repeated",
    )
    given = parser.parse_args()
    overrides: dict[str, list[str]] = {}
    for setting in given.set:
        stage, _, option = setting.partition(".")
        if stage not in ("base", "dump", "ce", "mol", "evaluate") or "=" not in option:
            parser.error(f"--set: expected STAGE.OPTION=VALUE, found {setting!r}")
        overrides.setdefault(stage, []).append(f"--{option}")
    return cli.main(lambda: demo.run(given.output, overrides), None)


if __name__ == "__main__":
    sys.exit(main())
