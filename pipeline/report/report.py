"""Write a page about a dump, a training run, an evaluation or a study, whichever is there."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError
from pipeline.json_files import read_json
from pipeline.places import check_file
from pipeline.progress import say


def run(path: str, output: str) -> dict[str, Any]:
    """Write the page. Raises ConfigError if the path holds none of the four."""
    text, kind = make(path)
    alone = kind in ("dump", "evaluation")  # nothing but what its own program wrote
    check_file("--output", output, {f"the {kind}": path} if alone else {})
    file = Path(output)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    say(f"{kind} {path}: written to {file} ({len(text.encode()):,} bytes)")
    return {"kind": kind, "output": output}


def make(path: str) -> tuple[str, str]:
    """(the page, its subject: dump, training run, evaluation or study)."""
    folder = Path(path)
    results = folder if folder.is_file() else folder / "results.json"
    if results.is_file() and "models" in read_json(results):
        from pipeline.report import evaluation_page

        with as_written(results, "an evaluation"):
            return evaluation_page.report(results), "evaluation"
    if (folder / "results.json").exists():
        from pipeline.report import study_page

        with as_written(folder / "results.json", "a study"):
            return study_page.report(folder), "study"
    if (folder / "metrics.jsonl").exists():
        from pipeline.report import run_page

        with as_written(folder / "metrics.jsonl", "a training run"):
            return run_page.report(folder), "training run"
    if (folder / "plan.json").exists() or "://" in path:
        from pipeline.report import dump_page

        return dump_page.report(path), "dump"
    raise ConfigError(
        f"{path}: neither a study or an evaluation (results.json), a training run (metrics.jsonl) "
        "nor a dump (plan.json)"
    )


@contextlib.contextmanager
def as_written(file: Path, kind: str) -> Iterator[None]:
    """ConfigError where the file's values are not those that a run of this project writes."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{file}: not what {kind} writes ({type(error).__name__}: {error}). Another program "
            "wrote it, or it was edited: restore it from a copy"
        ) from error
