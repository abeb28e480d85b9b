"""Stage one: run the base model once over a general corpus and store its top-k on disk.

    python scripts/dump_logits.py --config scripts/configs/dump.yaml --show_document 0
    python scripts/dump_logits.py --config scripts/configs/dump.yaml --estimate
    python scripts/dump_logits.py --config scripts/configs/dump.yaml --partitions 8 --workers 8
    python scripts/dump_logits.py --config scripts/configs/dump.yaml --partition 3/8 \\
        --corpus.limit 100000 --engine_args.tensor_parallel_size 2

After an interruption, run the same command again to resume from the last committed shard. The dump
stops when the process that started it ends, except under nohup.

Exit codes: 0 done, 1 failed (such as a full disk; run it again), 2 bad input, 3 refused (the
directory holds a dump with another plan), 4 damaged data, 75 interrupted.
"""

import argparse
import re
import signal
import sys

from pipeline import cli
from pipeline.config import MOST, DumpConfig
from pipeline.errors import INTERRUPTED
from pipeline.ranges import Range, within
from pipeline.signals import die_with_parent


def partition_number(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
    if not match or int(match[1]) >= int(match[2]):
        raise argparse.ArgumentTypeError(f"expected I/N with 0 <= I < N, found {text!r}")
    return int(match[1]), int(match[2])


def main() -> int:
    die_with_parent()
    for known in (signal.SIGINT, signal.SIGTERM):  # until the dump handles them itself
        signal.signal(known, lambda *_: sys.exit(INTERRUPTED))
    parser = cli.script_parser(DumpConfig, __doc__ or "", show_document=True)
    parser.add_argument(
        "--partition",
        type=str,
        metavar="I/N",
        help="dump only partition I of N, counted from 0; sets partitions to N",
    )
    parser.add_argument(
        "--only",
        choices=["plan", "finalize"],
        help="plan: write plan.json and stop; finalize: write manifest.json once all partitions "
        "are finished",
    )
    parser.add_argument(
        "--estimate",
        type=within(Range(1, MOST)),
        nargs="?",
        const=48,
        metavar="DOCUMENTS",
        help="print what the whole dump will cost, measured on this many documents (default: 48); "
        "write nothing",
    )
    parser.add_argument(
        "--run_tokens",
        type=within(Range(1, 1 << 53)),
        help="with --estimate: general tokens that one student run reads (default: all, once)",
    )
    config, own = cli.parse(parser, DumpConfig)
    index = None
    if own.partition:
        try:
            index, config.partitions = partition_number(own.partition)
        except argparse.ArgumentTypeError as error:
            parser.error(f"--partition: {error}")

    if own.show_document:
        from pipeline import show_document

        return cli.main(lambda: show_document.run(own.show_document, config), own.summary)
    from pipeline.dump import dump

    if own.estimate:
        from pipeline.dump import estimate

        return cli.main(lambda: estimate.run(config, own.estimate, own.run_tokens), own.summary)
    if config.workers > 1 and index is None and own.only is None:
        command = [sys.executable, *sys.argv]
        return cli.main(lambda: dump.run_workers(config, command), own.summary)
    return cli.main(lambda: dump.run(config, index, own.only), own.summary)


if __name__ == "__main__":
    sys.exit(main())
