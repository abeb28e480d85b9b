"""What a training run reads: the student's directory, the dumps, the corpora."""

from functools import cached_property

from transformers import TrainingArguments

from pipeline.config import CorpusConfig, TrainConfig, held_out_texts
from pipeline.corpus import Corpus
from pipeline.data.mixing import GeneralStream, shares_of
from pipeline.errors import ConfigError, RefusedError
from pipeline.models.directory import ModelFolder
from pipeline.models.vocabulary import check_ids, difference_from_dump
from pipeline.progress import say
from pipeline.token_sequences import TokenSequences, read_tokens
from pipeline.types import Json
from storage import LogitDataset
from storage.cache import too_small
from storage.manifest import differences
from storage.plan import look_up, needed


class Inputs:
    """Opened as the settings name them. The corpora are tokenized when they are first asked for.

    Raises ConfigError and StorageError for what cannot be opened; `check` says whether the parts
    belong together.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.model = ModelFolder.find(config.model, config.revision)
        self.dumps = open_dumps(config)
        """Each dump with its weight; none where the run trains on the domain alone."""
        self.held_out_dump = open_held_out_dump(config)

    @property
    def all_dumps(self) -> list[LogitDataset]:
        held_out = [] if self.held_out_dump is None else [self.held_out_dump]
        return [*self.dumps, *held_out]

    @property
    def max_length(self) -> int:
        """Tokens of the longest domain sequence: the user's setting, or that of the dumps."""
        if self.config.max_length is not None:
            return self.config.max_length
        return max(int(needed(dump.plan, "max_length")) for dump in self.dumps)

    @property
    def add_eos(self) -> bool:
        """Whether domain documents end with end-of-text: as the general ones do."""
        return all(needed(dump.plan, "add_eos") for dump in self.dumps)

    @cached_property
    def corpus(self) -> Corpus:
        return self.opened(self.config.domain)

    def opened(self, corpus: CorpusConfig) -> Corpus:
        return Corpus(corpus, self.model.tokenizer, self.max_length, self.add_eos)

    @cached_property
    def domain(self) -> TokenSequences:
        return read_tokens(self.corpus)

    def general(self, seed: int) -> GeneralStream | None:
        """The stream of general sequences; None where the run trains on the domain alone."""
        if not self.dumps:
            return None
        return GeneralStream(list(self.dumps), list(self.dumps.values()), seed)

    def held_out(self) -> dict[str, TokenSequences]:
        """The held-out text of each kind that is given."""
        return {
            kind: read_tokens(self.opened(corpus)).spread(self.config.held_out.sequences)
            for kind, corpus in held_out_texts(self.config.held_out)
        }

    def row_tokens(self, args: TrainingArguments, rows_an_item: float) -> int:
        """Tokens of the longest packed row; its expectation where row_tokens is not set.

        `rows_an_item`: general sequences beside a domain sequence, see MixedDataset.
        """
        lengths = [dump.lengths for dump in self.dumps]
        longest = int(max(self.domain.longest, *(each.max() for each in lengths), 0))
        if self.config.row_tokens is not None:
            return max(self.config.row_tokens, longest)
        item: float = longest
        if lengths:
            item += rows_an_item * sum(float(each.mean()) for each in lengths) / len(lengths)
        return int(args.train_batch_size * item)

    @property
    def target_share(self) -> float:
        """The largest share of targets among the tokens of a corpus; 1 where one has no masks."""
        domain = self.domain.target_count / self.domain.token_count
        return max(domain, *map(target_share, self.dumps), 0.0)


def target_share(dump: LogitDataset) -> float:
    """Targets among the tokens of a dump; 1 where it has no masks."""
    return float(dump.target_counts.sum() / dump.lengths.sum())


def open_dumps(config: TrainConfig) -> dict[LogitDataset, float]:
    if config.dump is None or config.mix == 0:
        return {}
    weights = config.dump if isinstance(config.dump, dict) else {config.dump: 1.0}
    samples = config.loss.targets != "topk"
    return {LogitDataset(path, samples=samples): weight for path, weight in weights.items()}


def open_held_out_dump(config: TrainConfig) -> LogitDataset | None:
    """Without its samples: a KL to those has the noise of the draws."""
    path = config.held_out.dump
    if path is None:
        return None
    dump = LogitDataset(path, samples=False)
    if dump.k == 0:
        raise ConfigError(f"held_out.dump {path}: holds samples alone; a KL needs k above 0")
    return dump


def check(inputs: Inputs) -> None:
    """Refuse, before weights or corpora are read, parts that do not belong together.

    Raises ConfigError for settings that cannot work, RefusedError for a student that cannot learn
    from a dump or be measured on the held-out one.
    """
    check_ids(inputs.model)
    longest = inputs.model.longest
    if longest and inputs.max_length > longest:
        raise ConfigError(
            f"max_length {inputs.max_length}: the student reads at most {longest} tokens"
        )
    for dump in inputs.all_dumps:
        check_student(inputs, dump)
    shares_of(list(inputs.dumps), list(inputs.dumps.values()))
    check_targets(inputs.config, list(inputs.dumps))
    plans = [dump.plan for dump in inputs.all_dumps]
    check_one_teacher(plans)
    remote = [dump for dump in inputs.dumps if not dump.dump.store.local]
    advice = too_small(sum(dump.manifest.bytes for dump in remote))
    if advice:
        say(advice)


def check_one_teacher(plans: list[Json]) -> None:
    """RefusedError for dumps of models with other weights, or of one that computed otherwise."""
    teachers = {needed(p, "teacher.fingerprint"): needed(p, "teacher.name") for p in plans}
    if len(teachers) > 1:
        raise RefusedError(
            f"the dumps are of different teachers ({', '.join(teachers.values())}): a student is "
            "held to one base model"
        )
    known = [
        {"config.json": config, "engine_args": look_up(plan, "engine.args")[0]}
        for plan in plans
        if (config := look_up(plan, "teacher.config")[0]) is not None  # dumps of before
    ]
    for other in known[1:]:
        lines = differences(known[0], other, place="first dump")
        if lines:
            raise RefusedError(
                "the dumps are of one model that was run in different ways, and a student is held "
                "to one:\n" + "\n".join(f"  {line}" for line in lines)
            )


def check_student(inputs: Inputs, dump: LogitDataset) -> None:
    """Refuse a dump without rows, or whose ids are other tokens to the student.

    The heads may have different widths: added tokens and padding lie in the tail.
    """
    name, plan, model = dump.dump.store.path, dump.plan, inputs.model
    if not len(dump):
        raise ConfigError(f"dump {name}: no rows, so there is no general corpus")
    difference = difference_from_dump(model, dump, "the student")
    if difference:
        raise RefusedError(
            f"student {inputs.config.model} does not belong to the dump {name} of "
            f"{needed(plan, 'teacher.name')}: {difference}.\nStored ids mean other tokens to this "
            "student, or text has other tokens. Start from the dump's own base model, or dump with "
            "this tokenizer."
        )
    if model.vocab_size < plan["vocab_size"]:
        say(
            f"the student's head has {model.vocab_size:,} columns, that of the dump {name} "
            f"{plan['vocab_size']:,}: where it holds ids beyond, which are no tokens, their mass "
            "counts to the tail"
        )


def check_targets(config: TrainConfig, dumps: list[LogitDataset]) -> None:
    """Refuse top-k entries and samples that cannot be learnt, or not together."""
    if config.loss.targets == "topk" and any(dump.k == 0 for dump in dumps):
        raise ConfigError(
            "loss.targets topk: a dump holds samples alone (its k is 0); leave loss.targets out"
        )
    kinds = {(dump.draws > 0, dump.k > 0) for dump in dumps}
    if len(kinds) > 1:
        raise RefusedError(
            "the dumps hold different targets, and their KL would not mean the same: "
            + ", ".join(
                f"{dump.dump.store.path} k {dump.k}, samples {dump.draws}" for dump in dumps
            )
            + ". Where all have a k above 0, loss.targets: topk leaves the samples out"
        )
    if config.loss.direction == "reverse" and any(dump.draws for dump in dumps):
        raise ConfigError(
            "loss.direction reverse: samples are unbiased in the forward direction alone, because "
            "the reverse takes the logarithm of what they estimate. Set loss.direction: forward, "
            "or loss.targets: topk where the dump has a k above 0"
        )
