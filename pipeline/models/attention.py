"""How a model attends: as its own eager code does, and no packed sequence sees another.

The ways to keep packed sequences apart, fastest first: each attended by itself (PACKED),
transformers' own T × T mask, each in a row of its own. The first is taken whose logits are those of
the model's own eager attention on each sequence alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.errors import ConfigError
from pipeline.models import weights
from pipeline.models.own_rows import OwnRows
from pipeline.models.packed_attention import PACKED, PACKED_EAGER, Notes, noting
from pipeline.progress import say

__all__ = ["PACKED", "PACKED_EAGER", "enable_packing", "packing_arguments", "take_exact_attention"]

PROBE = [11, 5, 8]  # lengths of the sequences to compare
WINDOW = 256  # tokens: the probe becomes longer than windows up to this
ROUNDINGS = 5
"""Two ways agree where they differ by up to this many times what rounding the embeddings does.
In float32 they are rounded as coarsely as the sum of a product: a pretrained model (SmolLM2-135M)
and its students differed by 4 to 9 times what rounding them once does."""
SURE = 10
"""Kernels differ by up to this many times what rounding the embeddings does, in bfloat16: 0.2 to 7
times that in SmolLM2-135M and its students."""
FLOAT32 = torch.finfo(torch.float32).eps
"""Models take some of their sums in float32 even in float64."""
HALF = (torch.bfloat16, torch.float16)
MOST = 0.2
"""Ways that differ by more never agree, however rough the dtype makes a deep model."""


class Way(NamedTuple):
    """How a model keeps packed sequences apart."""

    attention: str
    """transformers' name of the attention function"""
    own_rows: bool = False
    """each sequence has a row of its own"""


def way_of(model: PreTrainedModel) -> Way:
    rows = getattr(model, "packed_own_rows", None) is not None
    return Way(model.config._attn_implementation, rows)


def take_way(model: PreTrainedModel, way: Way) -> None:
    """Make the model attend in this way."""
    rows = getattr(model, "packed_own_rows", None)
    if rows is not None and not way.own_rows:
        rows.remove()
        model.packed_own_rows = None
    if model.config._attn_implementation != way.attention:
        with weights.quiet():
            model.set_attn_implementation(way.attention)
    if rows is None and way.own_rows:
        model.packed_own_rows = OwnRows(model)


def packing_arguments(model: PreTrainedModel, lengths: list[int]) -> dict[str, Any]:
    """Arguments of the forward, besides position_ids that restart with each sequence."""
    attention, own_rows = way_of(model)
    takes_them = own_rows or attention in (PACKED, PACKED_EAGER)
    return {"sequence_lengths": lengths} if takes_them else {}


def take_exact_attention(model: PreTrainedModel) -> None:
    """Take eager attention instead of sdpa where sdpa leaves out what the model's attention does.

    That is what the model's code hands to its attention (a soft cap, sinks), and whatever makes the
    logits of a probe differ. Does nothing for a model without weights.
    """
    if way_of(model).attention != "sdpa" or not switches(model) or on_meta(model):
        return
    with unchanged(model), fine(model):
        notes = notes_of(model)
        probes = probes_of(model, notes)[:1]
        found = alone(model, probes)
        take_way(model, Way("eager"))
        expected = alone(model, probes)
        off = difference(found, expected)
        differs = off > tolerance(model, probes, expected)  # False where logits are not finite
    special = notes.special if notes is not None else set()
    if not (special or differs):
        return
    take_way(model, Way("eager"))
    what = ", ".join(sorted(special)) or f"something: its logits are {off:.1%} off"
    say(f"{type(model).__name__}: sdpa would leave out {what}; the model's own attention is used")


def enable_packing(model: PreTrainedModel) -> None:
    """Make `model` keep the sequences of a row apart, given `packing_arguments`.

    Raises ConfigError if none of the ways gives the logits that the sequences have alone.
    """
    if packing_arguments(model, PROBE):
        return
    if not hasattr(model, "attention_notes"):  # not loaded by ModelFolder
        take_exact_attention(model)
    with unchanged(model) as own, fine(model):
        notes = notes_of(model)
        probes = probes_of(model, notes)
        if switches(model):
            take_way(model, Way("eager"))
        expected = alone(model, probes)
        most = tolerance(model, probes, expected)
        failed = "no way was tried"
        # Logits that are not finite cannot be compared; rows of their own need no comparison.
        finite = bool(expected.isfinite().all())
        for way in ways(own.attention, notes if finite else None, switches(model)):
            try:
                take_way(model, way)
                error = difference(together(model, probes), expected)
            except Exception as stopped:  # an architecture may raise whatever it likes
                failed = f"{type(stopped).__name__}: {str(stopped)[:200]}"
                continue
            if error <= most or (way.own_rows and not finite):
                break
            failed = f"logits differ by {error:.1e} of their size, where {most:.1e} is rounding"
        else:
            raise ConfigError(
                f"{type(model).__name__}: sequences of a batch see each other or what follows them "
                f"({failed}), so this architecture cannot be trained on packed sequences"
            )
    take_way(model, way)


def ways(own: str, notes: Notes | None, switches: bool) -> Iterator[Way]:
    """The ways to try, fastest first. `own` is the exact attention of the model."""
    bands = notes is not None and not notes.odd_masks
    if own not in ("sdpa", "eager"):  # a flash kernel reads position_ids, and knows the options
        yield Way(own)
    if bands and switches:
        yield from (Way(PACKED), Way(PACKED_EAGER))
    if bands or not switches:
        yield Way(own)
    yield Way(own, own_rows=True)
    if switches and own != "eager":
        yield Way("eager", own_rows=True)


def switches(model: PreTrainedModel) -> bool:
    """Whether transformers lets another function attend in this architecture."""
    return bool(model._can_set_attn_implementation())


def on_meta(model: PreTrainedModel) -> bool:
    return any(weight.is_meta for weight in model.parameters())


@contextmanager
def unchanged(model: PreTrainedModel) -> Iterator[Way]:
    """Leaves the model's way and mode as they were."""
    own, was_training = way_of(model), model.training
    model.eval()
    try:
        yield own
    finally:
        take_way(model, own)
        model.train(was_training)


@contextmanager
def fine(model: PreTrainedModel) -> Iterator[None]:
    """Holds the weights in float32 where their own dtype is too rough to tell ways apart.

    A deep model in bfloat16 can make any rounding as large as its logits. The weights come back
    as they were: bfloat16 and float16 are within float32. Quantised layers stay rough.
    """
    dtypes: dict[Tensor, torch.dtype] = {}
    if model.dtype in HALF and not own_dtypes(model):
        probes = probes_of(model, None)[:1]
        if SURE * noise(model, probes, alone(model, probes)) > MOST:
            tensors = (*model.parameters(), *model.buffers())
            dtypes = {tensor: tensor.dtype for tensor in tensors if tensor.dtype in HALF}
    try:
        hold_in_float32(dtypes)
        yield
    finally:
        for tensor, dtype in dtypes.items():
            tensor.data = tensor.data.to(dtype)


def hold_in_float32(dtypes: dict[Tensor, torch.dtype]) -> None:
    """All of the tensors, whose own dtypes are given; none where there is no memory for that."""
    try:
        for tensor in dtypes:
            tensor.data = tensor.data.float()
    except torch.OutOfMemoryError:
        for tensor, dtype in dtypes.items():
            tensor.data = tensor.data.to(dtype)


def notes_of(model: PreTrainedModel) -> Notes | None:
    """What the model asks of its attention; None where that cannot be watched."""
    if not hasattr(model, "attention_notes"):
        model.attention_notes = watched(model) if switches(model) else None
    notes: Notes | None = model.attention_notes
    return notes


def watched(model: PreTrainedModel) -> Notes | None:
    own = way_of(model)
    try:
        take_way(model, Way(PACKED))
        with noting() as notes:
            alone(model, probes_of(model, None)[:1])
    except Exception:  # an architecture may raise whatever it likes
        return None
    finally:
        take_way(model, own)
    return notes if notes.calls else None


def probes_of(model: PreTrainedModel, notes: Notes | None) -> list[Tensor]:
    """Ids of sequences, one longer than the model's sliding windows where these are short."""
    config = model.config.get_text_config()
    short = [window for window in (notes.windows if notes else ()) if window <= WINDOW]
    longest = getattr(config, "max_position_embeddings", None) or WINDOW
    lengths = [max([PROBE[0], *(window + PROBE[1] for window in short)]), *PROBE[1:]]
    lengths = [min(length, longest) for length in lengths]
    ids = (torch.arange(sum(lengths), device=model.device) * 7919 + 1) % config.vocab_size
    return list(ids.split(lengths))


@torch.no_grad()
def alone(model: PreTrainedModel, probes: list[Tensor]) -> Tensor:
    """Logits [T, V] of the probes, each in its own forward."""
    return torch.cat(
        [model(input_ids=probe[None], use_cache=False).logits[0].double() for probe in probes]
    )


@torch.no_grad()
def together(model: PreTrainedModel, probes: list[Tensor]) -> Tensor:
    """Logits [T, V] of the probes in one packed row."""
    positions = [torch.arange(len(probe), device=model.device) for probe in probes]
    logits: Tensor = model(
        input_ids=torch.cat(probes)[None],
        position_ids=torch.cat(positions)[None],
        use_cache=False,
        **packing_arguments(model, [len(probe) for probe in probes]),
    ).logits[0]
    return logits.double()


def difference(found: Tensor, expected: Tensor) -> float:
    """Size of the difference of two logits [T, V] as a share of the size of the expected ones.

    A constant in all logits of a position changes no probability, so it does not count.
    """
    off, expected = (x - x.mean(-1, keepdim=True) for x in (found - expected, expected))
    return float(off.norm() / expected.norm().clamp(min=torch.finfo(torch.float64).tiny))


def tolerance(model: PreTrainedModel, probes: list[Tensor], expected: Tensor) -> float:
    """Largest `difference` between two orders of the same sums."""
    measured = ROUNDINGS * noise(model, probes, expected)
    return min(MOST, max(4 * roundings(model), measured))


def rounding_of_sums(model: PreTrainedModel) -> float:
    """By how much a product with a weight is rounded: half dtypes are summed in float32."""
    size = roundings(model)
    if size > FLOAT32:
        return size
    return float(size * model.get_input_embeddings().weight.shape[1] ** 0.5)


def roundings(model: PreTrainedModel) -> float:
    """Size of a rounding in the model."""
    return max(FLOAT32, *(torch.finfo(dtype).eps for dtype in {model.dtype, *own_dtypes(model)}))


def own_dtypes(model: PreTrainedModel) -> set[torch.dtype]:
    """What quantised layers compute in, which may be a dtype of their own."""
    found = {getattr(module, "compute_dtype", None) for module in model.modules()}
    return {dtype for dtype in found if dtype is not None}


def noise(model: PreTrainedModel, probes: list[Tensor], expected: Tensor) -> float:
    """By how much rounding the embeddings changes the logits of the first probe."""
    eps = rounding_of_sums(model)

    def rounded(_: Any, __: Any, output: Tensor) -> Tensor:
        signs = torch.arange(output.numel(), device=output.device).reshape(output.shape) % 3 - 1
        return (output * (1 + eps * signs.double())).to(output.dtype)

    hook = model.get_input_embeddings().register_forward_hook(rounded)
    try:
        found = alone(model, probes[:1])
    finally:
        hook.remove()
    return difference(found, expected[: len(found)])
