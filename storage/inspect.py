"""Describe a dump, or one of its rows, as lines of text."""

from collections.abc import Callable, Iterator

import numpy as np

from storage.dataset import LogitDataset
from storage.dump_tables import tables_file
from storage.manifest import Totals
from storage.parsing import MANIFEST_BYTES, MASS_BINS, Json
from storage.plan import masked
from storage.text import one_line, printable
from storage.topk import Record

BAR = 40
SHOWN = 200  # tokens of a row
MOST_SHOWN = 12  # settings of one part of the plan; the config of a model has more


def describe(dataset: LogitDataset) -> Iterator[str]:
    """The plan, the totals, bytes per token and target, and the distribution of the kept mass."""
    yield f"dump       {dataset.dump.store.path}"
    for name, value in flatten(dataset.plan):
        yield f"  {one_line(name):<22} {one_line(str(value))}"
    markers = [shard.marker for shard in dataset.shards]
    totals = Totals.of(markers)
    yield ""
    yield f"shards     {totals.shards:,}" + ("  (not finished)" if dataset.partial else "")
    yield f"rows       {totals.rows:,}"
    yield f"tokens     {totals.tokens:,}"
    if not totals.positions:
        return
    size = f"{totals.bytes_per_token:.1f} per token"
    unit, units = "token", totals.tokens
    if masked(dataset.plan):
        unit, units = "target", totals.positions
        share = totals.positions / totals.tokens
        yield f"targets    {totals.positions:,}  ({share:.1%} of the tokens)"
        size += f", {totals.bytes_per_target:.1f} per target"
    yield f"bytes      {totals.bytes:,}  ({size})"
    yield from tables_of(dataset)
    yield f"entries    {totals.entries / totals.positions:.1f} per position"
    if dataset.plan.get("samples"):
        yield (
            f"samples    {dataset.plan['samples']} draws, "
            f"{totals.sampled_ids / totals.positions:.1f} ids per position, "
            f"{totals.sample_bytes / units:.1f} bytes per {unit}"
        )
    yield f"kept mass  {totals.kept_mass:.4f} on average"
    yield (f"codec KL   {totals.codec_kl:.1e} nats on average, {totals.kl_max:.1e} at worst")
    yield ""
    histogram = np.sum([marker["mass_histogram"] for marker in markers], axis=0)
    for number, count in enumerate(histogram):
        share = count / totals.positions
        low, high = number / MASS_BINS, (number + 1) / MASS_BINS
        yield f"  mass {low:.2f}-{high:.2f} {share:7.2%} {'█' * round(BAR * share)}"


def tables_of(dataset: LogitDataset) -> Iterator[str]:
    """A line for all tables that shards share, and one for each with the shards that it serves."""
    users: dict[str, list[str]] = {}
    for shard in dataset.shards:
        if shard.tables:
            users.setdefault(tables_file(shard.tables), []).append(shard.name)
    if not users:
        return
    sizes = dataset.dump.tables.sizes(shard.tables for shard in dataset.shards if shard.tables)
    total = sum(size or 0 for size in sizes.values())
    yield f"tables     {total:,} bytes more, in {len(users)} files"
    for name, shards in users.items():
        size = "missing" if sizes[name] is None else f"{sizes[name]:,} bytes"
        yield f"  {name} {size}, {len(shards)} shards, the first is {shards[0]}"


def flatten(value: Json, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, inner in value.items():
        many = isinstance(inner, dict | list) and len(inner) > MOST_SHOWN
        if isinstance(inner, dict) and not many:
            yield from flatten(inner, f"{prefix}{key}.")
        elif many or (isinstance(inner, list) and len(inner) > 3):
            yield f"{prefix}{key}", f"{len(inner)} entries"
        else:
            yield f"{prefix}{key}", inner


def describe_row(
    record: Record, decode: Callable[[int], str], top: int = 4, positions: int = 40
) -> Iterator[str]:
    """A row's text, then for each position the next token and the teacher's best candidates.

    A star marks the candidate that is the next token. In the text of a row with a mask, ⟦ and ⟧
    enclose the learnt tokens.
    """
    tokens = [decode(int(token)) for token in record.input_ids]
    name, chunk = one_line(record.doc_id), record.chunk
    learnt = "" if record.targets is None else f", {len(record.topk)} of them targets: ⟦learnt⟧"
    yield f"document {name}, chunk {chunk}, {len(record.input_ids)} tokens{learnt}"
    yield marked(record, tokens)
    yield ""
    yield f"{'at':>4} {'token':<14} {'next':<14} {'tail':>6}  the teacher's candidates for next"
    ids, logprobs = record.topk.dense()
    for entry, at in enumerate(record.positions[:positions].tolist()):
        following = int(record.input_ids[at + 1])
        candidates = [
            f"{'*' if token == following else ''}{show(decode(int(token)))} {np.exp(logprob):.2f}"
            for token, logprob in zip(ids[entry, :top], logprobs[entry, :top], strict=True)
            if np.isfinite(logprob)
        ]
        tail = np.exp(record.topk.tail_logprob[entry])
        candidates += [
            f"{'*' if token == following else ''}{show(decode(token))} {share} of the tail"
            for token, share in most_drawn(record, entry, top)
        ]
        yield (
            f"{at:>4} {show(tokens[at]):<14} {show(tokens[at + 1]):<14} {tail:6.3f}  "
            + "  ".join(candidates)
        )
    if len(record.topk) > positions:
        yield f"  … {len(record.topk) - positions} more positions; --positions N shows more"


def marked(record: Record, tokens: list[str]) -> str:
    """200 of the row's tokens, with the learnt ones marked; from 100 before the first of them."""
    first = int(record.positions[0]) + 1 if record.targets is not None else 0
    start, end = max(0, first - SHOWN // 2), max(0, first - SHOWN // 2) + SHOWN
    tokens, learnt = list(tokens), np.zeros(len(tokens) + 1, bool)
    if record.targets is not None:
        learnt[:-1] = record.targets
    for at in np.flatnonzero(learnt):
        tokens[at] = ("" if learnt[at - 1] else "⟦") + tokens[at] + ("" if learnt[at + 1] else "⟧")
    before, after = "… " if start else "", " …" if len(tokens) > end else ""
    return before + "".join(tokens[start:end]) + after


def most_drawn(record: Record, at: int, top: int) -> list[tuple[int, str]]:
    """The `top` ids drawn most often at a stored position, each with its share, such as "3/16"."""
    samples = record.topk.samples
    if samples is None:
        return []
    end = int(samples.counts[: at + 1].sum(dtype=np.int64))
    here = slice(end - int(samples.counts[at]), end)
    ids, times = samples.ids[here].tolist(), samples.times[here].tolist()
    most = np.argsort(-samples.times[here].astype(int), kind="stable")[:top]
    return [(ids[number], f"{times[number]}/{samples.draws}") for number in most]


def show(token: str, width: int = 14) -> str:
    """A token on one line, with visible spaces and line ends, at most `width` long."""
    text = token.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣")
    text = printable(text)
    return text if len(text) <= width else text[: width - 1] + "…"


def token_decoder(dataset: LogitDataset) -> tuple[Callable[[int], str], str | None]:
    """A function from token id to text, and a note if it can only show ids."""
    data = dataset.dump.store.read("tokenizer/tokenizer.json", MANIFEST_BYTES)
    if data is None:
        return (lambda token: f"<{token}>"), "The dump has no tokenizer.json: showing ids."
    try:
        from tokenizers import Tokenizer
    except ImportError:
        return (lambda token: f"<{token}>"), "For text, pip install tokenizers: showing ids."
    try:
        tokenizer = Tokenizer.from_str(data.decode())
    except Exception as error:  # tokenizers raises no type of its own
        return (lambda token: f"<{token}>"), f"tokenizer/tokenizer.json: {error}: showing ids."

    def text_of(token: int) -> str:
        text: str = tokenizer.decode([token], skip_special_tokens=False)
        return text or str(tokenizer.id_to_token(token) or f"<{token}>")

    return text_of, None
