"""Multiple-choice questions of BIG-bench (Apache-2.0), for the `tasks` of an evaluation or a study.

    python scripts/studies/bigbench_tasks.py FOLDER --list
    python scripts/studies/bigbench_tasks.py FOLDER
    python scripts/studies/bigbench_tasks.py FOLDER --tasks general_knowledge,riddle_sense

Fetches the source archive of bigbench 1.0.0 (358 MB) with pip into FOLDER, once, and writes a file
NAME.jsonl for each task. A question is the text before its answer as BIG-bench writes it. Kept are
questions with exactly one right option and at most --longest characters, and of those at most
--most, chosen by the hash of their text. Tasks with fewer than 30 are left out.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ARCHIVE = "bigbench-1.0.0.tar.gz"
SHA256 = "1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2"
TASKS, LEAST = "bigbench-1.0.0/bigbench/benchmark_tasks/", 30
Json = dict[str, Any]


def fetch(folder: Path) -> Path:
    """The archive in the folder; downloads it if it is not there."""
    archive = folder / ARCHIVE
    if not archive.exists():
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:"]
        subprocess.run([*command, "--dest", folder, "bigbench==1.0.0"], check=True)
    with archive.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        sys.exit(f"{archive}: expected sha256 {SHA256}, found {found}. Remove it and try again")
    return archive


def tasks(archive: Path) -> Iterator[tuple[str, Json]]:
    """(name, content) of every task in JSON; a subtask's name begins with that of its task."""
    with tarfile.open(archive) as files:
        for member in files:
            name = member.name.removeprefix(TASKS)
            content = files.extractfile(member) if name.endswith("/task.json") else None
            if name != member.name and content is not None:
                yield name.removesuffix("/task.json").replace("/", "-"), json.load(content)


def questions(task: Json, longest: int) -> list[Json]:
    """The task's questions that have one right option, in the order of their hashes."""
    found = {}
    before = task.get("task_prefix", "") + task.get("example_input_prefix", "\nQ: ")
    after = task.get("example_output_prefix", "\nA: ")
    for example in task.get("examples", []):
        scores = example.get("target_scores")
        if not isinstance(scores, dict) or not isinstance(example.get("input"), str):
            continue
        options = [option.strip() for option in scores]
        right = [number for number, score in enumerate(scores.values()) if score == 1]
        text = (before + example["input"] + after).strip()
        fits = text and len(text) + max(map(len, options), default=0) <= longest
        if len(right) == 1 and len(set(options)) == len(options) > 1 and fits:
            row = {"question": text, "options": options, "answer": right[0]}
            found[hashlib.sha256(json.dumps(row).encode()).hexdigest()] = row
    return [found[digest] for digest in sorted(found)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--list", action="store_true", help="list the tasks and write nothing")
    parser.add_argument("--tasks", help="names, separated by commas; all by default")
    parser.add_argument("--most", type=int, default=200, help="questions of a task")
    parser.add_argument("--longest", type=int, default=600, help="characters of a question")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    chosen = given.tasks.split(",") if given.tasks else None
    for name, task in tasks(fetch(given.folder)):
        found = questions(task, given.longest)
        if len(found) < LEAST or (chosen is not None and name not in chosen):
            continue
        print(f"{len(found):>6} {name}: {' '.join(task.get('description', '').split())[:80]}")
        if not given.list:
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in found[: given.most])
            (given.folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
