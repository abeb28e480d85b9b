"""Re-read a dump and check everything; with --against, recompute rows with transformers too.

    python scripts/verify_dump.py runs/dump
    python scripts/verify_dump.py s3://bucket/dump --against Qwen/Qwen3-8B-Base --sample 20

Exit codes: 0 good, 1 the store does not answer, 2 no dump or not finished, 4 faults.
"""

import argparse
import sys

from storage.__main__ import main as storage_main


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dump", help="the dump's directory, local or s3://…")
    parser.add_argument("--against", metavar="MODEL", help="the model the dump was made with")
    parser.add_argument("--sample", type=int, default=10, help="rows recomputed (default 10)")
    parser.add_argument("--seed", type=int, default=0, help="which rows (default 0)")
    parser.add_argument(
        "--bound", type=float, default=0.02, help="largest mean KL of a row, nats (default 0.02)"
    )
    given = parser.parse_args()
    code = storage_main(["verify", "--", given.dump])
    if code or not given.against:
        return code
    from pipeline import cli
    from pipeline.dump import recompute as verify
    from pipeline.errors import DAMAGED
    from pipeline.foreign import printable

    good = [False]

    def compare() -> dict[str, object]:
        checks = verify.recompute(given.dump, given.against, given.sample, given.seed)
        lines, good[0] = verify.report(checks, given.bound)
        print(printable("\n".join(lines)))
        return {}

    return cli.main(compare, None) or (0 if good[0] else DAMAGED)


if __name__ == "__main__":
    sys.exit(main())
