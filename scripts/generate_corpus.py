"""Let the base model write the general corpus that stage one then reads.

    python scripts/generate_corpus.py --model Qwen/Qwen3-8B-Base --output text --tokens 100000000
    python scripts/generate_corpus.py --model Qwen/Qwen3-8B-Base --output text --tokens 100000000 \\
        --prompts.path starts.jsonl --engine_args.gpu_memory_utilization 0.8

A chat model answers conversations, each turn of the assistant anew:

    python scripts/generate_corpus.py --model Qwen/Qwen3-8B --output replies \\
        --prompts.path chats.jsonl --prompts.messages_column messages

After an interruption, run the same command again to resume after the last file.

Exit codes: 0 done, 1 failed (such as a full disk; run it again), 2 bad input, 3 refused (the
directory holds documents made with other settings), 75 interrupted.
"""

import sys

from pipeline import cli
from pipeline.config import GenerateConfig
from pipeline.signals import die_with_parent


def main() -> int:
    die_with_parent()
    config, own = cli.parse(cli.script_parser(GenerateConfig, __doc__ or ""), GenerateConfig)
    from pipeline import generate  # imported late, because it takes seconds

    return cli.main(lambda: generate.run(config), own.summary)


if __name__ == "__main__":
    sys.exit(main())
