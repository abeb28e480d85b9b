"""The settings of each script.

The docstring under a field is its help text. `common` names the settings that `--help` shows
before the expert ones; those without a default come first anyway.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from pipeline.engine_args import check_engine_args
from pipeline.errors import ConfigError
from pipeline.ranges import Range, check, check_ranges

MOST = (1 << 31) - 1  # tokens, documents, steps
Count = Annotated[int, Range(1, MOST)]
Limit = Annotated[int | None, Range(1, MOST)]
Seed = Annotated[int, Range(-(1 << 63), (1 << 63) - 1)]
Length = Annotated[int, Range(2, MOST)]  # of a sequence in tokens: one token predicts nothing
Targets = Literal["all", "assistant", "completion"]
KINDS_OF_COLUMNS = ("messages_column", "prompt_column", "tokens_column")
KINDS = ("domain", "general", "other")
"""The three kinds of held-out text."""


@dataclass
class CorpusConfig:
    """Where documents come from and how they become token sequences."""

    path: str
    """File, directory or glob (JSONL, also .gz and .zst; Parquet; Arrow; plain text), a folder of
    save_to_disk, or a hub name. A directory is read with its subdirectories, in the order of the
    names. It and a glob leave out names that begin with . or _, README, LICENSE and COPYING; other
    kinds of files are left out of a directory, too. Columns that are not asked for are not read,
    and nothing is converted."""
    text_column: str = "text"
    """Column with the text of each document. The column id, if there is one, names it."""
    messages_column: str | None = None
    """Column of chat messages to use instead; the tokenizer's chat template renders them. A
    template that asks for today's date gets 2024-07-26, so that rows do not depend on the day."""
    prompt_column: str | None = None
    """Column of prompts to use instead, with completion_column: text, or lists of messages. They
    are one document, and what is learnt is the completion."""
    completion_column: str | None = None
    """Column of the completions of prompt_column."""
    tokens_column: str | None = None
    """Column of token ids to use instead, such as input_ids. They are used as they are: no token is
    added, and no template."""
    mask_column: str | None = None
    """Column that says which tokens of tokens_column are learnt: 0 or 1 for each token, or labels
    with -100 for those that are not, in a column with label in its name. By default loss_mask, or
    labels, where the corpus has one of them. For documents that are padded it can be
    attention_mask."""
    special_tokens: Literal["parse", "split"] = "parse"
    """Special tokens that a document spells, such as <|endoftext|> in a web page. parse makes them
    tokens, as transformers and vLLM do: text that holds rendered chats needs it. split takes them
    as text, so that no document can end a sequence or forge a turn: use it for text from anyone. In
    chats the template's own special tokens stay. Tokens that the tokenizer adds but does not call
    special, such as <think>, are tokens in any case."""
    targets: Targets | None = None
    """Which tokens are learnt; the others are read as context. By default all, or those of the mask
    of a token corpus, or the completions of prompts; all ignores these. assistant: what the
    assistant writes in chats, each turn with the token that ends it. The template's generation
    markers say where that is, or else rendering the chat turn by turn. completion: what follows the
    prompt, with the token that ends it."""
    split: str = "train"
    """Split of a hub dataset, or of a directory whose files have train, validation or test as the
    first or last word of their names: test-00000-of-00002.parquet, wiki_train.jsonl. Of text files
    it must be the whole name, or that of their folder."""
    skip: Annotated[int, Range(0, MOST)] = 0
    """Number of documents to skip at the start."""
    limit: Limit = None
    """Use at most this many documents."""
    reread: bool = False
    """Read the files whole to know their content again. By default, 16 MiB and more are taken to be
    the same where place, size, inode, times and a sample of the bytes are."""

    def __post_init__(self) -> None:
        given = [name for name in KINDS_OF_COLUMNS if getattr(self, name) is not None]
        tokens = self.tokens_column is not None
        for fits, message in [
            (len(given) < 2, f"{' and '.join(given)}: documents are either, so leave one out"),
            (
                tokens or self.mask_column is None,
                "mask_column: it masks token ids, so set tokens_column, too",
            ),
            (
                not tokens or self.targets in (None, "all"),
                f"targets {self.targets}: token ids do not say which are theirs. Name a "
                "mask_column",
            ),
            (
                (self.prompt_column is None) == (self.completion_column is None),
                "prompt_column and completion_column: documents need both",
            ),
            (
                self.targets != "completion" or self.prompt_column is not None,
                "targets completion: needs prompt_column and completion_column, what is given and "
                "what is learnt",
            ),
            (
                self.targets != "assistant" or bool(given),
                "targets assistant: only chats have an assistant. Name the column of their "
                "messages with messages_column",
            ),
        ]:
            require(fits, f"corpus {self.path}: {message}")


@dataclass
class DumpConfig:
    """Stage one: the base model reads a general corpus once, and its top-k go to disk."""

    common: ClassVar = (
        "k", "samples", "positions", "max_length", "codec", "partitions", "workers", "engine_args",
        "corpus.text_column", "corpus.messages_column", "corpus.tokens_column", "corpus.targets",
        "corpus.limit",
    )  # fmt: skip

    model: str
    """The base model: a Hugging Face directory or hub name."""
    corpus: CorpusConfig
    """The general corpus."""
    output: str
    """Directory of the dump, local or s3://… An unfinished dump there is resumed."""
    revision: str | None = None
    """Hub revision of the model."""
    k: Annotated[int, Range(0, 65535)] = 64
    """Entries kept at each position. 0 together with samples stores samples alone."""
    samples: Annotated[int, Range(0, 65535)] = 0
    """Ids drawn at each position from the tail, which is what the k entries leave. The student then
    learns from the teacher's whole distribution: without bias, but with the noise of the draws.
    Usual are 50 alone, or 32 beside k."""
    sample_seed: Seed = 0
    """Seed of the draws."""
    min_prob: Annotated[float | None, Range(0, below=1)] = None
    """Keep only entries of at least this probability, and the best one. The mass of the others goes
    to the tail. By default 0.0003, but 0 with samples or top_p. 0 keeps all k."""
    top_p: Annotated[float, Range(above=0, most=1)] = 1.0
    """Keep only as many entries as hold this mass. The mass of the others goes to the tail."""
    positions: Annotated[float, Range(above=0, most=1)] = 1.0
    """Keep each target with this probability, by chance, e.g. 0.2 for a fifth of them. A fifth of
    the bytes and of the head's work then teach the student without bias, but with more noise per
    document. Use it to read more documents for the same disk, or to save the head of a model with a
    large vocabulary. The body reads every token in any case."""
    positions_seed: Seed = 0
    """Seed of that draw. Another one keeps other targets of the same documents."""
    step: Annotated[float | None, Range(above=0, below=8)] = None
    """Grid of the stored probabilities. v3: steps between square roots of probabilities, at most
    0.05; by default 1/125 with a min_prob of 0.0003 or more, which costs about 4e-4 nats of KL and
    teaches the same, and 1/416 with a smaller one or none, about 6e-5 nats. v1 and v2: nats between
    log-probabilities, by default 1/16, about 7e-5 nats of KL."""
    codec: Literal["v1", "v2", "v3"] | None = None
    """How distributions are coded; by default v3, or as in the dump that is resumed. v1 takes about
    twice the bytes of v3, and is read twice as fast. v2 takes more bytes than v3 and holds a shard
    in memory."""
    max_length: Length = 2048
    """Longest sequence in tokens. Longer documents are cut into chunks."""
    add_eos: bool = True
    """End each document with the tokenizer's end-of-text token, where it has one."""
    partitions: Annotated[int, Range(1, 100_000)] = 1
    """Number of parts that can be dumped and retried separately, also on different machines."""
    shard_tokens: Count = 1_000_000
    """A shard is committed at the first document end after this many tokens. Where only some are
    learnt, those count."""
    dtype: str = "auto"
    """Dtype of the weights: auto (the model's own), bfloat16, float16 or float32."""
    engine: Literal["vllm", "transformers"] = "vllm"
    """transformers is a slow reference."""
    engine_args: dict[str, Any] = field(default_factory=dict)
    """Passed to vLLM's engine unchanged, e.g. {tensor_parallel_size: 2}."""
    in_flight: Count = 256
    """Number of sequences that the engine works on at a time."""
    workers: Annotated[int, Range(1, 1024)] = 1
    """Number of engines that run at a time, each a process with its own GPUs and partition."""

    def __post_init__(self) -> None:
        check_ranges(self)
        least = 0 if self.samples else 1
        require(self.k >= least, f"k: at least {least}, found {self.k}; 0 needs samples above 0")
        entries = self.k + self.samples
        require(entries <= 65535, f"k and samples: together at most 65535, found {entries}")
        require(
            not self.samples or (not self.min_prob and self.top_p == 1),
            "samples: they are drawn from what the k entries leave, so min_prob and top_p cannot "
            "take entries away afterwards. Leave those out, and set a smaller k",
        )
        coarse = self.step is not None and not 1 / 65535 <= self.step <= 0.05
        require(
            self.codec != "v3" or not coarse,
            f"step {self.step}: with codec v3 it is a step of the square root of a probability, "
            "from 1/65535 to 0.05; leave it out for the default",
        )
        check_engine_args(self.engine_args)


@dataclass
class GenerateConfig:
    """The base model writes a general corpus, where its own training data cannot be had."""

    common: ClassVar = ("tokens", "prompts", "replies", "seed", "max_length", "engine_args")

    model: str
    """The base model: a Hugging Face directory or hub name."""
    output: str
    """Directory of JSONL files, local or s3://… An unfinished corpus there is resumed."""
    tokens: Annotated[int | None, Range(1, 1 << 53)] = None
    """Write at least this many tokens. With replies it can be left out: each prompt is answered
    once."""
    revision: str | None = None
    """Hub revision of the model."""
    prompts: CorpusConfig | None = None
    """Texts whose beginnings start the documents, in turn. Without them each document starts with
    the end-of-text token. Chats (prompts.messages_column, prompts.prompt_column) are answered."""
    prompt_tokens: Count = 16
    """Tokens taken from each text. Chats stay whole; one that leaves no room for an answer under
    max_length is left out."""
    replies: Literal["all", "last"] | None = None
    """Which turns of the assistant the base answers anew. all, for chats the default: each one, and
    an answer takes the place of the old one in what follows. last: only the last one, with the
    others as they are. A chat that ends with a user's turn gets its answer. With prompts of text
    (prompts.text_column), each text is a user's turn."""
    seed: Seed = 0
    """Seed of every sampled token. The engine's rounding has an influence too."""
    temperature: Annotated[float, Range(above=0, most=100)] = 1.0
    """Temperature of the sampling. 1 is the model's own distribution."""
    top_p: Annotated[float, Range(above=0, most=1)] = 1.0
    """Sample from the most probable tokens that hold this mass."""
    max_length: Length = 1024
    """Longest document in tokens, its prompt included."""
    min_length: Annotated[int, Range(0, MOST)] = 16
    """Drop documents with fewer tokens."""
    max_repetition: Annotated[float, Range(0, 1)] = 0.5
    """Drop documents in which more than this share of the 8-token windows repeat earlier ones."""
    batch: Count = 256
    """Documents written at a time. Each batch is one file."""
    dtype: str = "auto"
    """Dtype of the weights: auto (the model's own), bfloat16, float16 or float32."""
    engine_args: dict[str, Any] = field(default_factory=dict)
    """Passed to vLLM's engine unchanged."""

    def __post_init__(self) -> None:
        check_ranges(self)
        given = self.prompts
        are_chats = given is not None and (given.messages_column or given.prompt_column) is not None
        if self.replies is None and are_chats:
            self.replies = "all"
        require(
            self.replies is None or (given is not None and given.tokens_column is None),
            f"replies {self.replies}: chats or texts of users are answered, so set prompts.path",
        )
        require(
            self.tokens is not None or self.replies is not None,
            "tokens: say how many to write; only with replies each prompt is answered once",
        )
        require(
            self.replies is not None or self.max_length > self.prompt_tokens,
            f"max_length {self.max_length}: must be above prompt_tokens, {self.prompt_tokens}",
        )
        check_engine_args(self.engine_args)


@dataclass
class LossConfig:
    """The loss: CE on the domain + alpha · KL on the general corpus, each a mean over the targets
    of a step."""

    direction: Literal["forward", "reverse"] = "forward"
    """forward: KL(base ‖ student). reverse: KL(student ‖ base)."""
    alpha: Annotated[float, Range(0)] = 1.0
    """Weight of the KL."""
    targets: Literal["auto", "topk"] = "auto"
    """auto: everything that the dump holds, samples of the tail included. topk: without samples."""


@dataclass
class NullTestConfig:
    """The null test: before the first step, a student with the teacher's weights must have a KL
    near zero."""

    batches: Annotated[int, Range(0, MOST)] = 2
    """Number of general batches to measure. 0 skips the test."""
    bound: Annotated[float | None, Range(above=0)] = None
    """Largest mean KL in nats of a dump that is the same model's. By default it follows from the
    dtypes and the grid of the dump: 5.2e-4 in float32 at a step of 1/16, 2.3e-3 where one side
    computes in bfloat16."""
    accept_different: bool = False
    """Train also where the two engines compute the model differently: beyond rounding, but not as
    far as another model. The log, summary.json and the report say so."""


@dataclass
class HeldOutConfig:
    """Text that the student is measured on during training. Each measure can be
    training.metric_for_best_model."""

    domain: CorpusConfig | None = None
    """Held-out domain text, e.g. --held_out.domain.path test.jsonl; reported as
    eval_domain_perplexity."""
    general: CorpusConfig | None = None
    """Held-out general text; reported as eval_general_perplexity."""
    other: CorpusConfig | None = None
    """General text from another source than the dump's; reported as eval_other_perplexity. Shows
    whether the student also keeps text it was never trained to keep."""
    sequences: Limit = None
    """Use at most this many sequences of each text, evenly spread over it."""
    dump: str | None = None
    """A dump of held-out general text by the same base model. The mean KL to it, in loss.direction
    and nats per token, is reported as eval_general_kl."""
    dump_limit: Limit = None
    """Use only the first rows of it, at most this many."""


@dataclass
class TrainConfig:
    """Stage two: train a student on a domain while a dump keeps it close to the base model."""

    common: ClassVar = (
        "dump", "loss.alpha", "loss.direction", "training", "lora", "max_length", "row_tokens",
        "domain.text_column", "domain.messages_column", "domain.targets", "domain.limit",
        "held_out.domain", "held_out.general",
    )  # fmt: skip

    model: str
    """The student to start from: a Hugging Face directory or hub name, usually the base model."""
    domain: CorpusConfig
    """The domain corpus."""
    output: str
    """Directory for checkpoints, metrics.jsonl and the final model (in model/). An unfinished run
    there is resumed."""
    dump: Annotated[str | dict[str, float] | None, Range(above=0)] = None
    """The dump of stage one, local or s3://…, or several with their weights, e.g. {one: 3, two: 1}.
    Needed unless mix is 0."""
    revision: str | None = None
    """Hub revision of the model."""
    dtype: Literal["float32", "bfloat16", "auto"] = "float32"
    """Dtype of the trained weights. float32 with training.bf16 is the usual choice. The final model
    is saved in the dtype of the model that the run started from."""
    loss: LossConfig = field(default_factory=LossConfig)
    mix: Annotated[float, Range(0, MOST)] = 1.0
    """General sequences per domain sequence. 0 trains on the domain alone."""
    mix_by: Literal["sequences", "tokens"] = "sequences"
    """What mix counts. With tokens, mix is general targets per domain target, on average over the
    corpora: all tokens of a sequence without a mask, and the learnt ones of a sequence with one."""
    row_tokens: Limit = None
    """Largest number of tokens that go through the model at a time: a larger batch is cut into
    packed rows. By default a row holds the whole batch. Limits memory and does not change what is
    learnt."""
    max_length: Annotated[int | None, Range(2, MOST)] = None
    """Longest domain sequence in tokens. By default the max_length of the dump."""
    lora: dict[str, Any] | None = None
    """Passed to peft.LoraConfig unchanged, e.g. {r: 64, target_modules: all-linear}."""
    quantization: dict[str, Any] | None = None
    """Quantise the weights of the model while it is loaded, and train the adapters of lora on them
    (QLoRA). Passed to transformers unchanged, e.g. {load_in_4bit: true, bnb_4bit_quant_type: nf4,
    bnb_4bit_compute_dtype: bfloat16, bnb_4bit_use_double_quant: true} to BitsAndBytesConfig, which
    needs mol-distill[qlora]. quant_method names another method."""
    gradient_cosine_steps: Annotated[int, Range(0, MOST)] = 0
    """Every so many steps, log the norms of the gradients of CE and of alpha · KL, and the cosine
    between them. Costs one more forward and backward, and memory for one more set of gradients.
    0 turns it off."""
    null_test: NullTestConfig = field(default_factory=NullTestConfig)
    held_out: HeldOutConfig = field(default_factory=HeldOutConfig)
    """Text for the perplexities during training, and a dump for the KL. training.eval_steps and
    similar arguments say when."""
    training: dict[str, Any] = field(default_factory=dict)
    """Passed to transformers.TrainingArguments unchanged, e.g. {learning_rate: 1.0e-5}. A batch
    counts domain sequences; their general ones are added to it."""

    def __post_init__(self) -> None:
        check_ranges(self)
        require(self.dump != {}, "dump: expected dumps with their weights, found none")
        require(
            self.quantization is None or self.lora is not None,
            "quantization: quantised weights are not trained themselves; add adapters, e.g. "
            "lora: {r: 64, target_modules: all-linear}, or leave it out",
        )
        for name, bounds in TRAINING.items():
            value = as_number(self.training.get(name))
            if value is not None:
                check(f"training.{name}", value, bounds)
        require(
            self.dump is not None or self.mix == 0,
            "dump: the directory that stage one wrote is needed; only mix: 0 trains without one",
        )
        require(
            (self.dump is not None and self.mix > 0) or self.max_length is not None,
            "max_length: needed where there is no dump to take it from",
        )


@dataclass
class TaskConfig:
    """Questions with known answers: a file of your own, or a task of lm-evaluation-harness. Both
    need mol-distill[tasks]."""

    path: str | None = None
    """JSONL file with a question in each line: {"question": "2 + 2 =", "options": ["3", "4"],
    "answer": 1}. The answer is the number of an option, from 0, or its text. Without options the
    model writes an answer, and `answer` is the right text, or a list of right texts."""
    harness: str | None = None
    """Name of a task or group of lm-evaluation-harness to use instead, e.g. arc_easy. Most read
    their questions from the hub."""
    folder: str | None = None
    """Folder with the YAML files of that task, where it is not the harness's own."""
    trust_code: bool = False
    """The YAML files of a folder can run code, so a folder needs true: it says that you trust
    it."""
    instructions: str = ""
    """Text before each question of a file."""
    prompt: str = "{question}"
    """Form of each question of a file, such as "Question: {question}\\nAnswer:". The answer follows
    after a space, or in a chat as the assistant's turn."""
    chat: bool = False
    """Render each question with the tokenizer's chat template."""
    shots: Annotated[int | None, Range(0, 1000)] = None
    """Answered questions to show before each one; none by default, or as a task of the harness
    says. Those of a file are drawn from its other questions."""
    max_tokens: Count = 32
    """Longest written answer to a question of a file, in tokens. It also ends with its line."""
    limit: Limit = None
    """Use only the first questions, at most this many."""
    metric: str | None = None
    """The score that says whether a question is answered: acc by default where there are options,
    else exact_match. acc_norm takes the option with the largest log-probability per character."""

    def __post_init__(self) -> None:
        require(
            (self.path is None) != (self.harness is None),
            "tasks: each needs either path, a JSONL file with questions, or harness, the name of a "
            "task",
        )
        require(
            self.folder is None or (self.harness is not None and self.trust_code),
            f"tasks: folder {self.folder}: the YAML files of a task can run code. Name the task "
            "with harness, and set trust_code: true if you trust the folder",
        )
        require(
            self.harness is None or (not self.instructions and self.prompt == "{question}"),
            "tasks: instructions and prompt are for files of questions; a task of the harness has "
            "its own",
        )
        require(
            "{question}" in self.prompt,
            f"tasks: prompt {self.prompt!r}: must have {{question}} where the question goes",
        )


@dataclass
class EvalConfig:
    """Compare models with their base on held-out text and on tasks."""

    common: ClassVar = (
        "domain", "general", "other", "tasks", "output", "max_length", "sequences", "batch_tokens",
    )  # fmt: skip

    models: dict[str, str]
    """Name and directory (or hub name) of each model, the base among them, e.g.
    {base: Qwen/Qwen3-8B-Base, student: runs/student/model}."""
    domain: CorpusConfig | None = None
    """Held-out domain text, e.g. --domain.path test.jsonl."""
    general: CorpusConfig | None = None
    """Held-out general text."""
    other: CorpusConfig | None = None
    """General text from another source than the dump's. Shows whether the students also keep text
    they were never trained to keep."""
    tasks: dict[str, TaskConfig] = field(default_factory=dict)
    """Questions to answer, by a name for each task, e.g. {capitals: {path: capitals.jsonl}}. Shows
    which of the base's right answers a model has kept."""
    base: str = "base"
    """Name of the model that the others are compared with."""
    output: str | None = None
    """JSON file for the results. The answers to the tasks are written beside it."""
    max_length: Length = 2048
    """Longest sequence in tokens. Longer documents are cut into chunks."""
    add_eos: bool = True
    """End each document with the tokenizer's end-of-text token, where it has one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the weights; auto is each model's own. Softmax is always float32."""
    batch_tokens: Count = 2048
    """Tokens that go through a model at a time."""
    sequences: Limit = None
    """Use at most this many sequences of each text, evenly spread over it."""
    tail_k: Count = 64
    """The tail measures look outside this many most probable tokens of the base."""

    def __post_init__(self) -> None:
        check_ranges(self)
        require(
            self.base in self.models,
            f"base {self.base!r}: must be one of the models ({', '.join(self.models)})",
        )
        require(
            bool(held_out_texts(self) or self.tasks),
            "nothing to evaluate on: give domain.path, general.path, other.path or tasks",
        )
        check_names("tasks", self.tasks)


SEED = Range(0, (1 << 32) - 1)  # what numpy takes
# Numbers of transformers.TrainingArguments, which checks few of them itself.
TRAINING = {
    "per_device_train_batch_size": Range(1, MOST),
    "per_device_eval_batch_size": Range(1, MOST),
    "gradient_accumulation_steps": Range(1, MOST),
    "learning_rate": Range(0),
    "weight_decay": Range(0),
    "adam_beta1": Range(0, below=1),
    "adam_beta2": Range(0, below=1),
    "adam_epsilon": Range(0),
    "max_grad_norm": Range(0),
    "num_train_epochs": Range(above=0),
    "max_steps": Range(-1, MOST),
    "warmup_steps": Range(0, MOST),
    "logging_steps": Range(above=0),
    "eval_steps": Range(above=0),
    "eval_delay": Range(0),
    "save_steps": Range(above=0),
    "save_total_limit": Range(1, MOST),
    "dataloader_num_workers": Range(0, 4096),
    "dataloader_prefetch_factor": Range(1, MOST),
    "ddp_bucket_cap_mb": Range(1, MOST),
    "ddp_timeout": Range(1, MOST),
    "neftune_noise_alpha": Range(0),
    "torch_empty_cache_steps": Range(1, MOST),
    "seed": SEED,
    "data_seed": SEED,
}


def as_number(value: Any) -> float | None:
    """A number, also one that YAML reads as text (1e-5); None for what transformers judges."""
    try:
        return None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def held_out_texts(config: HeldOutConfig | EvalConfig) -> list[tuple[str, CorpusConfig]]:
    """(kind, corpus) of each held-out text that is given."""
    given = [(kind, getattr(config, kind)) for kind in KINDS]
    return [(kind, corpus) for kind, corpus in given if corpus is not None]


LONGEST_NAME = 100
# It becomes part of a file's or directory's name: no path, no hidden file, no option of a command.
NAME = re.compile(rf"\w[\w .+=,@-]{{0,{LONGEST_NAME - 1}}}")


def check_names(what: str, names: Iterable[Any]) -> None:
    """ConfigError for a name that cannot be part of a path."""
    for name in names:
        require(
            NAME.fullmatch(str(name)) is not None,
            f"{what}: a name becomes part of a directory's. It starts with a letter or digit, has "
            f". _ - + = , @ or spaces inside, and at most {LONGEST_NAME} characters; found "
            f"{name!r}",
        )


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)
