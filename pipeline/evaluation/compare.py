"""Compare a model with its base on the same sequences, one packed row at a time."""

import inspect
from collections.abc import Iterable, Iterator, Sized
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.data.packing import pack
from pipeline.evaluation.measures import Sums, measure
from pipeline.models.attention import enable_packing, packing_arguments
from pipeline.models.directory import ModelFolder
from pipeline.token_sequences import Tokens

S = TypeVar("S", bound=Sized)


@torch.no_grad()  # not inference_mode: FSDP later trains with the weights gathered here
def compare(
    model: PreTrainedModel,
    base: PreTrainedModel | None,
    sequences: Iterable[Tokens],
    batch_tokens: int = 2048,
    tail_k: int = 64,
) -> Iterator[Sums]:
    """Yield the sums of each sequence over its targets, in order.

    Without a base, distances to it are 0.

    Holds the logits of `batch_tokens` positions, or of one longer sequence, in the models' own
    dtypes, and a few rows of them in float32.
    """
    for batch in batches(sequences, batch_tokens):
        lengths = [len(sequence) for sequence in batch]
        packed = pack(batch)
        inputs = {
            "input_ids": torch.from_numpy(packed.input_ids)[None].to(model.device),
            "position_ids": torch.from_numpy(packed.position_ids)[None].to(model.device),
        }
        rows = torch.from_numpy(packed.rows).to(model.device)
        labels = inputs["input_ids"][0, rows + 1]
        logits = predict(model, inputs, lengths, rows)
        if base is None:
            base_logits = None
        else:
            base_logits = logits if base is model else predict(base, inputs, lengths, rows)
        measured = measure(logits, labels, base_logits, tail_k)
        ends = np.cumsum([len(sequence.positions) for sequence in batch])
        yield from map(Sums.of, np.split(measured, ends[:-1]))


def predict(
    model: PreTrainedModel, inputs: dict[str, Tensor], lengths: list[int], rows: Tensor
) -> Tensor:
    """Logits [N, V] at the positions `rows` [N] of one packed row.

    The head reads these positions alone, where the model can do that.
    """
    options: dict[str, Any] = packing_arguments(model, lengths)
    alone = "logits_to_keep" in inspect.signature(model.forward).parameters
    if alone:
        options["logits_to_keep"] = rows
    logits: Tensor = model(**inputs, **options, use_cache=False).logits[0]
    return logits if alone else logits[rows]


def batches(sequences: Iterable[S], tokens: int) -> Iterator[list[S]]:
    """Yield consecutive sequences with at most `tokens` tokens in total, or one longer sequence."""
    batch: list[S] = []
    size = 0
    for sequence in sequences:
        if batch and size + len(sequence) > tokens:
            yield batch
            batch, size = [], 0
        batch.append(sequence)
        size += len(sequence)
    if batch:
        yield batch


def load(folder: ModelFolder, dtype: str) -> PreTrainedModel:
    """Load a model for packed rows, on the GPU if there is one.

    Raises ConfigError if the model cannot keep packed sequences apart.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: PreTrainedModel = folder.load(dtype).to(device).eval()
    enable_packing(model)
    return model
