"""Compare ways to train on your own model: what each gains on the domain and loses elsewhere.

    python scripts/study.py --config scripts/configs/study.yaml
    python scripts/study.py --config scripts/configs/study.yaml --only '[ce, mol]' --seeds '[0]'
    python scripts/study.py --config scripts/configs/study.yaml \\
        --held_out.sequences 100 --training.max_steps 50

One config describes arms × learning rates × seeds. Makes the missing dumps, trains and measures the
missing runs one after the other, and writes results.json and table.md. After an interruption, run
the same command again to resume.

Exit codes: 0 done, 1 failed (run it again), 2 bad input, 3 refused (a run's directory holds other
settings), 4 damaged dump, 75 interrupted.
"""

import sys

from pipeline import cli
from pipeline.study.config import StudyConfig


def main() -> int:
    config, own = cli.parse(cli.script_parser(StudyConfig, __doc__ or ""), StudyConfig)
    # Imported after the settings are checked, because torch takes seconds to load.
    from pipeline.study import study

    return cli.main(lambda: study.run(config), own.summary)


if __name__ == "__main__":
    sys.exit(main())
