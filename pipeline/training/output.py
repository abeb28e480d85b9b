"""What a run may delete or replace in its output directory: what it made itself.

Every directory that a run makes is marked before anything else is written into it. Only a directory
with the marker of this run is ever deleted or replaced; anything else that stands in the way is
refused when the run starts.
"""

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import RefusedError
from pipeline.json_files import read_object, write_json
from pipeline.recorded import refuse_other_settings
from pipeline.training.identity import completed
from pipeline.types import Json
from storage.manifest import differences

FINAL, DRAFT, SUMMARY, METRICS = "model", "model.draft", "summary.json", "metrics.jsonl"
ADAPTER = "adapter"
"""Of a run on quantised weights: the adapters that it trained on them."""
MARKER = ".mol-distill.json"
"""Written first into a directory that a run makes: the run's identity."""
COMPLETE = "distill.json"
"""Written last into a checkpoint. One without it was cut short and is not resumed from."""
CHECKPOINT = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class Output:
    """The output directory of the run with this identity."""

    folder: Path
    identity: Json

    def checkpoints(self) -> list[Path]:
        """Everything that has a checkpoint's name, by step."""
        found = [path for path in self.folder.glob("*") if CHECKPOINT.fullmatch(path.name)]
        return sorted(found, key=step_of)

    def check(self) -> None:
        """RefusedError where something that this run did not make has a name that it would use."""
        names = [FINAL, DRAFT, *[ADAPTER] * ("quantization" in self.identity)]
        for path in [*self.checkpoints(), *(self.folder / name for name in names)]:
            if os.path.lexists(path):
                self.check_own(path)
        summary, metrics = self.folder / SUMMARY, self.folder / METRICS
        if summary.exists() and not is_summary(summary):
            raise RefusedError(in_the_way(summary))
        if metrics.exists() and not is_log(metrics):
            raise RefusedError(in_the_way(metrics))

    def check_own(self, path: Path) -> None:
        """RefusedError unless this run made the directory, or it is empty."""
        there = made_by(path)
        if there is not None:
            self.refuse_other(path, there)
        elif path.is_symlink() or not path.is_dir() or any(path.iterdir()):
            raise RefusedError(in_the_way(path))

    def is_own(self, path: Path) -> bool:
        there = made_by(path)
        return there is not None and not differences(completed(there, self.identity), self.identity)

    def refuse_other(self, path: Path, there: Json) -> None:
        """RefusedError where `there`, the identity that is recorded at `path`, is another run's."""
        refuse_other_settings(path, completed(there, self.identity), self.identity)

    def make(self, name: str) -> Path:
        """A directory with this run's marker. One that this run made may be there already."""
        path = self.folder / name
        if os.path.lexists(path):
            self.check_own(path)
        path.mkdir(parents=True, exist_ok=True)
        write_json(path / MARKER, {"identity": self.identity})
        return path

    def remove(self, path: Path) -> None:
        """Delete a directory that this run made; does nothing where there is none."""
        if os.path.lexists(path):
            self.check_own(path)
            shutil.rmtree(path)

    def replace(self, draft: Path, path: Path) -> None:
        """Give a directory its final name, in the place of one that this run made."""
        self.remove(path)
        os.replace(draft, path)

    def rotate(self, limit: int, best: str | None, keep_last: bool = True) -> None:
        """Delete this run's oldest checkpoints beyond `limit`, never the best one."""
        own = [path for path in self.checkpoints() if self.is_own(path)]
        kept = {Path(best).name} if best is not None else set()
        kept |= {path.name for path in own[-1:] if keep_last}
        old = [path for path in own if path.name not in kept]
        for path in old[: max(len(own) - max(limit, len(kept)), 0)]:
            self.remove(path)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def made_by(path: Path) -> Json | None:
    """The identity of the run that made a directory; None for one without a marker.

    Checkpoints of earlier releases have the marker that is written last, and no other.
    """
    if path.is_symlink() or not path.is_dir():
        return None
    for name in (MARKER, COMPLETE):
        identity = (read_object(path / name) or {}).get("identity")
        if isinstance(identity, dict):
            return identity
    return None


def is_summary(path: Path) -> bool:
    """Whether a summary.json is of a run, whole or cut short."""
    found = read_object(path)
    if found is None:
        return path.is_file() and path.read_bytes()[:1] in (b"", b"{")
    return "identity" in found


def is_log(path: Path) -> bool:
    """Whether a metrics.jsonl is of a run: its first line has what a run logs."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        first = file.readline()
    names = (b'"ce"', b'_perplexity"', b'"eval_general_kl"')
    return not first.strip() or any(name in first for name in names)


def in_the_way(path: Path) -> str:
    return (
        f"{path}: was not made by this run, or has lost its marker, and is in the way. It is "
        "neither deleted nor overwritten: move it elsewhere, or choose another output directory"
    )
