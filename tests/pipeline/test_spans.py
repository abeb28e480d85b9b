"""Characters that are learnt become tokens that are, with every kind of fast tokenizer."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from pipeline.spans import Text, TokenPlaces, mask_of
from tests.helpers.models import TEXTS, tiny_tokenizer


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    return tiny_tokenizer(tmp_path_factory.mktemp("t"))


@pytest.fixture(scope="module")
def trimming(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    """As those of GPT-2 and Llama 3: their offsets leave out spaces."""
    made = tiny_tokenizer(tmp_path_factory.mktemp("t"))
    made.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return made


def with_framing() -> PreTrainedTokenizerFast:
    """Words, with the space before them as a mark, and tokens at both ends of a text."""
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=False))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    made.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    made.train_from_iterator(TEXTS[:3], trainer)
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def learnt(tokenizer: PreTrainedTokenizerFast, marked: str) -> list[str]:
    """The learnt tokens of a text with «marks»."""
    spans, text = [], ""
    for number, piece in enumerate(marked.replace("»", "«").split("«")):
        spans += [(len(text), len(text) + len(piece))] * (number % 2)
        text += piece
    found = tokenizer(text, return_offsets_mapping=True)
    places = TokenPlaces(tokenizer).of(text, found["input_ids"], found["offset_mapping"])
    mask = mask_of(spans, places)
    assert len(mask) == len(found["input_ids"])
    names = tokenizer.convert_ids_to_tokens(found["input_ids"])
    return [name for name, is_learnt in zip(names, mask.tolist(), strict=True) if is_learnt]


def test_a_token_that_crosses_a_border_is_learnt(byte_level: PreTrainedTokenizerFast) -> None:
    (token,) = byte_level.tokenize(" the")
    assert learnt(byte_level, "in th«e» end") == learnt(byte_level, "in« »the end") == [token]
    assert learnt(byte_level, "a«»b") == learnt(byte_level, "ab") == []
    assert learnt(byte_level, "«ab»") == byte_level.tokenize("ab")


def test_each_byte_of_a_character_is_learnt(byte_level: PreTrainedTokenizerFast) -> None:
    assert learnt(byte_level, "a«🙂»b") == byte_level.tokenize("🙂")
    assert len(byte_level.tokenize("🙂")) > 1


def test_white_space_that_offsets_leave_out_is_learnt(
    trimming: PreTrainedTokenizerFast, byte_level: PreTrainedTokenizerFast
) -> None:
    found = trimming("a  <eos>", return_offsets_mapping=True)
    assert any(start == stop for start, stop in found["offset_mapping"])
    for marked in ("a«\n   \n b»", "a«  »<eos>", "a«  b  »\nc", "«a »<eos>", "a«   »\n« b»"):
        assert learnt(trimming, marked) == learnt(byte_level, marked) != []


def test_tokens_that_frame_a_text_are_not_learnt() -> None:
    tokenizer = with_framing()
    text = "in the end"
    whole = tokenizer(text).tokens()
    assert [whole[0], whole[-1]] == ["<s>", "</s>"]
    assert learnt(tokenizer, f"«{text}»") == whole[1:-1]
    assert (
        learnt(tokenizer, "in the« end»")
        == tokenizer.tokenize("in the end")[-len(tokenizer.tokenize("end")) :]
    )


def with_bytes() -> PreTrainedTokenizerFast:
    """As Llama 2: a mark before each text, and the bytes of characters that are no words."""
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))],
        initial_alphabet=list("▁abci"),
        show_progress=False,
    )
    made.train_from_iterator(["a b c"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")


def test_bytes_that_stand_for_a_character_are_learnt() -> None:
    tokenizer = with_bytes()
    assert learnt(tokenizer, "a «é»b") == ["<0xC3>", "<0xA9>"]
    assert learnt(tokenizer, "a« é»b")[-2:] == ["<0xC3>", "<0xA9>"]
    assert learnt(tokenizer, "«a» éb") == tokenizer.tokenize("a éb")[:1]
    assert learnt(tokenizer, "a é«b»") == tokenizer.tokenize("a éb")[-1:]


@pytest.mark.parametrize("strip", ["lstrip", "rstrip"])
def test_white_space_that_a_special_token_takes_in_is_not_its_own(
    tmp_path: Path, strip: str
) -> None:
    tokenizer = tiny_tokenizer(tmp_path)
    token = AddedToken("<turn>", special=True, **{strip: True})
    tokenizer.add_special_tokens({"additional_special_tokens": [token]})
    assert "<turn>" not in learnt(tokenizer, "a<turn>«\n b»")
    assert "<turn>" not in learnt(tokenizer, "«a \n»<turn>b")
    assert learnt(tokenizer, "a«<turn>»\n") == ["<turn>"]
    assert learnt(tokenizer, "a\n«<turn>»") == ["<turn>"]


@settings(max_examples=100, deadline=None)
@given(st.text("ab \n\té🙂中", max_size=20), st.data())
def test_places_are_those_of_the_characters(
    byte_level: PreTrainedTokenizerFast, text: str, data: st.DataObject
) -> None:
    """A span has the tokens with one of its bytes, counted by bytes."""
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, len(text))] * 2)))
    found = byte_level(text, return_offsets_mapping=True)
    places = TokenPlaces(byte_level).of(text, found["input_ids"], found["offset_mapping"])
    edges = np.cumsum([0, *map(len, byte_level.tokenize(text))]).tolist()  # in bytes
    first, last = (len(text[:at].encode()) for at in (start, stop))
    expected = [
        first < last and before < last and after > first
        for before, after in itertools.pairwise(edges)
    ]
    assert mask_of([(start, stop)], places).tolist() == expected


def test_the_head_of_a_text_keeps_what_is_known() -> None:
    text = Text.of("abcdef", [(0, 2), (3, 6)], {"a": "x"})
    head = text.head(4)
    assert (head, head.spans, head.spelled) == ("abcd", [(0, 2), (3, 4)], {"a": "x"})
    assert text.head(3).spans == [(0, 2)]
    assert Text("abc").head(2).spans is None
