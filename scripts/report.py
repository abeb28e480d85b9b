"""Write a self-contained HTML page about a dump, a training run, an evaluation or a study.

    python scripts/report.py runs/demo/dump --output dump.html
    python scripts/report.py runs/study --output study.html
    python scripts/report.py results.json --output evaluation.html

Exit codes: 0 done, 2 the path holds none of these, 4 damaged dump.
"""

import argparse
import sys

from pipeline import cli
from pipeline.foreign import refuse_secrets


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "path", help="directory of a dump, a training run or a study, or results of an evaluation"
    )
    parser.add_argument(
        "--output", default="report.html", help="HTML file to write (default: %(default)s)"
    )
    given = parser.parse_args()
    from pipeline.report import report

    def work() -> dict[str, object]:
        refuse_secrets(vars(given))
        return report.run(given.path, given.output)

    return cli.main(work, None)


if __name__ == "__main__":
    sys.exit(main())
