"""Teachers: they turn sequences into top-k next-token distributions, in the same order."""

from collections.abc import Generator, Iterable
from contextlib import AbstractContextManager
from typing import Protocol

import torch

from pipeline.corpus import Sequence
from pipeline.models.directory import ModelFolder
from pipeline.models.logits import logits_at
from pipeline.teacher.sampling import NO_SAMPLES, Sampling, draw, places
from storage import TopK

Answers = Generator[tuple[Sequence, TopK], None, None]


class Teacher(Protocol, AbstractContextManager["Teacher"]):
    """The base model; it computes the distributions of whole sequences."""

    def topk(self, sequences: Iterable[Sequence]) -> Answers:
        """Yield each sequence with a distribution at each of its `positions`, in the order given.

        It reads a bounded number of sequences ahead of those it has yielded. Closing the generator
        cancels running requests; `topk` can be called again.
        """
        ...


class TransformersTeacher:
    """The simple reference: one sequence at a time, softmax in float32."""

    def __init__(
        self, model: ModelFolder, k: int, dtype: str = "auto", how: Sampling = NO_SAMPLES
    ) -> None:
        self.k, self.how = k, how
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = model.load(dtype).to(device).eval()

    def __enter__(self) -> "TransformersTeacher":
        return self

    def __exit__(self, *_: object) -> None:
        return None

    @torch.inference_mode()
    def topk(self, sequences: Iterable[Sequence]) -> Answers:
        for sequence in sequences:
            logits = logits_at(self.model, sequence.input_ids, sequence.positions)
            total = logits.logsumexp(-1)
            best, ids = logits.topk(self.k)
            outside = logits.scatter(1, ids, -torch.inf)
            rest, drawn = outside.logsumexp(-1), None
            if self.how.draws:
                drawn = draw(outside, places(self.how, rest, total), rest).cpu()
            best, tail = best - total[:, None], rest - total
            yield sequence, TopK.from_dense(ids.cpu(), best.cpu(), tail.cpu(), drawn)
