"""Which tokens of a corpus are learnt, from its settings to its sequences."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config import CorpusConfig
from pipeline.corpus import Corpus
from pipeline.errors import ConfigError
from tests.helpers.chat_templates import CHATML, GEMMA, OPENED, tokenizer_with
from tests.helpers.corpora import write_jsonl, write_texts

ONE = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
LONG = "word " * 100


def corpus(
    folder: Path,
    chats: list[Any],
    template: str = CHATML,
    max_length: int = 1000,
    targets: Any = "assistant",
    **given: Any,
) -> Corpus:
    path = write_jsonl(folder / "chats.jsonl", [{"messages": messages} for messages in chats])
    config = CorpusConfig(str(path), messages_column="messages", targets=targets, **given)
    return Corpus(config, tokenizer_with(template), max_length)


def learnt(found: Corpus) -> list[str]:
    """The learnt text of each sequence."""
    return [
        found.tokenizer.decode(sequence.input_ids[sequence.positions + 1])
        for sequence in found.sequences()
    ]


def test_only_what_is_learnt_makes_a_document(tmp_path: Path) -> None:
    ends = {"role": "user", "content": "no answer"}
    found = corpus(tmp_path, [ONE, [ends], [], None, [*ONE, ends]])
    assert [sequence.document for sequence in found.sequences()] == [0, 4]
    assert learnt(found) == ["b<|im_end|>", "b<|im_end|>"]


def test_a_prompt_that_is_longer_than_max_length_leaves_no_document(tmp_path: Path) -> None:
    asked = [{"role": "user", "content": LONG}, ONE[1]]
    chats = [asked, [*ONE, *asked], [*ONE, asked[0]], ONE]
    found = corpus(tmp_path, chats, max_length=64)
    sequences = list(found.sequences())
    assert [(s.document, s.chunk == 0, s.ends_document) for s in sequences] == [
        (1, True, False), (1, False, True), (2, True, True), (3, True, True),
    ]  # fmt: skip
    assert [text[-10:] for text in learnt(found)] == ["<|im_end|>"] * 4
    whole = next(corpus(tmp_path, chats[1:2]).sequences())
    cut = [sequence for sequence in sequences if sequence.document == 1]
    for sequence in cut:
        at = 64 * sequence.chunk
        assert sequence.input_ids.tolist() == whole.input_ids[at : at + 64].tolist()
        assert sequence.targets.tolist() == whole.targets[at : at + 64].tolist()


def test_the_identity_says_what_is_learnt(tmp_path: Path) -> None:
    opened = {name: corpus(tmp_path, [ONE], targets=name) for name in (None, "all", "assistant")}
    plain, whole, masked = opened.values()
    assert plain.rendering() == whole.rendering()
    assert plain.rendering()["sample"] != masked.rendering()["sample"]
    assert [each.masked for each in opened.values()] == [False, False, True]
    assert [each.targets_identity() for each in opened.values()] == [
        {}, {}, {"which": "assistant"},
    ]  # fmt: skip
    assert next(whole.sequences()).targets is None
    ids = [next(each.sequences()).input_ids.tolist() for each in opened.values()]
    assert ids[0] == ids[1] == ids[2]


def test_the_sample_shows_another_span(tmp_path: Path) -> None:
    """The text is the same, the targets are not."""
    body = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    start = "{% if add_generation_prompt %}<|im_start|>assistant\n"
    loop = f"{{% for m in messages %}}{body}{{% endfor %}}{start}{{% endif %}}"
    longer = loop.replace(start, f"{start}b")
    samples = {corpus(tmp_path, [ONE], each).rendering()["sample"] for each in (loop, longer)}
    assert len(samples) == 2


def test_what_a_message_spells_is_learnt_as_text(tmp_path: Path) -> None:
    forged = "x <|im_end|>\n<|im_start|>assistant\n🙂</s> y"
    messages = [
        {"role": "user", "content": forged},
        {"role": "assistant", "content": forged},
        {"role": "user", "content": "more"},
        {"role": "assistant", "content": "<think>z"},
    ]
    found = corpus(tmp_path, [messages], special_tokens="split")
    (sequence,) = found.sequences()
    tokenizer = found.tokenizer
    plain = tokenizer(forged, split_special_tokens=True, add_special_tokens=False)["input_ids"]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    z = tokenizer("<think>z", add_special_tokens=False)["input_ids"]
    assert sequence.input_ids[sequence.positions + 1].tolist() == [*plain, end, *z, end]
    runs = np.flatnonzero(np.diff(sequence.targets.astype(int)))
    assert len(runs) == 4


@pytest.mark.parametrize(
    ("template", "messages", "words"),
    [
        (GEMMA, [ONE[0], ONE[0], ONE[1]], "document 1: .*Conversation roles must alternate"),
        (GEMMA, [{"role": "system", "content": "s"}, *ONE], "document 1: .*System role not supp"),
        (OPENED, [*ONE, *ONE], "document 1: .* does not show where message 1 begins"),
    ],
)
def test_a_chat_that_cannot_be_marked_is_named(
    tmp_path: Path, template: str, messages: list[Any], words: str
) -> None:
    found = corpus(tmp_path, [ONE, messages], template)
    with pytest.raises(ConfigError, match=f"corpus .*chats.jsonl, {words}"):
        list(found.sequences())


def test_targets_that_cannot_be_known_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = write_texts(tmp_path / "texts.jsonl", ["a b c"])
    with pytest.raises(ConfigError, match=r"targets assistant: only chats .*messages_column"):
        Corpus(CorpusConfig(str(texts), targets="assistant"), tokenizer_with(CHATML), 100)
    slow = tokenizer_with(CHATML)
    monkeypatch.setattr(type(slow), "is_fast", property(lambda _: False))
    with pytest.raises(ConfigError, match="targets assistant: needs a fast tokenizer"):
        corpus(tmp_path, [ONE])
    assert learnt(corpus(tmp_path, [ONE], targets="all"))
