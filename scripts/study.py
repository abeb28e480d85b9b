"""A study: what do other ways to train gain on the domain and lose elsewhere, on your own model?

    python scripts/study.py --config scripts/configs/study.yaml
    python scripts/study.py --config scripts/configs/study.yaml --only '[ce, mol]' --seeds '[0]'

One config describes arms × learning rates × seeds. Makes the dumps, trains and measures what is
missing, one run after the other, and writes results.json and table.md. Interrupt it, run the same
command again: it goes on. Exit codes: 0 done, 2 bad input, 3 refused (a run's directory holds other
settings), 4 damaged dump, 75 interrupted.
"""

import sys

from pipeline import cli
from pipeline.study.config import StudyConfig


def main() -> int:
    config, own = cli.parse(cli.script_parser(StudyConfig, __doc__ or ""), StudyConfig)
    from pipeline.study import study  # after the settings are known to be good: torch takes seconds

    return cli.main(lambda: study.run(config), own.summary)


if __name__ == "__main__":
    sys.exit(main())
