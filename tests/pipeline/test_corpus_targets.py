"""Which tokens of a corpus are learnt, from its settings to its sequences."""

import copy
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers.processors import TemplateProcessing

from pipeline.config import CorpusConfig
from pipeline.corpus import Corpus
from pipeline.errors import ConfigError
from pipeline.token_sequences import read_tokens
from tests.helpers.chat_templates import CHATML, GEMMA, OPENED, tokenizer_with
from tests.helpers.corpora import write_jsonl

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


def test_documents_without_a_target_are_counted_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [{"role": "user", "content": LONG}, ONE[1]]
    read_tokens(corpus(tmp_path, [ONE, ONE[:1], asked, [*ONE, *asked]], max_length=64))
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "2 of 4 documents have nothing to learn within their first 64 tokens" in said
    read_tokens(corpus(tmp_path, [ONE]))
    read_tokens(corpus(tmp_path, [ONE, []], targets="all"))
    assert capsys.readouterr().err == ""
    with pytest.raises(ConfigError, match="none of its 1 documents has a token to learn"):
        read_tokens(corpus(tmp_path, [ONE[:1]]))


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
    slow = tokenizer_with(CHATML)
    monkeypatch.setattr(type(slow), "is_fast", property(lambda _: False))
    with pytest.raises(ConfigError, match="targets assistant: needs a fast tokenizer"):
        corpus(tmp_path, [ONE])
    assert learnt(corpus(tmp_path, [ONE], targets="all"))


def pairs(folder: Path, rows: list[dict[str, Any]], max_length: int = 1000, **given: Any) -> Corpus:
    path = write_jsonl(folder / "pairs.jsonl", rows)
    add_eos = given.pop("add_eos", True)
    template = given.pop("template", CHATML)
    config = CorpusConfig(str(path), prompt_column="q", completion_column="a", **given)
    return Corpus(config, tokenizer_with(template), max_length, add_eos)


def test_a_completion_of_text_is_learnt_with_its_end(tmp_path: Path) -> None:
    rows = [
        {"q": "Why? ", "a": "So.", "id": "x"},
        {"q": "", "a": "So."},
        {"q": "Why?", "a": ""},
        {"q": "Why?", "a": None},
        {"a": "So."},
        {"q": LONG, "a": "So."},
    ]
    found = pairs(tmp_path, rows, max_length=64)
    assert learnt(found) == ["So.</s>", "o.</s>", "</s>"]
    assert [(s.doc_id, s.document) for s in found.sequences()] == [("x", 0), ("1", 1), ("2", 2)]
    assert found.targets_identity() == {"which": "completion"}
    assert learnt(pairs(tmp_path, rows[:1], add_eos=False)) == ["So."]
    assert learnt(pairs(tmp_path, rows[:1], targets="all")) == ["hy? So.</s>"]
    (split,) = pairs(tmp_path, [{"q": "</s>", "a": "</s>"}], special_tokens="split").sequences()
    assert split.input_ids.tolist().count(found.tokenizer.eos_token_id) == 1
    assert learnt(pairs(tmp_path, [{"q": "a", "a": "b</s>"}])) == ["b</s>"]


def test_tokens_at_both_ends_are_counted_once(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(CHATML)
    made = copy.deepcopy(tokenizer)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", bos), ("</s>", eos)]
    )
    path = write_jsonl(tmp_path / "c.jsonl", [{"q": "<s>a", "a": " b</s>"}, {"q": "a", "a": " b"}])
    config = CorpusConfig(str(path), prompt_column="q", completion_column="a")
    a, b = (tokenizer.tokenize(text)[0] for text in ("a", " b"))
    for sequence in Corpus(config, made, 100).sequences():
        assert tokenizer.convert_ids_to_tokens(sequence.input_ids) == ["<s>", a, b, "</s>"]
        assert sequence.targets.tolist() == [False, False, True, True]


MESSAGES = [
    {"q": ONE[:1], "a": ONE[1:]},
    {"q": [*ONE, ONE[0]], "a": [ONE[1], *ONE]},
    {"q": ONE[:1], "a": []},
]


def test_a_completion_of_messages_is_what_follows_the_prompt(tmp_path: Path) -> None:
    found = pairs(tmp_path, MESSAGES)
    assert learnt(found) == [
        "b<|im_end|>",
        "b<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>",
    ]
    assert learnt(pairs(tmp_path, MESSAGES[1:], targets="assistant")) == ["b<|im_end|>" * 3]
    whole = corpus(tmp_path, [MESSAGES[1]["q"] + MESSAGES[1]["a"]], targets="all")
    assert [s.input_ids.tolist() for s in whole.sequences()] == [
        s.input_ids.tolist() for s in pairs(tmp_path, MESSAGES[1:]).sequences()
    ]
    reasoned = {"role": "assistant", "content": "b", "reasoning_content": "r"}
    rows = [{"q": [ONE[0], reasoned, ONE[0]], "a": [reasoned]}]
    assert learnt(pairs(tmp_path, rows, template=OPENED)) == ["r\n</think>\n\nb<|im_end|>"]


@pytest.mark.parametrize(
    ("rows", "given", "words"),
    [
        ([{"q": "a", "a": "b"}, {"q": ONE, "a": ONE}], {}, "document 1: expected text in .* 'q'"),
        ([{"q": "a", "a": ONE}], {}, "document 0: expected text in column 'a', found list"),
        ([{"q": ONE, "a": "b"}], {}, "document 0: expected a list of messages, found text"),
        ([{"q": "a", "b": "b"}], {}, "no column 'a'; it has b, q. Set corpus.prompt_column"),
        ([{"q": "a", "a": "b"}], {"targets": "assistant"}, "has text in column 'q', not messages"),
        ([{"q": ONE, "a": ONE, "tools": 5}], {}, "document 0: tools: expected a list of objects"),
    ],
)  # fmt: skip
def test_bad_pairs_say_what_is_wrong(
    tmp_path: Path, rows: list[Any], given: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=f"corpus .*pairs.jsonl.*{words}"):
        list(pairs(tmp_path, rows, **given).sequences())


def test_settings_that_do_not_fit_are_refused() -> None:
    for given, words in [
        ({"prompt_column": "q"}, "documents need both"),
        ({"completion_column": "q"}, "documents need both"),
        ({"targets": "completion"}, "needs prompt_column and completion_column"),
        ({"targets": "completion", "messages_column": "m"}, "needs prompt_column"),
        ({"targets": "assistant"}, "only chats have an assistant.*messages_column"),
        (
            {"prompt_column": "q", "completion_column": "a", "messages_column": "m"},
            "messages_column and prompt_column: documents are either",
        ),
    ]:
        with pytest.raises(ConfigError, match=words):
            CorpusConfig("c", **given)


TOOLS = [{"type": "function", "function": {"name": "add"}}]
CALLING = [{"messages": ONE, "tools": TOOLS}, {"messages": ONE}]


def as_lines(folder: Path) -> str:
    return str(write_jsonl(folder / "a.jsonl", CALLING))


def as_text_of_json(folder: Path) -> str:
    rows = [{**row, "tools": json.dumps(row.get("tools"))} for row in CALLING]
    return str(write_jsonl(folder / "b.jsonl", rows))


def as_parquet(folder: Path) -> str:
    pq.write_table(pa.Table.from_pylist(CALLING), folder / "a.parquet")
    return str(folder / "a.parquet")


def as_hub_name(folder: Path) -> str:
    pq.write_table(pa.Table.from_pylist(CALLING), folder / "a.parquet")
    return "owner/name"


@pytest.mark.parametrize("write", [as_lines, as_text_of_json, as_parquet, as_hub_name])
def test_tools_go_to_the_template(
    tmp_path: Path, write: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path)
    rows = datasets.Dataset.from_list([{"messages": ONE, "tools": TOOLS}, CALLING[1]])
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    config = CorpusConfig(path, messages_column="messages", targets="assistant")
    found = Corpus(config, tokenizer_with(CHATML), 1000)
    texts = [found.text(at) for at in range(2)]
    assert [json.dumps(TOOLS[0]) in text for text in texts] == [True, False]
    assert learnt(found) == ["b<|im_end|>"] * 2
