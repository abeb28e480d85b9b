"""python -m storage inspect | verify | export | gc"""

import argparse
import sys
from collections.abc import Callable

import pyarrow as pa

from storage.dataset import LogitDataset
from storage.errors import IncompleteDump, StorageError, StoreError
from storage.export import export
from storage.gc import DEFAULT_HOURS, leftovers, remove
from storage.inspect import describe, describe_row, token_decoder
from storage.verify import verify

FAILED, BAD_INPUT, DAMAGED = 1, 2, 4  # exit codes: the store fails, wrong input, damaged data


def inspect_command(args: argparse.Namespace) -> int:
    try:
        dataset = LogitDataset(args.dump)
    except IncompleteDump:
        dataset = LogitDataset(args.dump, partial=True)
    if args.row is None:
        print("\n".join(describe(dataset)))
        if len(dataset):
            print(f"\n`python -m storage inspect {args.dump} --row 0` shows a row as text.")
        return 0
    if not 0 <= args.row < len(dataset):
        print(
            f"--row {args.row}: the dump has {len(dataset):,} rows, numbered from 0",
            file=sys.stderr,
        )
        return BAD_INPUT
    decode, note = token_decoder(dataset)
    if note:
        print(note)
    print("\n".join(describe_row(dataset[args.row], decode, args.top, args.positions)))
    return 0


def verify_command(args: argparse.Namespace) -> int:
    report = verify(args.dump, partial=args.partial)
    for note in report.notes:
        print(f"note   {note}")
    for fault in report.faults:
        print(f"FAULT  {fault}")
    good = f"{report.rows:,} rows and {report.tokens:,} tokens in {report.shards:,} shards"
    if report.ok:
        print(f"ok     {args.dump}: {good}, every byte read and every row decoded")
        return 0
    print(f"{args.dump}: {len(report.faults)} faults; {good} were read", file=sys.stderr)
    return DAMAGED


def export_command(args: argparse.Namespace) -> int:
    rows = export(LogitDataset(args.dump), args.target, args.per)
    print(f"{args.target}: {rows:,} rows, one per {args.per}")
    return 0


def gc_command(args: argparse.Namespace) -> int:
    found = leftovers(args.dump, args.older_than)
    for leftover in found:
        print(f"{leftover.bytes:>14,} bytes  {leftover.age / 3600:>8.1f} h  {leftover.name}")
    total = f"{len(found)} leftovers, {sum(leftover.bytes for leftover in found):,} bytes"
    if not args.delete:
        print(f"{total}; no reader uses them, --delete removes them" if found else total)
        return 0
    remove(args.dump, found)
    print(f"{total}: removed")
    return 0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m storage", description="Inspect, verify, clean or export a dump."
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str):  # type: ignore[no-untyped-def]
        sub = commands.add_parser(name, help=text, description=text)
        sub.add_argument("dump", help="the dump's directory, local or s3://…")
        sub.set_defaults(run=run)
        return sub

    sub = command(
        "inspect", inspect_command, "show plan, size and kept mass; with --row, one row as text"
    )
    sub.add_argument("--row", type=int, help="show this row: its text and the teacher's candidates")
    sub.add_argument("--top", type=int, default=4, help="candidates per position (default 4)")
    sub.add_argument("--positions", type=int, default=40, help="positions shown (default 40)")
    sub = command(
        "verify",
        verify_command,
        "read every byte and decode every row; exit code 4 if a fault is found",
    )
    sub.add_argument(
        "--partial",
        action="store_true",
        help="verify the shards committed so far of an unfinished dump",
    )
    sub = command(
        "gc", gc_command, "list the files that dead writers left behind; --delete removes them"
    )
    sub.add_argument("--delete", action="store_true", help="remove the files, not only list them")
    sub.add_argument(
        "--older-than",
        type=float,
        default=DEFAULT_HOURS,
        metavar="HOURS",
        help="keep younger files, which a running writer may own (default %(default)s)",
    )
    sub = command(
        "export", export_command, "write plain Parquet columns for DuckDB, Polars and pandas"
    )
    sub.add_argument("target", help="the Parquet file to write")
    sub.add_argument(
        "--per",
        choices=["position", "sequence"],
        default="position",
        help="what one output row holds (default %(default)s)",
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    try:
        code: int = args.run(args)
    except IncompleteDump as error:
        print(error, file=sys.stderr)
        return BAD_INPUT
    except StoreError as error:
        print(error, file=sys.stderr)
        return FAILED
    except (StorageError, pa.ArrowException) as error:
        print(error, file=sys.stderr)
        return DAMAGED
    except OSError as error:
        print(error, file=sys.stderr)
        return BAD_INPUT
    return code


if __name__ == "__main__":
    sys.exit(main())
