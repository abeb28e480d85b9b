"""Write a page about a dump, a training run or a study, as one self-contained HTML file.

    python scripts/report.py runs/demo/dump --output dump.html
    python scripts/report.py runs/study --output study.html

Exit codes: 0 done, 2 the directory holds no dump, run or study, 4 damaged dump.
"""

import argparse
import sys

from pipeline import cli


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", help="directory of a dump, a training run or a study")
    parser.add_argument(
        "--output", default="report.html", help="HTML file to write (default: %(default)s)"
    )
    given = parser.parse_args()
    from pipeline.report import report

    return cli.main(lambda: report.run(given.path, given.output), None)


if __name__ == "__main__":
    sys.exit(main())
