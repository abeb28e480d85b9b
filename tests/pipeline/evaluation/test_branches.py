"""Continuations that share a reading of their context against each of them alone."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig

from pipeline.evaluation.branches import Branched, logprobs, longest_branched, mask
from pipeline.evaluation.compare import load
from pipeline.models.attention import enable_packing
from pipeline.models.directory import ModelFolder
from tests.helpers.models import tiny_model

tokens = st.lists(st.integers(0, 511), max_size=5).map(tuple)
trees = st.builds(
    Branched, tokens.filter(bool), st.lists(tokens, min_size=1, max_size=4).map(tuple)
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"), arch="llama")


@pytest.fixture(scope="module")
def model(path: Path) -> torch.nn.Module:
    return load(ModelFolder(path), "float32")


@torch.no_grad()
def alone(model: torch.nn.Module, tree: Branched) -> list[torch.Tensor]:
    """float64: each continuation after its context, without anything of ours."""
    found = []
    for branch in tree.branches:
        ids = torch.tensor([[*tree.context, *branch]])
        found.append(model(ids).logits[0, len(tree.context) - 1 :].log_softmax(-1))
    return found


@settings(max_examples=25)
@given(st.lists(trees, min_size=1, max_size=3))
def test_a_tree_gives_what_each_continuation_gives_alone(
    path: Path, model: torch.nn.Module, batch: list[Branched]
) -> None:
    plain = AutoModelForCausalLM.from_pretrained(path).double()
    expected = [log for tree in batch for log in alone(plain, tree)]
    with torch.no_grad():
        found = list(logprobs(model, batch))
    assert len(found) == len(expected)
    for mine, other in zip(found, expected, strict=True):
        assert mine.shape == other.shape
        torch.testing.assert_close(mine.double(), other, atol=2e-5, rtol=0)


def test_the_mask_by_hand() -> None:
    tree = Branched((5, 6), ((7, 8), (), (9,)))
    assert tree.input_ids.tolist() == [5, 6, 7, 8, 9]
    assert tree.position_ids.tolist() == [0, 1, 2, 3, 2]
    assert [rows.tolist() for rows in tree.rows] == [[1, 2, 3], [1], [1, 4]]
    assert mask(tree.numbers)[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 0, 0, 1],
    ]


def test_a_plain_model_reads_trees_of_any_size(model: torch.nn.Module) -> None:
    assert longest_branched(model) > 1 << 30


def test_a_tree_fits_into_the_shortest_window() -> None:
    config = Gemma3TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, head_dim=16,
        num_attention_heads=2, num_key_value_heads=1, sliding_window=8, max_position_embeddings=64,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    torch.manual_seed(0)
    gemma = Gemma3ForCausalLM(config).eval()
    enable_packing(gemma)
    assert longest_branched(gemma) == 8


def test_a_model_that_would_see_other_continuations_reads_each_alone(
    model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "pipeline.evaluation.branches.mask",
        lambda numbers: torch.ones(1, 1, len(numbers), len(numbers), dtype=torch.bool).tril(),
    )
    assert longest_branched(model) == 0
    monkeypatch.setattr("pipeline.evaluation.branches.mask", lambda numbers: numbers.no_such_thing)
    assert longest_branched(model) == 0
