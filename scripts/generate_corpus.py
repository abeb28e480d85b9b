"""The base model writes the general corpus that stage one then reads.

    python scripts/generate_corpus.py --model Qwen/Qwen3-8B-Base --output text --tokens 100000000

Interrupt it, run the same command again: it goes on behind the last file. Exit codes: 0 done,
1 failed (such as a full disk; run it again), 2 bad input, 3 refused (the directory holds documents
of other settings), 75 interrupted.
"""

import sys

from pipeline import cli
from pipeline.config import GenerateConfig
from pipeline.signals import die_with_parent


def main() -> int:
    die_with_parent()
    config, own = cli.parse(cli.script_parser(GenerateConfig, __doc__ or ""), GenerateConfig)
    from pipeline import generate  # late: this takes seconds

    return cli.main(lambda: generate.run(config), own.summary)


if __name__ == "__main__":
    sys.exit(main())
