"""The distilling forward of architectures that keep packed sequences apart in their own ways."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.data.packing import pack_row, with_targets
from pipeline.losses import Direction, sparse_divergence
from pipeline.models.attention import way_of
from pipeline.token_sequences import Tokens
from pipeline.training.forward import add_distill_forward
from storage import LogitDataset
from tests.helpers.architectures import tiny


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize(
    "kind", ["falcon", "bloom", "mamba2", "qwen3_next", "lfm2", "granite4", "gpt_oss", "llama4"]
)
def test_a_packed_row_learns_what_its_sequences_learn_one_by_one(
    kind: str, direction: Direction, dump_path: Path
) -> None:
    dump = LogitDataset(dump_path)
    domain = [Tokens(np.arange(*ends, dtype=np.int32)) for ends in ((5, 40), (100, 107))]
    row = pack_row(domain, [dump[1], dump[2]])
    targets, lengths = row["targets"], row["sequence_lengths"]
    weights = torch.linspace(0.5, 1.5, len(targets["rows"]))
    alone, model = tiny(kind), tiny(kind)
    if alone._can_set_attn_implementation():
        alone.set_attn_implementation("eager")
    parts = row["input_ids"][0].split(lengths)
    logits = torch.cat([alone(part[None], use_cache=False).logits[0] for part in parts])
    logits, labels = logits[targets["rows"]], targets["labels"]
    ce = torch.nn.functional.cross_entropy(logits[: len(labels)], labels, reduction="none")
    kl = sparse_divergence(
        logits[len(labels) :],
        targets["ids"].long(),
        targets["logprobs"],
        targets["tail_logprob"],
        direction,
    )
    expected = torch.cat([ce, kl])
    (weights * expected).sum().backward()

    add_distill_forward(model, direction)
    calls: list[torch.Size] = []
    embeddings = model.get_input_embeddings()
    embeddings.register_forward_hook(lambda _, ids, __: calls.append(ids[0].shape))
    found = model(**with_targets(row, row_weights=weights))
    assert calls == [(4, max(lengths)) if way_of(model).own_rows else (1, sum(lengths))]
    torch.testing.assert_close(found["losses"], expected, rtol=1e-4, atol=1e-4)
    found["loss"].backward()
    known = dict(alone.named_parameters())
    for name, parameter in model.named_parameters():
        if known[name].grad is not None:
            off = (parameter.grad - known[name].grad).norm()
            assert off <= 1e-3 * known[name].grad.norm(), name
