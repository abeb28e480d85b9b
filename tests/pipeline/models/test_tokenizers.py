"""Two tokenizers: the same, however they are written, or different by an example."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from pipeline.models import tokenizers
from pipeline.models.tokenizers import behaviour, excerpt, first_difference
from tests.helpers.models import TEXTS, tiny_tokenizer

Tokenizer = PreTrainedTokenizerFast


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("base")
    tiny_tokenizer(path)
    return Tokenizer.from_pretrained(path)


def rewritten(base: Tokenizer, path: Path, change: Callable[[Any], None]) -> Tokenizer:
    """Saved, tokenizer.json changed, and loaded."""
    base.save_pretrained(path)
    content = json.loads((path / "tokenizer.json").read_text())
    change(content)
    (path / "tokenizer.json").write_text(json.dumps(content, indent=1, sort_keys=True))
    loaded: Tokenizer = AutoTokenizer.from_pretrained(path)
    return loaded


def test_how_files_are_written_does_not_matter(base: Tokenizer, tmp_path: Path) -> None:
    def older(content: Any) -> None:  # merges as one string, vocabulary in another order
        merges = content["model"]["merges"]
        content["model"]["merges"] = [" ".join(merge) for merge in merges]
        content["model"]["vocab"] = dict(reversed(content["model"]["vocab"].items()))

    same = rewritten(base, tmp_path, older)
    same.pad_token, same.padding_side = "A", "left"
    assert first_difference(base, same, TEXTS[:3]) is None


def test_added_tokens_are_no_difference_where_they_do_not_occur(base: Tokenizer) -> None:
    more = Tokenizer.from_pretrained(base.name_or_path)
    more.add_tokens(["function", AddedToken("<x>", special=True)])
    more.pad_token = "<x>"
    assert any("function" in text for text in TEXTS[:3])
    assert first_difference(base, more, TEXTS[:3]) is None
    found = first_difference(more, base)  # the other way round, tokens are missing
    assert found == "the token 'function' is 512 in the dump, none of the student"


def test_an_id_that_is_another_token(base: Tokenizer, tmp_path: Path) -> None:
    def swap(content: Any) -> None:
        vocabulary = content["model"]["vocab"]
        vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]

    other = rewritten(base, tmp_path, swap)
    found = first_difference(base, other, names=("one", "two"))
    assert found == "the token 'A' is 33 in one, 34 in two"


def test_other_merges(base: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A merge is gone; its token, with its id, is not. No text has to hold it."""
    model = json.loads(base.backend_tokenizer.to_str())["model"]
    merge = next(merge for merge in reversed(model["merges"]) if "".join(merge).isascii())
    token = "".join(merge)

    def fewer(content: Any) -> None:
        content["model"]["merges"].remove(merge)

    other = rewritten(base, tmp_path, fewer)
    assert base.get_vocab() == other.get_vocab()
    assert first_difference(base, other) is not None
    monkeypatch.setattr(tokenizers, "PROBES", ())
    found = first_difference(base, other)
    assert found is not None
    assert found.startswith(f"the text {token!r} is [{model['vocab'][token]}] in the dump, [")


def test_merges_that_were_learnt_beside_the_base_s_own(base: Tokenizer, tmp_path: Path) -> None:
    """All ids are shared, and most text is read otherwise."""
    longer = tiny_tokenizer(tmp_path, 600)
    assert base.get_vocab().items() <= longer.get_vocab().items()
    assert "the text" in str(first_difference(base, longer))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"normalizer": {"type": "NFC"}}, r"'café"),
        ({"normalizer": {"type": "NFKC"}}, "'  two  spaces"),  # among them a no-break space
        ({"normalizer": {"type": "Lowercase"}}, '"The quick'),
        ({"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}}, "'  two"),
        (
            {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True,
                               "trim_offsets": True}},
            '"The quick',
        ),
    ],
    ids=["NFC", "NFKC", "lowercase", "strip", "prefix space"],
)  # fmt: skip
def test_other_rules(base: Tokenizer, tmp_path: Path, change: Any, text: str) -> None:
    other = rewritten(base, tmp_path, lambda content: content.update(change))
    found = first_difference(base, other)
    assert found is not None
    assert found.startswith(f"the text {text}")


def test_begin_and_end_of_text_count_as_they_are_used(base: Tokenizer, tmp_path: Path) -> None:
    other = rewritten(base, tmp_path, lambda content: None)
    other.bos_token = "A"  # added to nothing
    assert first_difference(base, other) is None
    other.eos_token = "B"
    assert "documents end with '<eos>' (0) in the dump" in str(first_difference(base, other))
    assert first_difference(base, other, add_eos=False) is None


def test_the_excerpt_shows_where_ids_part() -> None:
    assert excerpt([1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 9]) == "… [2, 3, 4, 5, 6, 7] …"
    assert excerpt([1, 2], [1, 2, 3]) == "[1, 2]"


def test_a_behaviour_lasts(base: Tokenizer, tmp_path: Path) -> None:
    """Whatever was called before, and when the files are written again."""
    before = behaviour(base)
    base(["a", "b c"], truncation=True, max_length=3)
    assert behaviour(base) == before
    assert behaviour(rewritten(base, tmp_path, lambda content: None)) == before


def lower(content: Any) -> None:
    content["normalizer"] = {"type": "Lowercase"}


def unmerged(content: Any) -> None:
    content["model"]["merges"].pop()


@pytest.mark.parametrize("change", [lower, unmerged])
def test_another_rule_is_another_behaviour(
    base: Tokenizer, tmp_path: Path, change: Callable[[Any], None]
) -> None:
    assert behaviour(rewritten(base, tmp_path, change)) != behaviour(base)


def test_templates_and_special_tokens_are_behaviour(base: Tokenizer) -> None:
    found = {behaviour(base)}
    for name, value in [("chat_template", "x"), ("bos_token", "<b>"), ("eos_token", "a")]:
        other = copy.deepcopy(base)
        setattr(other, name, value)
        found.add(behaviour(other))
    assert len(found) == 4


def test_a_slow_tokenizer_is_known_by_its_files() -> None:
    slow = ByT5Tokenizer()
    assert not slow.is_fast
    assert behaviour(slow) == behaviour(ByT5Tokenizer()) != behaviour(ByT5Tokenizer(extra_ids=7))
