"""The files of a wrapper's processor: how images and sound become its inputs. Training changes
nothing of them, so a student has those of its base."""

import shutil
from pathlib import Path

FILES = (
    "preprocessor_config.json",  # of images, or of sound
    "processor_config.json",
    "video_preprocessor_config.json",
    "audio_tokenizer_config.json",
    "chat_template.json",  # of a processor, in older files
    "chat_template.jinja",
)


def copy_processor(base: Path, saved: Path) -> None:
    """Copy the processor's files that the saved directory does not have yet."""
    for name in FILES:
        if (base / name).exists() and not (saved / name).exists():
            shutil.copyfile(base / name, saved / name)
