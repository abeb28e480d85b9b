"""Stage two over several hosts: start this host's ranks of scripts/train_student.py.

    python scripts/train_hosts.py --hosts 2 --host 0 --endpoint node0:29500 -- \\
        --config scripts/configs/train_8gpus.yaml

Run it on each host, with its own --host. There is a rank for each GPU, and one on a host without
any. What is behind -- goes to scripts/train_student.py. Every host must see the same files: the
corpora, the dump, and `output`, where checkpoints are. After a failure on one host all of them end;
run the same commands again to resume.

Exit codes: those of scripts/train_student.py; 1 also where the hosts do not meet.
"""

import argparse
import sys

from pipeline import cli
from pipeline.types import Json


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hosts", type=int, required=True, help="how many hosts train together")
    parser.add_argument("--host", type=int, required=True, help="the number of this host, from 0")
    parser.add_argument(
        "--endpoint",
        required=True,
        metavar="NAME:PORT",
        help="where the hosts meet: host 0 listens there, and the others must reach it",
    )
    parser.add_argument("arguments", nargs="*", metavar="-- ARGUMENT", help="of train_student.py")
    given = parser.parse_args()
    from pipeline.training import hosts  # torch takes seconds

    def work() -> Json:
        meeting = hosts.Meeting(given.hosts, given.host, given.endpoint)
        return hosts.run(meeting, given.arguments)

    return cli.main(work, None)


if __name__ == "__main__":
    sys.exit(main())
