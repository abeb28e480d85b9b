"""python -m storage inspect | verify | export | index | gc"""

import argparse
import errno
import re
import sys
from collections.abc import Callable
from typing import TextIO

import pyarrow as pa

from storage.dataset import LogitDataset
from storage.errors import IncompleteDump, StorageError, StoreError, Unindexable
from storage.export import export, is_folder
from storage.gc import DEFAULT_HOURS, leftovers, remove
from storage.index_files import dump_index, index_in_dump
from storage.inspect import describe, describe_row, token_decoder
from storage.manifest import Dump
from storage.parallel import cores
from storage.scan import index_dump
from storage.text import one_line, printable
from storage.verify import verify

# exit codes: the store fails, wrong input, damaged data, stopped by Ctrl-C
FAILED, BAD_INPUT, DAMAGED, INTERRUPTED = 1, 2, 4, 75
OUTSIDE = {errno.ENOSPC, errno.EDQUOT, errno.EIO}  # an export may work later


def say(line: object, file: TextIO | None = None) -> None:
    """Print what may hold text of a dump."""
    print(printable(str(line)), file=file)


def inspect_command(args: argparse.Namespace) -> int:
    try:
        dataset = LogitDataset(args.dump)
    except IncompleteDump:
        dataset = LogitDataset(args.dump, partial=True)
    if args.row is None:
        say("\n".join(describe(dataset)))
        if len(dataset):
            say(f"\n`python -m storage inspect {args.dump} --row 0` shows a row as text.")
        return 0
    if not 0 <= args.row < len(dataset):
        say(
            f"--row {args.row}: the dump has {len(dataset):,} rows, numbered from 0",
            file=sys.stderr,
        )
        return BAD_INPUT
    decode, note = token_decoder(dataset)
    if note:
        say(note)
    say("\n".join(describe_row(dataset[args.row], decode, args.top, args.positions)))
    return 0


def verify_command(args: argparse.Namespace) -> int:
    report = verify(args.dump, partial=args.partial, jobs=args.jobs or cores())
    for note in report.notes:
        say(one_line(f"note   {note}"))
    for fault in report.faults:
        say(one_line(f"FAULT  {fault}"))
    learnt = f", {report.targets:,} of them targets," if report.targets else ""
    good = f"{report.rows:,} rows and {report.tokens:,} tokens{learnt} in {report.shards:,} shards"
    if report.ok:
        others = " of the other files" if report.notes else ""
        say(f"ok     {args.dump}: {good}, every byte{others} read and every row decoded")
        return 0
    say(f"{args.dump}: {len(report.faults)} faults; {good} were read", file=sys.stderr)
    return DAMAGED


def export_command(args: argparse.Namespace) -> int:
    if not is_folder(args.target) and (args.jobs or 1) > 1:
        say(
            f"--jobs {args.jobs}: one process writes the one file {args.target}; for several files "
            f"name a folder, such as {args.target.removesuffix('.parquet')}/",
            file=sys.stderr,
        )
        return BAD_INPUT
    rows = export(LogitDataset(args.dump), args.target, args.per, args.jobs or cores())
    say(f"{args.target}: {rows:,} rows, one per {args.per}")
    return 0


def index_command(args: argparse.Namespace) -> int:
    dump = Dump(args.dump)
    manifest = dump.manifest()
    name = dump_index(manifest.fingerprint)
    if index_in_dump(dump.store, manifest.fingerprint, dump.plan_sha256) is not None:
        say(f"{args.dump}: {name} is there")
        return 0
    try:
        index = index_dump(dump, manifest)
    except Unindexable as error:
        say(f"{args.dump}: cannot have an index: {error}", file=sys.stderr)
        return BAD_INPUT
    dump.store.create(name, bytes(index.data))
    say(f"{args.dump}: {name}: {index.rows:,} rows in {len(index.data):,} bytes")
    return 0


def gc_command(args: argparse.Namespace) -> int:
    found = leftovers(args.dump, args.older_than)
    for leftover in found:
        name = one_line(leftover.name)
        say(f"{leftover.bytes:>14,} bytes  {leftover.age / 3600:>8.1f} h  {name}")
    total = f"{len(found)} leftovers, {sum(leftover.bytes for leftover in found):,} bytes"
    if not args.delete:
        say(f"{total}; no reader uses them, --delete removes them" if found else total)
        return 0
    remove(args.dump, found)
    say(f"{total}: removed")
    return 0


def place(path: str) -> str:
    """A path or URL; without user names and passwords, since messages show it."""
    if re.search(r"://[^/\s]*@", path):
        raise argparse.ArgumentTypeError(
            "the URL holds a user name or a password; set them in the environment, such as "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    return path


def at_least_one(text: str) -> int:
    """A whole number above 0."""
    if not (text.isascii() and text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, found {text!r}")
    return int(text)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m storage", description="Inspect, verify, export, index or clean a dump."
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str):  # type: ignore[no-untyped-def]
        sub = commands.add_parser(name, help=text, description=text)
        sub.add_argument("dump", type=place, help="the dump's directory, local or s3://…")
        sub.set_defaults(run=run)
        return sub

    def jobs(sub: argparse.ArgumentParser) -> None:
        text = "processes that work at the same time (default: one for each core)"
        sub.add_argument("--jobs", type=at_least_one, metavar="N", help=text)

    sub = command(
        "inspect", inspect_command, "show plan, size and kept mass; with --row, one row as text"
    )
    sub.add_argument("--row", type=int, help="show this row: its text and the teacher's candidates")
    sub.add_argument("--top", type=int, default=4, help="candidates per position (default 4)")
    sub.add_argument("--positions", type=int, default=40, help="positions shown (default 40)")
    sub = command(
        "verify",
        verify_command,
        "read every byte and decode every row, but for files that notes name; exit code 4 if a "
        "fault is found",
    )
    jobs(sub)
    sub.add_argument(
        "--partial",
        action="store_true",
        help="verify the shards committed so far of an unfinished dump",
    )
    command(
        "index",
        index_command,
        "write the index of a finished dump that has none; dumps of this release have one",
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
    sub.add_argument(
        "target", type=place, help="the Parquet file to write, or DIR/ for one file for each shard"
    )
    jobs(sub)
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
    except KeyboardInterrupt:
        say("interrupted: run the same command again", file=sys.stderr)
        return INTERRUPTED
    except IncompleteDump as error:
        say(error, file=sys.stderr)
        return BAD_INPUT
    except StoreError as error:
        say(error, file=sys.stderr)
        return FAILED
    except (StorageError, pa.ArrowException) as error:
        say(error, file=sys.stderr)
        return DAMAGED
    except OSError as error:
        say(error, file=sys.stderr)
        return FAILED if error.errno in OUTSIDE else BAD_INPUT
    return code


if __name__ == "__main__":
    sys.exit(main())
