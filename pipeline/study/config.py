"""The settings of a study: arms × learning rates × seeds."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from pipeline.config import (
    MOST,
    SEED,
    CorpusConfig,
    Count,
    HeldOutConfig,
    Length,
    Limit,
    TaskConfig,
    check_names,
    require,
)
from pipeline.errors import ConfigError
from pipeline.ranges import Range, check_ranges
from pipeline.study.train_settings import check_train, flat, merged, refuse_two_places
from pipeline.types import Json


@dataclass
class ArmConfig:
    """One way to train, compared with the others over the same seeds."""

    targets: Literal["stored", "labels", "live", "renormalised"] = "stored"
    """What the general text teaches. stored: the dump's top-k and tail. The others are controls.
    labels: its own next tokens (cross-entropy on both). live: the full distributions of a base
    model in memory. renormalised: the dump's top-k without the tail."""
    dump: str | None = None
    """Name of one of the study's dumps; the first by default."""
    k: Limit = None
    """Use only this many of the stored entries. The mass of the others goes to the tail."""
    domain: bool = True
    """false trains on the general text alone."""
    train: dict[str, Any] = field(default_factory=dict)
    """Settings of scripts/train_student.py that override the study's, e.g. {loss: {alpha: 0.5}}.
    The study itself sets output, training.seed and training.learning_rate (seeds, learning_rates),
    and dump where it has dumps."""
    interpolate: str | None = None
    """Do not train: interpolate the weights of the base and of that arm's student."""
    weight: Annotated[float, Range(0, 1)] = 0.5
    """Weight of that student in the interpolation."""
    seeds: Annotated[list[int] | None, SEED] = None
    """Seeds to use instead of the study's."""
    learning_rates: Annotated[list[float] | None, Range(0)] = None
    """Learning rates to use instead of the study's."""


def idle(arm: ArmConfig, train: Json) -> Iterator[tuple[str, str]]:
    """(setting, what to do) of each setting of an arm that would change nothing.

    `train` are the arm's own over the study's.
    """
    whole: Json = {"targets": "stored", "dump": None, "k": None, "domain": True, "train": {}}
    given = [name for name, absent in whole.items() if getattr(arm, name) != absent]
    loss = [f"train.{name}" for name, _ in flat(arm.train) if name.startswith("loss.")]
    general = [name for name in given if name != "train"] + loss
    k = [name for name in given if name == "k"]
    if arm.interpolate is not None:
        rules = [(given, "the arm interpolates and is not trained; leave it out")]
    else:
        weight = ["weight"] * (arm.weight != ArmConfig.weight)
        rules = [(weight, "weighs an interpolation; set interpolate, or leave it out")]
        if train.get("mix", 1) == 0:
            rules += [(general, "mix: 0 reads no general text; set a mix above 0, or leave it out")]
        elif arm.targets == "labels":
            cosine = ["train.gradient_cosine_steps"] * bool(train.get("gradient_cosine_steps"))
            rules += [
                (k, "labels use no stored entries; leave it out, or set targets: stored"),
                (loss, "labels have cross-entropy alone and no KL; leave it out"),
                (cosine, "labels have no KL whose gradient could be compared; set 0 in this arm"),
            ]
        elif arm.targets == "live":
            stored = [*k, *(name for name in loss if name == "train.loss.targets")]
            rules += [(stored, "live uses no stored entries; leave it out, or set targets: stored")]
    for names, instead in rules:
        yield from ((name, instead) for name in names)


def check_list(name: str, values: list[int] | list[float] | None) -> None:
    """ConfigError for seeds or rates that are none, or two of which would name one run."""
    require(values != [], f"{name}: expected at least one, found none")
    names = [f"{value:g}" if isinstance(value, float) else str(value) for value in values or []]
    for at, one in enumerate(names):
        require(
            one not in names[:at],
            f"{name}: {one} is there twice, as a run's name has it; leave one of them out",
        )


@dataclass
class MeasureConfig:
    """How each student is measured on the held-out text."""

    tail_k: Count = 64
    """The tail measures look outside this many most probable tokens of the base."""
    dtype: Literal["auto", "float32", "bfloat16"] = "float32"
    """Dtype of the weights while measuring."""
    batch_tokens: Count = 2048
    """Tokens that go through a model at a time."""
    curve_steps: Annotated[int, Range(0, MOST)] = 0
    """Measure perplexities during training every so many steps. 0 turns it off."""
    curve_sequences: Count = 50
    """Use at most this many sequences of each text for those."""


@dataclass
class StudyConfig:
    """Arms × learning rates × seeds. Finished runs are kept."""

    common: ClassVar = (
        "held_out.domain", "held_out.general", "held_out.sequences", "dumps", "seeds",
        "learning_rates", "max_length", "train", "training", "tasks", "only",
    )  # fmt: skip

    model: str
    """The base model: a Hugging Face directory or hub name."""
    domain: CorpusConfig
    """The domain corpus."""
    general: CorpusConfig
    """The general corpus, which the study's dumps are made from."""
    held_out: HeldOutConfig
    """Text to measure on, which no arm trains on; at most held_out.sequences of each."""
    output: str
    """Directory for dumps/, runs/ARM-lrRATE-seedSEED/, results.json and table.md."""
    arms: dict[str, ArmConfig]
    """The arms by name, e.g. {mol: {}, ce: {train: {mix: 0}}}. The base is always measured."""
    dumps: dict[str, str | dict[str, Any]] = field(default_factory=dict)
    """The dumps by name: the path of one, or settings of scripts/dump_logits.py to make one, e.g.
    {main: {k: 64}}. The study sets their output."""
    seeds: Annotated[list[int], SEED] = field(default_factory=lambda: [0, 1, 2])
    """Each decides the order of the sequences and the random numbers."""
    learning_rates: Annotated[list[float], Range(0)] = field(default_factory=lambda: [1e-4])
    """Every arm runs at each."""
    max_length: Length = 2048
    """Longest sequence in tokens."""
    train: dict[str, Any] = field(default_factory=dict)
    """Settings of scripts/train_student.py for all arms. The study itself sets output,
    training.seed and training.learning_rate (seeds, learning_rates), and dump where it has
    dumps."""
    training: dict[str, Any] = field(default_factory=dict)
    """transformers.TrainingArguments for all arms, but seed and learning_rate: set seeds and
    learning_rates."""
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    tasks: dict[str, TaskConfig] = field(default_factory=dict)
    """Questions to answer, by a name for each task, e.g. {capitals: {path: capitals.jsonl}}. Shows
    which of the base's right answers each student has kept. Tasks can be added to a finished
    study, whose students then answer them."""
    only: list[str] | None = None
    """Run only these arms now. The results hold every finished run."""

    def __post_init__(self) -> None:
        check_ranges(self)
        check_names("arms and dumps", [*self.arms, *self.dumps])
        check_names("tasks", self.tasks)
        held = self.held_out
        require(
            held.domain is not None and held.general is not None,
            "held_out: both held_out.domain.path and held_out.general.path are needed",
        )
        check_list("seeds", self.seeds)
        check_list("learning_rates", self.learning_rates)
        for name, arm in self.arms.items():
            check_list(f"arms.{name}.seeds", arm.seeds)
            check_list(f"arms.{name}.learning_rates", arm.learning_rates)
        for name in self.only or []:
            require(
                name in self.arms, f"only: {name!r} is not one of {', '.join(map(str, self.arms))}"
            )
        self.refuse_overridden()
        for name, arm in self.arms.items():
            for setting, instead in idle(arm, merged(self.train, arm.train)):
                raise ConfigError(f"arms.{name}.{setting}: has no effect: {instead}")
            require(
                arm.dump is None or arm.dump in self.dumps,
                f"arms.{name}.dump: {arm.dump!r} is not one of {', '.join(self.dumps)}",
            )
            other = arm.interpolate
            require(
                other is None or (other in self.arms and not self.arms[other].interpolate),
                f"arms.{name}.interpolate: {other!r} is not an arm that is trained",
            )

    def refuse_overridden(self) -> None:
        """ConfigError for settings of runs and dumps that the study would override."""
        check_train({"training": self.training}, "")
        check_train(self.train, "train.", bool(self.dumps))
        refuse_two_places(self.train, self.training)
        for name, arm in self.arms.items():
            check_train(arm.train, f"arms.{name}.train.", bool(self.dumps))
        for name, dump in self.dumps.items():
            require(
                isinstance(dump, str) or "output" not in dump,
                f"dumps.{name}.output: the study makes it in dumps/ of its own output. For a dump "
                f"that exists, give its path instead: dumps: {{{name}: PATH}}",
            )
