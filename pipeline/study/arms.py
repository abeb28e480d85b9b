"""The arms of a study: the trainer of each, and students between the base and another student."""

from collections.abc import Callable
from functools import partial

import torch

from pipeline.models.directory import ModelFolder
from pipeline.models.generation import keep_own, make_savable
from pipeline.models.head import untie_head
from pipeline.models.processor import copy_processor
from pipeline.study.config import ArmConfig
from pipeline.study.live_teacher import LiveTrainer
from pipeline.study.targets import ArmTrainer, retargets
from pipeline.training.output import DRAFT, FINAL, Output
from pipeline.training.trainer import DistillTrainer


def trainer_of(arm: ArmConfig, base: ModelFolder) -> Callable[..., DistillTrainer]:
    """What makes the trainer of an arm; for MoL from disk, the trainer of stage two itself."""
    changes = retargets(arm)
    if arm.targets == "live":
        return partial(LiveTrainer, retarget=changes, teacher=base)
    return partial(ArmTrainer, retarget=changes) if changes else DistillTrainer


def interpolate(base: ModelFolder, student: ModelFolder, weight: float, output: Output) -> None:
    """Save (1 - weight) · base + weight · student as the student of an output directory."""
    output.check()
    mixed, other = (folder.load("float32") for folder in (base, student))
    make_savable(mixed)
    if not other.config.get_text_config().tie_word_embeddings:
        untie_head(mixed)  # a student with adapted embeddings
    found = dict(other.named_parameters())
    with torch.no_grad():
        for name, ours in mixed.named_parameters():
            ours.lerp_(found.pop(name), weight)
    assert not found
    output.remove(output.folder / DRAFT)
    draft = output.make(DRAFT)
    mixed.to(getattr(torch, base.dtype())).save_pretrained(draft)
    keep_own(base.path, draft)
    base.tokenizer.save_pretrained(draft)
    copy_processor(base.path, draft)
    output.replace(draft, output.folder / FINAL)
