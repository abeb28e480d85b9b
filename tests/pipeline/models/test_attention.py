"""Packed sequences have the logits that the model's own eager attention gives them alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertLMHeadModel, PreTrainedModel
from transformers.models.qwen3 import modeling_qwen3

from pipeline.errors import ConfigError
from pipeline.models.attention import (
    PACKED,
    PACKED_EAGER,
    Way,
    enable_packing,
    hold_in_float32,
    packing_arguments,
    way_of,
)
from pipeline.models.directory import ModelFolder
from tests.helpers.architectures import logits_alone, saved, sharpened, tiny

LENGTHS = [3, 17, 2, 9]
IDS = (torch.arange(sum(LENGTHS)) * 37 + 5) % 512


def packed(model: PreTrainedModel, ids: torch.Tensor = IDS) -> torch.Tensor:
    logits: torch.Tensor = model(
        input_ids=ids[None],
        position_ids=torch.cat([torch.arange(length) for length in LENGTHS])[None],
        use_cache=False,
        **packing_arguments(model, LENGTHS),
    ).logits[0]
    return logits


def eager(kind: str, **changes: Any) -> PreTrainedModel:
    model = tiny(kind, **changes)
    if model._can_set_attn_implementation():
        model.set_attn_implementation("eager")
    return model


PACKS = {
    "llama": PACKED,
    "qwen3": PACKED,
    "mistral": PACKED,
    "gemma2": PACKED,
    "gpt_oss": PACKED,
    "cohere2": PACKED,
}
OWN_ROWS = ["falcon", "falcon_alibi", "bloom", "mamba2", "lfm2", "falcon_h1", "granite4"]
OWN_ROWS += ["qwen3_next", "llama4"]


@pytest.mark.parametrize("kind", [*PACKS, *OWN_ROWS])
def test_packed_equals_alone_with_gradients(kind: str) -> None:
    """Logits and gradients are those of eager attention on each sequence.

    In float64, where models still take some sums, such as the softmax, in float32.
    """
    alone, model = eager(kind).double(), tiny(kind).double()
    enable_packing(model)
    assert way_of(model).own_rows == (kind in OWN_ROWS)
    if kind in PACKS:
        assert way_of(model).attention == PACKS[kind]
    expected = logits_alone(alone, IDS, LENGTHS)
    weights = torch.linspace(-1, 1, expected.numel()).reshape(expected.shape)
    (expected * weights).sum().backward()
    found = packed(model)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    (found * weights).sum().backward()
    known = dict(alone.named_parameters())
    for name, parameter in model.named_parameters():
        if known[name].grad is None:
            assert parameter.grad is None or not parameter.grad.any(), name
            continue
        off = (parameter.grad - known[name].grad).abs().max()
        assert off <= 1e-5 * known[name].grad.abs().max(), name
    torch.testing.assert_close(logits_alone(model, IDS, LENGTHS), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cap", [3.0, 10.0, 50.0])
def test_a_soft_cap_of_the_attention_is_kept(cap: float, tmp_path: Path) -> None:
    """Gemma 2 with scores that the cap bends: loaded, packed, and eager are one model."""
    path = saved(sharpened(tiny("gemma2", attn_logit_softcapping=cap), 3.0), tmp_path)
    reference = ModelFolder(path).load("float32")
    reference.set_attn_implementation("eager")
    model = ModelFolder(path).load("float32")
    with torch.no_grad():
        expected = logits_alone(reference, IDS, LENGTHS).log_softmax(-1)
        found = logits_alone(model, IDS, LENGTHS).log_softmax(-1)
        enable_packing(model)
        in_rows = packed(model).log_softmax(-1)
        reference.set_attn_implementation("sdpa")
        without = logits_alone(reference, IDS, LENGTHS).log_softmax(-1)
    for other, most in ((found, 1e-6), (in_rows, 1e-6)):
        assert (expected.exp() * (expected - other)).sum(-1).mean() < most
    assert (expected.exp() * (expected - without)).sum(-1).mean() > 2e-4, "the cap does not bite"


def test_a_model_is_loaded_with_what_its_attention_needs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capped = ModelFolder(saved(tiny("gemma2"), tmp_path / "gemma2")).load("float32")
    assert capped.config._attn_implementation == "eager"
    assert "sdpa would leave out softcap" in capsys.readouterr().err
    plain = ModelFolder(saved(tiny("qwen3"), tmp_path / "qwen3")).load("float32")
    assert plain.config._attn_implementation == "sdpa"
    assert not capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_only_the_eager_code_does_is_found_by_numbers(
    dtype: torch.dtype,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """An eager function that caps without a word in its options: sdpa cannot know of it."""
    plain = modeling_qwen3.eager_attention_forward

    def capped(module: Any, query: Any, key: Any, *rest: Any, **options: Any) -> Any:
        return plain(module, query.tanh(), key, *rest, **options)

    monkeypatch.setattr(modeling_qwen3, "eager_attention_forward", capped)
    path = saved(tiny("qwen3"), tmp_path)
    model = ModelFolder(path).load(str(dtype).removeprefix("torch."))
    assert model.config._attn_implementation == "eager"
    assert "sdpa would leave out something" in capsys.readouterr().err
    enable_packing(model)
    assert way_of(model) == Way(PACKED_EAGER)


def test_a_model_that_rounding_upsets_is_compared_in_float32(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In bfloat16 its logits under sdpa and eager differ by half; both ways are right."""
    path = saved(sharpened(tiny("llama", num_hidden_layers=16), 3.0), tmp_path)
    model = ModelFolder(path).load("bfloat16")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    enable_packing(model)
    assert way_of(model) == Way(PACKED)
    assert "sdpa would leave out" not in capsys.readouterr().err
    for name, weight in model.state_dict().items():
        assert weight.dtype == before[name].dtype
        assert torch.equal(weight, before[name])


def test_sums_of_many_terms_are_rounded_more_than_once() -> None:
    """In float32 the ways differ by 19 times what rounding the embeddings once does."""
    model = sharpened(tiny("llama", num_hidden_layers=16, hidden_size=256), 5.0)
    enable_packing(model)
    assert way_of(model) == Way(PACKED)


def test_a_model_too_large_to_be_held_in_float32_keeps_its_dtype(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = sharpened(tiny("llama", num_hidden_layers=16), 3.0).to(torch.bfloat16)
    own, calls = torch.Tensor.float, []

    def full(tensor: torch.Tensor) -> torch.Tensor:
        calls.append(tensor.shape)
        if len(calls) > 5:
            raise torch.OutOfMemoryError
        return own(tensor)

    monkeypatch.setattr(torch.Tensor, "float", full)
    dtypes = dict.fromkeys(model.parameters(), torch.bfloat16)
    hold_in_float32(dtypes)
    assert len(calls) == 6
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


def test_chunks_are_kept_however_long_they_are() -> None:
    """A chunk longer than any probe cannot be seen in its logits, but in the mask's function."""
    model = tiny("llama4", attention_chunk_size=8192)
    enable_packing(model)
    assert way_of(model).own_rows


def test_a_window_longer_than_the_probe_is_packed() -> None:
    model = tiny("mistral", sliding_window=4096)
    enable_packing(model)
    assert way_of(model) == Way(PACKED)


def test_a_packed_model_reads_padding_and_a_cache() -> None:
    """Without sequence_lengths the model is what it was, in generation too."""
    model, reference = tiny("gemma2"), eager("gemma2")
    enable_packing(model)
    prompt = IDS[None, :9]
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert model.generate(prompt, **options).equal(reference.generate(prompt, **options))
    batch, mask = torch.stack([IDS[:6], IDS[6:12]]), torch.ones(2, 6, dtype=torch.long)
    mask[1, :3] = 0
    found, expected = (m(input_ids=batch, attention_mask=mask).logits for m in (model, reference))
    torch.testing.assert_close(found[mask > 0], expected[mask > 0], rtol=1e-4, atol=1e-4)


def test_a_model_that_sees_what_follows_is_refused() -> None:
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    both_ways = BertLMHeadModel(
        BertConfig(vocab_size=512, num_attention_heads=2, initializer_range=0.3, **shape)
    )
    with pytest.raises(ConfigError, match="see each other or what follows them"):
        enable_packing(both_ways)
