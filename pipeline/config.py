"""The settings of each script. The docstring under a field is its help text."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from pipeline.errors import ConfigError

KINDS = ("domain", "general", "other")
"""The three kinds of held-out text."""


@dataclass
class CorpusConfig:
    """Where documents come from and how they become token sequences."""

    path: str
    """File, directory or glob (JSONL, also .gz and .zst; Parquet; plain text), or a hub name."""
    text_column: str = "text"
    """The column that holds each document's text."""
    messages_column: str | None = None
    """A column of chat messages instead, rendered through the tokenizer's chat template."""
    split: str = "train"
    """The split of a hub dataset; files have only one."""
    skip: int = 0
    """Leave out that many documents at the start."""
    limit: int | None = None
    """Use at most that many documents."""


@dataclass
class DumpConfig:
    """Stage one: the base model reads a general corpus once; its top-k go to disk."""

    model: str
    """The base model: a Hugging Face directory or hub name."""
    corpus: CorpusConfig
    """The general corpus."""
    output: str
    """The dump's directory, local or s3://… An unfinished dump there is gone on with."""
    revision: str | None = None
    """The hub revision of the model."""
    k: int = 64
    """Entries kept at each position. 0 with samples above 0 stores samples alone."""
    samples: int = 0
    """Ids drawn at each position from what the k entries leave: the student then learns from all of
    the teacher's distribution, without bias but with the draws' noise. 50 alone, or 32 beside k."""
    sample_seed: int = 0
    """Decides which ids are drawn."""
    min_prob: float = 0.0
    """Keep only entries of at least that probability, and the best one; the others' mass goes to
    the tail. 0 keeps all k."""
    top_p: float = 1.0
    """Keep only as many entries as hold that much of the mass; the others' goes to the tail."""
    step: float = 1 / 16
    """Grid of the stored log-probabilities in nats; 1/16 costs about 7e-5 nats of KL."""
    codec: Literal["v1", "v2"] = "v1"
    """v2: ids coded from their context, 0.64 of v1's bytes; but a shard is held in memory, takes
    some 30 microseconds of CPU for each token in a thread of its own, and decodes several times
    slower."""
    max_length: int = 2048
    """Longest sequence in tokens; longer documents are cut into chunks."""
    add_eos: bool = True
    """End each document with the tokenizer's end-of-text token, where it has one."""
    temperature: float = 1.0
    """Only 1 is possible: a top-k cache taken at 1 does not determine another temperature."""
    partitions: int = 1
    """Retry units that can run on different machines."""
    shard_tokens: int = 1_000_000
    """A shard is committed at the first document end after that many tokens."""
    dtype: str = "auto"
    """Weights' dtype: auto (the model's own), bfloat16, float16, float32."""
    engine: Literal["vllm", "transformers"] = "vllm"
    """vllm, or transformers as the slow reference."""
    engine_args: dict[str, Any] = field(default_factory=dict)
    """Passed to vLLM's engine as they are, e.g. {tensor_parallel_size: 2}."""
    in_flight: int = 256
    """Sequences handed to the engine at a time."""
    workers: int = 1
    """Engines at a time, each a process with its own GPUs and its own partition."""

    def __post_init__(self) -> None:
        require_temperature_one(self.temperature)
        require(0 < self.step < 8, f"step: a grid in nats between 0 and 8, found {self.step}")
        for name in ("partitions", "shard_tokens", "in_flight", "workers"):
            value = getattr(self, name)
            require(value >= 1, f"{name}: at least 1, found {value}")
        require(self.samples >= 0, f"samples: at least 0, found {self.samples}")
        least = 0 if self.samples else 1
        require(self.k >= least, f"k: at least {least}, found {self.k}; 0 only beside samples")
        require(0 <= self.min_prob < 1, f"min_prob: from 0 to under 1, found {self.min_prob}")
        require(0 < self.top_p <= 1, f"top_p: above 0, at most 1, found {self.top_p}")
        entries = self.k + self.samples
        require(entries <= 65535, f"k and samples: together at most 65535, found {entries}")
        require(
            not self.samples or (self.min_prob == 0 and self.top_p == 1),
            "samples: they are drawn from what the k entries leave, so min_prob and top_p cannot "
            "take entries away afterwards. Leave those out, and set a smaller k",
        )
        require(self.max_length >= 2, f"max_length: at least 2 tokens, found {self.max_length}")


@dataclass
class GenerateConfig:
    """The base model writes the general corpus, where its own training data is not to be had."""

    model: str
    """The base model: a Hugging Face directory or hub name."""
    output: str
    """Directory of JSONL files, local or s3://… An unfinished corpus there is gone on with."""
    tokens: int
    """Tokens to write, at least."""
    revision: str | None = None
    """The hub revision of the model."""
    prompts: CorpusConfig | None = None
    """Texts whose beginnings start the documents, in turn; without them the end-of-text token."""
    prompt_tokens: int = 16
    """Tokens taken of each prompt."""
    seed: int = 0
    """Decides every sampled token, together with the engine's own rounding."""
    temperature: float = 1.0
    """Of the sampling; 1 is the model's own distribution."""
    top_p: float = 1.0
    """Sample from the most probable tokens that hold this mass."""
    max_length: int = 1024
    """Longest document in tokens, prompt included."""
    min_length: int = 16
    """Shorter documents are dropped."""
    max_repetition: float = 0.5
    """Documents are dropped of which more than this share of 8-token windows stood before."""
    batch: int = 256
    """Documents written at a time; each batch is one file."""
    dtype: str = "auto"
    """Weights' dtype: auto (the model's own), bfloat16, float16, float32."""
    engine_args: dict[str, Any] = field(default_factory=dict)
    """Passed to vLLM's engine as they are."""

    def __post_init__(self) -> None:
        for name in ("tokens", "batch", "prompt_tokens"):
            value = getattr(self, name)
            require(value >= 1, f"{name}: at least 1, found {value}")
        require(self.temperature > 0, f"temperature: above 0, found {self.temperature}")
        require(0 < self.top_p <= 1, f"top_p: above 0 and up to 1, found {self.top_p}")
        require(
            self.max_length > self.prompt_tokens,
            f"max_length {self.max_length}: must be above prompt_tokens, {self.prompt_tokens}",
        )


@dataclass
class LossConfig:
    """CE on the domain + alpha · KL on the general corpus, each a mean over the step's tokens."""

    direction: Literal["forward", "reverse"] = "forward"
    """forward: KL(base ‖ student); reverse: KL(student ‖ base)."""
    alpha: float = 1.0
    """Weight of the KL."""
    targets: Literal["auto", "topk"] = "auto"
    """auto: what the dump holds, samples of the tail included; topk: leave those out."""
    temperature: float = 1.0
    """Only 1 is possible: a top-k cache taken at 1 does not determine another temperature."""


@dataclass
class NullTestConfig:
    """Before the first step: the KL of a student that still is the teacher must be near zero."""

    batches: int = 2
    """General batches to measure; 0 leaves the test out."""
    bound: float = 0.02
    """Largest mean KL in nats. The two engines differ by up to 1e-4, the codec adds 6e-5."""


@dataclass
class HeldOutConfig:
    """What the student is measured on during training. Each name may be
    training.metric_for_best_model."""

    domain: CorpusConfig | None = None
    """Reported as eval_domain_perplexity."""
    general: CorpusConfig | None = None
    """Reported as eval_general_perplexity."""
    other: CorpusConfig | None = None
    """General text of another source than the dump's: is only what the student was held to kept?
    Reported as eval_other_perplexity."""
    sequences: int | None = None
    """Use at most that many sequences of each of these, evenly spread over it."""
    dump: str | None = None
    """A dump of held-out general text by the same base model. The mean KL to it, in loss.direction
    and nats per token, is reported as eval_general_kl."""
    dump_limit: int | None = None
    """Use at most that many rows of it, its first ones."""


@dataclass
class TrainConfig:
    """Stage two: train a student on a domain while a dump holds it to the base model."""

    model: str
    """The student to start from: a Hugging Face directory or hub name, usually the base model."""
    domain: CorpusConfig
    """The domain corpus."""
    output: str
    """Directory for checkpoints, metrics.jsonl and the final model (in model/). An unfinished run
    there is gone on with."""
    dump: str | dict[str, float] | None = None
    """The dump of stage one, local or s3://… or several with their weights, {dump: 3, other: 1}.
    Only needed where mix is above 0."""
    revision: str | None = None
    """The hub revision of the model."""
    dtype: Literal["float32", "bfloat16", "auto"] = "float32"
    """Trained weights. float32 with training.bf16 is the usual choice; the final model is saved in
    the dtype that the student came in."""
    loss: LossConfig = field(default_factory=LossConfig)
    mix: float = 1.0
    """General sequences per domain sequence; 0 trains on the domain alone."""
    mix_by: Literal["sequences", "tokens"] = "sequences"
    """What mix counts: with tokens it is general tokens per domain token."""
    row_tokens: int | None = None
    """Tokens that go through the model at a time: a batch with more is cut into packed rows. The
    whole batch by default. Bounds memory; what is learnt does not depend on it."""
    max_length: int | None = None
    """Longest domain sequence in tokens; the dump's max_length by default."""
    lora: dict[str, Any] | None = None
    """Passed to peft.LoraConfig as it is, e.g. {r: 64, target_modules: all-linear}."""
    gradient_cosine_steps: int = 0
    """Every so many steps, log the norms of the gradients of CE and of alpha · KL and the cosine
    between them. It costs one more forward and backward, and memory for one more set of gradients;
    0 leaves it out."""
    null_test: NullTestConfig = field(default_factory=NullTestConfig)
    held_out: HeldOutConfig = field(default_factory=HeldOutConfig)
    """Text for the perplexities during training, and a dump for the KL; training.eval_steps and so
    on say when."""
    training: dict[str, Any] = field(default_factory=dict)
    """Passed to transformers.TrainingArguments as it is. A batch counts domain sequences; each
    brings its general ones along."""

    def __post_init__(self) -> None:
        require_temperature_one(self.loss.temperature)
        require(self.loss.alpha >= 0, f"loss.alpha: at least 0, found {self.loss.alpha}")
        require(self.mix >= 0, f"mix: at least 0, found {self.mix}")
        if isinstance(self.dump, dict):
            require(
                bool(self.dump) and all(weight > 0 for weight in self.dump.values()),
                f"dump: each of several dumps needs a weight above 0, found {self.dump}",
            )
        require(
            self.row_tokens is None or self.row_tokens > 0,
            f"row_tokens: at least 1, found {self.row_tokens}",
        )
        require(
            self.held_out.dump_limit is None or self.held_out.dump_limit > 0,
            f"held_out.dump_limit: at least 1, found {self.held_out.dump_limit}",
        )
        require(
            self.gradient_cosine_steps >= 0,
            f"gradient_cosine_steps: at least 0, found {self.gradient_cosine_steps}",
        )
        require(
            self.dump is not None or self.mix == 0,
            "dump: the directory that stage one wrote; only mix: 0 trains without one",
        )
        require(
            (self.dump is not None and self.mix > 0) or self.max_length is not None,
            "max_length: needed where no dump is read to take it from",
        )


@dataclass
class EvalConfig:
    """Compare models with their base on held-out text."""

    models: dict[str, str]
    """Name and directory (or hub name) of each model, the base among them."""
    domain: CorpusConfig | None = None
    """Held-out domain text."""
    general: CorpusConfig | None = None
    """Held-out general text."""
    other: CorpusConfig | None = None
    """General text of another source than the dump's: is only what the students were held to kept?
    """
    base: str = "base"
    """The name of the model that the others are compared with."""
    output: str | None = None
    """A JSON file for the results."""
    max_length: int = 2048
    """Longest sequence in tokens; longer documents are cut into chunks."""
    add_eos: bool = True
    """End each document with the tokenizer's end-of-text token, where it has one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Weights' dtype; auto is each model's own. Softmax is always float32."""
    batch_tokens: int = 2048
    """Tokens that go through a model at a time."""
    sequences: int | None = None
    """Use at most that many sequences of each text, evenly spread over it."""
    tail_k: int = 64
    """The tail measures look outside the base's that many most probable tokens."""

    def __post_init__(self) -> None:
        require(
            self.base in self.models,
            f"base {self.base!r}: one of the models is meant ({', '.join(self.models)})",
        )
        require(
            any(of is not None for of in (self.domain, self.general, self.other)),
            "nothing to evaluate on: give domain.path, general.path or other.path",
        )
        require(self.max_length >= 2, f"max_length: at least 2 tokens, found {self.max_length}")


def held_out_texts(of: HeldOutConfig | EvalConfig) -> list[tuple[str, CorpusConfig]]:
    """Those that are given, by kind."""
    given = [(kind, getattr(of, kind)) for kind in KINDS]
    return [(kind, corpus) for kind, corpus in given if corpus is not None]


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def require_temperature_one(temperature: float) -> None:
    require(
        math.isclose(temperature, 1.0),
        f"temperature {temperature}: only 1 is possible. Top-k probabilities taken at 1 do not "
        "determine the distribution at another: most of its mass would lie outside the "
        "stored ids. Set temperature to 1, or leave it out.",
    )
