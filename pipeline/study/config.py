"""The settings of a study: arms × learning rates × seeds."""

from dataclasses import dataclass, field
from typing import Any, Literal

from pipeline.config import CorpusConfig, HeldOutConfig, require


@dataclass
class ArmConfig:
    """One way to train, compared with the others over the same seeds."""

    targets: Literal["stored", "labels", "live", "renormalised"] = "stored"
    """What the general text teaches. stored: the dump's top-k and tail. The others are controls.
    labels: its own next tokens (cross-entropy on both). live: the full distributions of a base
    model in memory. renormalised: the dump's top-k without the tail."""
    dump: str | None = None
    """One of the study's dumps; the first by default."""
    k: int | None = None
    """Only so many of the stored entries; the others' mass goes to the tail."""
    domain: bool = True
    """false: the general text alone."""
    train: dict[str, Any] = field(default_factory=dict)
    """Settings of scripts/train_student.py, over the study's own, e.g. {loss: {alpha: 0.5}}."""
    interpolate: str | None = None
    """No training: between the base and the finished student of that arm, ..."""
    weight: float = 0.5
    """... at that weight of the student."""
    seeds: list[int] | None = None
    """Other seeds than the study's."""
    learning_rates: list[float] | None = None
    """Other learning rates than the study's."""


@dataclass
class MeasureConfig:
    """How each student is measured on the held-out text."""

    tail_k: int = 64
    """The tail measures look outside the base's that many most probable tokens."""
    dtype: Literal["auto", "float32", "bfloat16"] = "float32"
    """Weights' dtype while measuring."""
    batch_tokens: int = 2048
    """Tokens that go through a model at a time."""
    curve_steps: int = 0
    """Perplexities during training every so many steps; 0 for none."""
    curve_sequences: int = 50
    """At most so many sequences of each text for those."""


@dataclass
class StudyConfig:
    """Arms × learning rates × seeds; what is finished is kept."""

    model: str
    """The base model: a Hugging Face directory or hub name."""
    domain: CorpusConfig
    """The domain corpus."""
    general: CorpusConfig
    """The general corpus, which the study's dumps are made of."""
    held_out: HeldOutConfig
    """Text to measure on, that no arm trains on; of each at most held_out.sequences."""
    output: str
    """Directory: dumps/, runs/ARM-lrRATE-seedSEED/, results.json, table.md."""
    arms: dict[str, ArmConfig]
    """By name. The base is always measured."""
    dumps: dict[str, str | dict[str, Any]] = field(default_factory=dict)
    """By name: a dump's path, or settings of scripts/dump_logits.py to make one, e.g. {k: 64}."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Each decides the order of the sequences, and random numbers."""
    learning_rates: list[float] = field(default_factory=lambda: [1e-4])
    """Every arm is run at each."""
    max_length: int = 2048
    """Longest sequence in tokens."""
    train: dict[str, Any] = field(default_factory=dict)
    """Settings of scripts/train_student.py for all arms, ..."""
    training: dict[str, Any] = field(default_factory=dict)
    """... its training: among them, transformers.TrainingArguments."""
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    only: list[str] | None = None
    """Run these arms now; the results hold whatever is finished."""

    def __post_init__(self) -> None:
        held = self.held_out
        require(
            held.domain is not None and held.general is not None,
            "held_out: both held_out.domain.path and held_out.general.path are needed",
        )
        for name in self.only or []:
            require(
                name in self.arms, f"only: {name!r} is none of {', '.join(map(str, self.arms))}"
            )
        for name, arm in self.arms.items():
            require(
                arm.dump is None or arm.dump in self.dumps,
                f"arms.{name}.dump: {arm.dump!r} is none of {', '.join(self.dumps)}",
            )
            require(arm.k is None or arm.k >= 1, f"arms.{name}.k: at least 1, found {arm.k}")
            other = arm.interpolate
            require(
                other is None or (other in self.arms and not self.arms[other].interpolate),
                f"arms.{name}.interpolate: {other!r} is no arm that is trained",
            )
