"""Compare models with the base they came from, on held-out domain and general text.

    python scripts/evaluate.py --config scripts/configs/evaluate.yaml
    python scripts/evaluate.py --config scripts/configs/evaluate.yaml \\
        --models.student runs/student/model --domain.path notes-test.jsonl --general.limit 200

Prints a table: perplexities, KL to the base over the full vocabulary in both directions, and how
often the most likely token is the same. Writes the numbers as JSON to `output`. The results are
written at the end: after an interruption the same command starts from the beginning.

Exit codes: 0 done, 2 bad input, 3 refused (the models have different tokenizers).
"""

import sys

from pipeline import cli
from pipeline.config import EvalConfig


def main() -> int:
    parser = cli.script_parser(EvalConfig, __doc__ or "", show_document=True)
    config, own = cli.parse(parser, EvalConfig)
    if own.show_document:
        from pipeline import show_document

        return cli.main(lambda: show_document.run(own.show_document, config), own.summary)
    # Imported after the settings are checked, because torch takes seconds to load.
    from pipeline.evaluation import evaluate

    return cli.main(lambda: evaluate.run(config), own.summary)


if __name__ == "__main__":
    sys.exit(main())
