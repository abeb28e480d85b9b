"""Where a run may write: neither over its inputs, nor into a corpus."""

import glob
import os
from pathlib import Path

from pipeline.config import CorpusConfig, TrainConfig, held_out_texts
from pipeline.errors import ConfigError


def refuse_inputs_inside(folder: Path, inputs: dict[str, str | Path]) -> None:
    """ConfigError where a local input is the output directory or lies in it, by any spelling."""
    root = folder.resolve()
    for name, given in inputs.items():
        for path in local_files(str(given)):
            # A link in the output that leads out of it counts too: the run may meet its name.
            for real in (path.resolve(), path.parent.resolve() / path.name):
                if real.is_relative_to(root):
                    raise ConfigError(
                        f"output {folder}: contains {name} ({path}), which a run must not write "
                        "over; choose another output directory"
                    )


def local_files(given: str) -> list[Path]:
    """What an input's setting names on this machine; nothing for the hub and object stores."""
    path = Path(given).expanduser()
    if os.path.lexists(path):
        return [path]
    return [Path(found) for found in glob.glob(str(path), recursive=True)]


def refuse_output_in_corpus(folder: Path, corpora: dict[str, CorpusConfig]) -> None:
    """ConfigError where what a run writes would be read as text when it resumes."""
    for name, corpus in corpora.items():
        path = Path(corpus.path).expanduser()
        if path.is_dir() and folder.resolve().is_relative_to(path.resolve()):
            raise ConfigError(
                f"output {folder}: lies in the corpus {name} ({path}), where it would be read as "
                "text; choose another output directory"
            )


def check_place(config: TrainConfig, model: Path) -> None:
    """ConfigError for an output directory that holds an input, or lies in a corpus.

    `model` is the directory that config.model was found in.
    """
    folder = Path(config.output)
    corpora = {"domain.path": config.domain}
    corpora |= {f"held_out.{kind}.path": text for kind, text in held_out_texts(config.held_out)}
    dumps = config.dump if isinstance(config.dump, dict) else [config.dump]
    inputs: dict[str, str | Path] = {"model": model}
    inputs |= {name: corpus.path for name, corpus in corpora.items()}
    inputs |= {f"dump {dump}": dump for dump in dumps if dump is not None}
    if config.held_out.dump is not None:
        inputs["held_out.dump"] = config.held_out.dump
    refuse_inputs_inside(folder, inputs)
    refuse_output_in_corpus(folder, corpora)
