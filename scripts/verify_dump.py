"""Read a whole dump and check every byte; with --against, also recompute rows with transformers.

    python scripts/verify_dump.py runs/dump
    python scripts/verify_dump.py s3://bucket/dump --against Qwen/Qwen3-8B-Base --sample 20

Exit codes: 0 good, 1 the store does not answer, 2 no dump, an unfinished dump or a model with
another vocabulary, 4 damage or a KL above --bound.
"""

import argparse
import sys

from pipeline.agreement import BOUND
from pipeline.config import MOST
from pipeline.ranges import Range, within
from storage.__main__ import main as storage_main


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dump", help="directory of the dump, local or s3://…")
    parser.add_argument(
        "--against", metavar="MODEL", help="recompute rows with this model, which made the dump"
    )
    parser.add_argument(
        "--sample", type=within(Range(1, MOST)), default=10, help="rows to recompute (default: 10)"
    )
    parser.add_argument(
        "--seed",
        type=within(Range(0, 1 << 63)),
        default=0,
        help="seed of the choice of rows (default: 0)",
    )
    parser.add_argument(
        "--bound",
        type=within(Range(above=0.0)),
        default=BOUND,
        help=f"largest mean KL of a row, in nats (default: {BOUND})",
    )
    given = parser.parse_args()
    code = storage_main(["verify", "--", given.dump])
    if code or not given.against:
        return code
    from pipeline import cli
    from pipeline.dump import recompute
    from pipeline.errors import DAMAGED
    from pipeline.foreign import printable

    good = [False]

    def compare() -> dict[str, object]:
        checks = recompute.recompute(given.dump, given.against, given.sample, given.seed)
        lines, good[0] = recompute.report(checks, given.bound)
        print(printable("\n".join(lines)))
        return {}

    return cli.main(compare, None) or (0 if good[0] else DAMAGED)


if __name__ == "__main__":
    sys.exit(main())
