"""The plan of a dump: every setting and input that decides what it holds."""

from dataclasses import replace

from pipeline.config import DumpConfig
from pipeline.corpus import Corpus
from pipeline.engine_args import changing_answers, reads_hugging_face
from pipeline.errors import ConfigError
from pipeline.models.directory import ModelFolder, tokenizer_fingerprint
from pipeline.models.vocabulary import check_ids
from pipeline.positions import Share
from pipeline.teacher.vllm_engine import engine_version
from pipeline.types import Json
from storage.codec.codec import STEPS
from storage.errors import IncompleteDump
from storage.manifest import Dump, differences
from storage.plan import TARGETS_VERSION, look_up

MIN_PROB = 0.0003
"""Least probability of an entry, by default: a third less on disk, and the gradient of the student
hardly changes (storage/BENCHMARKS.md, A cut-off)."""
COARSE = 1 / 125
"""Step of roots of probabilities, by default, where a cut-off of MIN_PROB or more leaves no entry
under two steps. Students learn the same from it as from 1/416, at a sixth fewer bytes
(pipeline/study/BYTES.md)."""
NAMES = (("teacher", "name"), ("teacher", "revision"), ("corpus", "path"))
"""Spellings of what the plan also has the content of, as a fingerprint."""


def open_corpus(config: DumpConfig, model: ModelFolder) -> Corpus:
    """The corpus of a dump, with the share of the targets that it keeps."""
    share = share_of(config)
    return Corpus(config.corpus, model.tokenizer, config.max_length, config.add_eos, share)


def share_of(config: DumpConfig) -> Share | None:
    """The share of the targets that a dump keeps; None for all of them."""
    return Share(config.positions, config.positions_seed) if config.positions < 1 else None


def dump_there(output: str) -> Dump | None:
    """The dump at `output`; None where there is no plan yet."""
    try:
        return Dump(output)
    except IncompleteDump:
        return None


def plan_there(output: str) -> Json | None:
    """The plan of the dump at `output`; None where there is none yet."""
    dump = dump_there(output)
    return None if dump is None else dump.plan


def settled(config: DumpConfig, there: Json | None) -> DumpConfig:
    """With what the settings leave open: as in the plan of the dump that is there, or, in a new
    dump, as this release does it. Raises ConfigError for a step that does not fit the codec.
    """
    if there is None:
        cut = 0.0 if config.samples or config.top_p < 1 else MIN_PROB
        there = {"codec": "v3", "min_prob": cut}
    codec = config.codec or there.get("codec", "v1")
    cut = there.get("min_prob", 0.0) if config.min_prob is None else config.min_prob
    step = COARSE if codec == "v3" and cut >= MIN_PROB else STEPS[codec]
    if codec == there.get("codec", "v1"):
        step = there.get("step", step)
    step = step if config.step is None else config.step
    return replace(config, codec=codec, min_prob=cut, step=step)


def make_plan(config: DumpConfig, corpus: Corpus, model: ModelFolder) -> Json:
    """The content of plan.json; two dumps of one plan hold the same rows.

    The settings are `settled`. Raises ConfigError for settings that the model cannot serve.
    """
    check_fits(config, corpus, model)
    tokenizer = corpus.tokenizer
    args = changing_answers(config.engine_args) if config.engine == "vllm" else {}
    return {
        "teacher": {
            "name": config.model,
            "revision": config.revision,
            "architectures": model.architectures,
            "fingerprint": model.weights_fingerprint,
            "config": model.stated,
            "dtype": config.dtype,
        },
        "tokenizer": {"fingerprint": tokenizer_fingerprint(tokenizer)},
        "vocab_size": model.vocab_size,
        "k": config.k,
        "step": config.step,
        # A setting that earlier releases lacked is in the plan only where it changes something.
        **({} if config.codec == "v1" else {"codec": config.codec}),
        **({"min_prob": config.min_prob} if config.min_prob else {}),
        **({"top_p": config.top_p} if config.top_p < 1 else {}),
        **(
            {"samples": config.samples, "sample_seed": config.sample_seed} if config.samples else {}
        ),
        **targets_of(corpus),
        "temperature": 1.0,
        "max_length": config.max_length,
        "add_eos": config.add_eos,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "corpus": {
            "path": config.corpus.path,
            "column": corpus.column,
            "documents": len(corpus),
            "fingerprint": corpus.fingerprint(),
            "rendering": corpus.rendering(),
            **({"special_tokens": "split"} if corpus.splits_special else {}),
        },
        "partitions": config.partitions,
        "shard_tokens": config.shard_tokens,
        "engine": {**engine_version(config.engine), **({"args": args} if args else {})},
    }


def targets_of(corpus: Corpus) -> Json:
    """{"targets": how they were chosen}, which says that rows have masks; {} without masks."""
    found = corpus.targets_identity() | (corpus.share.identity() if corpus.share else {})
    return {"targets": {"version": TARGETS_VERSION, "which": "all", **found}} if found else {}


def plan_differences(there: Json, here: Json) -> list[str]:
    """Why a dump of the plan `there` cannot be resumed by the plan `here`; a line for each reason.

    Another spelling of the same content is none. Plans of earlier releases do not say how documents
    were rendered, nor what config.json, the arguments of the engine and the template of chats with
    tools were.
    """
    if not look_up(there, "corpus.rendering")[1]:
        here = without(here, "corpus", "rendering")
    if not look_up(there, "teacher.config")[1]:
        here = without(without(here, "teacher", "config"), "engine", "args")
        here = without(here, "corpus.rendering.chat_template", "with_tools")
    one, other = there, here
    for part, name in NAMES:
        one, other = without(one, part, name), without(other, part, name)
    return differences(there, here) if differences(one, other) else []


def without(plan: Json, part: str, name: str) -> Json:
    """The plan without a name of its `part`, which may have dots."""
    first, _, rest = part.partition(".")
    own = plan.get(first)
    if not isinstance(own, dict):
        return plan
    kept = without(own, rest, name) if rest else {k: v for k, v in own.items() if k != name}
    return {**plan, first: kept}


def check_fits(config: DumpConfig, corpus: Corpus, model: ModelFolder) -> None:
    """ConfigError where k, max_length, the tokenizer or the weights do not fit the model."""
    if config.k > model.vocab_size:
        raise ConfigError(f"k {config.k}: the model's vocabulary has only {model.vocab_size} ids")
    if model.longest and config.max_length > model.longest:
        raise ConfigError(
            f"max_length {config.max_length}: the model reads at most {model.longest} tokens; set "
            f"max_length to {model.longest} or less"
        )
    check_ids(model)
    own = config.engine == "transformers"
    if own or reads_hugging_face(config.engine_args):
        model.check_weights(strict=own)
