"""Whether two tokenizers do the same, however their files are written.

A dump's ids mean the same tokens to a student whose tokenizer gives every token of the base the
same id, and reads text as the base's does. It may have more tokens: added ones, and then text that
holds them is not compared.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import tokenizers
import transformers
from transformers import PreTrainedTokenizerBase

from pipeline.types import Json

PROBES = (
    "The quick brown fox can't jump; it's 12:45, isn't it? I'LL, we've, THEY'RE.",
    "  two  spaces,   three,\ta tab,\n\n\nlines\r\nand \u00a0\u2003\u3000spaces \u200bof none ",
    " leading", "trailing ", "", " ", "\n", "\ufeffmark", "end\u2028",
    "0 1 12 123 1234 12345 1234567890 3.14159 1,000,000 0x1F 10^-3 ½ ² ⅷ ٣٤٥ 四十二",
    "café naïve Ångström", "cafe\u0301 nai\u0308ve A\u030angstro\u0308m",  # NFC, NFD
    "ﬁne ﬂow ﬀ ½ ① ｆｕｌｌ ｗｉｄｔｈ ℌ ㎏ ™ …",  # what NFKC changes
    "ÀÉÎÕÜ àéîõü ẞ ß İ ı Ǆ ǆ Σσς", "MiXeD CaSe camelCase snake_case SCREAMING_CASE",
    "def f(x: int) -> str:\n    return f\"{x!r}\"  # comment\n\n\tif (a<=b && c!=d) { i++; } /* */",
    "https://example.org/a?b=c&d=%20#e user@example.org C:\\path\\file.txt $HOME `ls -l`",
    "“quotes” ‘single’ «guillemets» — – - ‐ − _ * ** ~~ <b>html</b> &amp; {{x}} [[y]] \\frac{1}",
    "Привет, мир! Съешь же ещё этих мягких булок", "Γειά σου Κόσμε ἀρχή", "Xin chào, Việt Nam ơi",
    "你好，世界。我们在测试分词器。", "こんにちは、世界！カタカナとひらがな ｶﾀｶﾅ",
    "안녕하세요 세계 \u1100\u1161\u11a8", "مرحبا بالعالم السَّلَامُ", "שלום עולם שָׁלוֹם",
    "नमस्ते दुनिया क्षत्रिय", "สวัสดีชาวโลก", "გამარჯობა Բարեւ ሰላም",
    "🙂 👩\u200d👩\u200d👧 👍🏽 🇩🇪 ❤\ufe0f ∑∫√≈ ∀x∈ℝ →⇒ ░▒▓",
    "a\u0000b \u0007 \u001b[0m \x7f \u202eabc\u202c", "antidisestablishmentarianism",
    "aaaaaaaaaaaaaaaaaaaaaaaa ==================== ........ !!!??? ,,,, ((((",
    "<s> </s> <pad> <unk> <|endoftext|> <|im_start|>user\n<|im_end|> [INST] [/INST] <eos> [MASK]",
)  # fmt: skip
"""Texts whose tokens show merges, normalisation, digits, spaces, scripts and special tokens."""
CALLS = ("truncation", "padding")  # rules that each call sets anew
PIECE = 200  # characters of a text that are compared at a time
AT_ONCE = 4096  # texts that are read at a time
SHOWN = 60  # characters of an example, and ids beside it


def first_difference(
    base: PreTrainedTokenizerBase,
    other: PreTrainedTokenizerBase,
    texts: Iterable[str] = (),
    add_eos: bool = True,
    names: tuple[str, str] = ("the dump", "the student"),
) -> str | None:
    """The first example of what `other` does differently, or None; `names` are said for the two.

    Compares the ids of the base's tokens, the end-of-text token where `add_eos` says that it is
    used, and how PROBES, `texts` and the text of each token are read: a token whose merge is gone
    is read as its parts. The padding token and the order of files and added
    tokens do not matter.
    """
    ours, theirs = base.get_vocab(), other.get_vocab()
    for token, number in sorted(ours.items(), key=lambda item: item[1]):
        if theirs.get(token) != number:
            found = f"{theirs[token]} in" if token in theirs else "none of"
            return f"the token {shown(token)} is {number} in {names[0]}, {found} {names[1]}"
    if add_eos and base.eos_token_id != other.eos_token_id:
        return (
            f"documents end with {base.eos_token!r} ({base.eos_token_id}) in {names[0]}, with "
            f"{other.eos_token!r} ({other.eos_token_id}) in {names[1]}"
        )
    if rules(base) is not None and rules(base) == rules(other):
        return None
    added = set(other.get_added_vocab().values()) - set(ours.values())
    tokens = base.batch_decode([[number] for number in sorted(ours.values())])
    for text, one, two in read_by_both(base, other, [*pieces([*PROBES, *texts]), *tokens]):
        if one != two and not added.intersection(two):
            return (
                f"the text {shown(text)} is {excerpt(one, two)} in {names[0]}, "
                f"{excerpt(two, one)} in {names[1]}"
            )
    return None


def vocabulary_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """The tokenizer's ids are below it."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def rules(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """All that decides how a fast tokenizer reads text; None for a slow one."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return None if backend is None else str(backend.to_str())


def behaviour(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of all that decides how a tokenizer makes ids of texts and chats.

    Equal ones make equal ids. The releases of the libraries are part of it.
    """
    found = [
        [tokenizers.__version__, transformers.__version__, type(tokenizer).__name__],
        lasting_rules(tokenizer),
        [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.special_tokens_map],
        [tokenizer.chat_template, getattr(tokenizer, "split_special_tokens", False)],
    ]
    return hashlib.sha256(json.dumps(found, default=str).encode()).hexdigest()


def lasting_rules(tokenizer: PreTrainedTokenizerBase) -> Json:
    """`rules` without what a call leaves behind; of a slow tokenizer, its files."""
    text = rules(tokenizer)
    if text is not None:
        found: Json = json.loads(text)
        return {name: part for name, part in found.items() if name not in CALLS}
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = sorted(each for each in Path(folder).rglob("*") if each.is_file())
        return {each.name: hashlib.sha256(each.read_bytes()).hexdigest() for each in files}


def read_by_both(
    base: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, texts: list[str]
) -> Iterator[tuple[str, list[int], list[int]]]:
    """Yield (text, its ids by `base`, its ids by `other`)."""
    for at in range(0, len(texts), AT_ONCE):
        some = texts[at : at + AT_ONCE]
        one, two = (
            each(some, verbose=False, return_attention_mask=False)["input_ids"]
            for each in (base, other)
        )
        yield from zip(some, one, two, strict=True)


def pieces(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        yield from (text[at : at + PIECE] for at in range(0, max(len(text), 1), PIECE))


def shown(text: str) -> str:
    return repr(text if len(text) <= SHOWN else text[: SHOWN - 1] + "…")


def excerpt(ids: list[int], other: list[int]) -> str:
    """The ids around the first that differs, with their place."""
    pairs = enumerate(zip(ids, other, strict=False))
    at = next((at for at, (one, two) in pairs if one != two), min(len(ids), len(other)))
    start = max(0, at - 2)
    return f"{'… ' * bool(start)}{ids[start : at + 4]}{' …' * (at + 4 < len(ids))}"
