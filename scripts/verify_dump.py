"""Read a whole dump and check every byte; with --against, also recompute rows with transformers.

    python scripts/verify_dump.py runs/dump
    python scripts/verify_dump.py s3://bucket/dump --against Qwen/Qwen3-8B-Base --sample 20

For the model there are three answers: the same, computed differently by the two engines, another
model. Exit codes: 0 good, 1 the store does not answer, 2 no dump or an unfinished one, 3 computed
differently (0 with --accept-different) or another tokenizer, 4 damage or another model.
"""

import argparse
import sys

from pipeline.config import MOST
from pipeline.ranges import Range, within
from storage.__main__ import main as storage_main


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dump", help="directory of the dump, local or s3://…")
    parser.add_argument(
        "--jobs",
        type=within(Range(1, MOST)),
        help="processes that read shards at the same time (default: one for each core)",
    )
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
        help="largest mean KL of the same model, in nats (default: from the dump's grid and dtype)",
    )
    parser.add_argument(
        "--accept-different",
        action="store_true",
        help="exit with 0 where the engines compute the model differently, beyond rounding",
    )
    given = parser.parse_args()
    jobs = [f"--jobs={given.jobs}"] if given.jobs else []
    code = storage_main(["verify", *jobs, "--", given.dump])
    if code or not given.against:
        return code
    from pipeline import cli
    from pipeline.agreement import Answer
    from pipeline.dump import recompute
    from pipeline.errors import DAMAGED, DONE, REFUSED
    from pipeline.foreign import printable

    codes = {Answer.SAME: DONE, Answer.DIFFERENT: REFUSED, Answer.OTHER: DAMAGED}
    if given.accept_different:
        codes[Answer.DIFFERENT] = DONE
    found = [Answer.SAME]

    def compare() -> dict[str, object]:
        options = given.dump, given.against, given.sample, given.seed, given.bound
        lines, found[0] = recompute.against(*options)
        print(printable("\n".join(lines)))
        return {}

    return cli.main(compare, None) or codes[found[0]]


if __name__ == "__main__":
    sys.exit(main())
