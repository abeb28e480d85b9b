"""Conversations that the base answers: what it is asked, what is kept, and when its turn ends."""

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from pipeline import generate
from pipeline.chats import ChatTemplate
from pipeline.config import CorpusConfig, GenerateConfig
from pipeline.corpus import Corpus
from pipeline.dump import dump
from pipeline.errors import ConfigError, Interrupted, RefusedError
from pipeline.models.directory import ModelFolder
from pipeline.progress import Progress
from pipeline.replies import turns
from tests.helpers import chat_templates
from tests.helpers.chat_templates import tokenizer_with
from tests.helpers.chats import CHATML, chat_model, chat_tokenizer
from tests.helpers.corpora import some_texts, write_jsonl
from tests.helpers.dumps import settings as dump_settings
from tests.helpers.paths import SCRIPTS

EOS = 0


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    return chat_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def chat(*texts: str, system: str = "") -> list[dict[str, str]]:
    """A user and the assistant in turn, after a system's turn."""
    roles = ["user", "assistant"] * len(texts)
    found = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return [{"role": "system", "content": system}] * bool(system) + found


class Fake:
    """Says what a function makes of a prompt's text and the seed; None never ends."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        answer: Callable[[str, int], str | None],
        end: str = "<|im_end|>",
        calls: int = 1000,
    ) -> None:
        self.tokenizer, self.answer, self.left = tokenizer, answer, calls
        self.end = tokenizer.convert_tokens_to_ids(end) if end else None  # the last of `stops`
        self.asked: list[str] = []
        self.prompts: list[list[int]] = []
        self.stops: list[int] = []

    def generate(self, prompts: Any, seeds: Any, temperature: Any, top_p: Any, stops: Any) -> Any:
        if not self.left:
            raise Interrupted("cut off")
        self.left, self.stops = self.left - 1, stops
        texts = [self.tokenizer.decode(prompt) for prompt in prompts]
        self.asked, self.prompts = self.asked + texts, self.prompts + prompts
        answers = [self.answer(text, seed) for text, seed in zip(texts, seeds, strict=True)]
        end = stops[-1] if self.end is None else self.end
        return [[300] * 40 if text is None else [*self.ids(text), end] for text in answers]

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


def counting(text: str, seed: int) -> str:
    """Another answer for each prompt."""
    return f"No {text.count('assistant')} to {text.split('user')[-1][:20].split('<')[0].strip()}!"


def settings(tmp_path: Path, chats: list[Any], **changes: Any) -> GenerateConfig:
    path = write_jsonl(tmp_path / "prompts.jsonl", [{"messages": each} for each in chats])
    given = {
        "model": "m",
        "output": str(tmp_path / "out"),
        "prompts": CorpusConfig(str(path), messages_column="messages"),
        "min_length": 0,
        "batch": 4,
        **changes,
    }
    return GenerateConfig(**given)


def write(config: GenerateConfig, tokenizer: Any, fake: Any, ends: list[int] | None = None) -> Any:
    progress = Progress(unit="token")
    try:
        return generate.write(config, tokenizer, fake, progress, [EOS] if ends is None else ends)
    finally:
        progress.close()


def written(path: Path) -> list[dict[str, Any]]:
    files = sorted(path.glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def contents(document: dict[str, Any]) -> list[str]:
    return [f"{each['role'][0]} {each['content']}" for each in document["messages"]]


@pytest.mark.parametrize(
    ("roles", "every", "last"),
    [
        ("ua", ["u"], ["u"]),
        ("u", ["u"], ["u"]),
        ("suaua", ["su", "u"], ["suau"]),
        ("suauau", ["su", "u", "u"], ["suauau"]),
        ("uaau", ["u", "u"], ["uaau"]),
        ("uaa", ["u"], ["u"]),
        ("aua", ["au"], ["au"]),
        ("uuas", ["uu", "s"], ["uuas"]),
        ("", [], []),
        ("s", [], []),
        ("sa", [], []),
    ],
)
def test_turns(roles: str, every: list[str], last: list[str]) -> None:
    names = {"s": "system", "u": "user", "a": "assistant"}
    messages = [{"role": names[each], "at": at} for at, each in enumerate(roles)]
    for which, expected in (("all", every), ("last", last)):
        found = turns(messages, which)  # type: ignore[arg-type]
        assert ["".join(each["role"][0] for each in part) for part in found] == expected
    assert turns(messages, "last") == [messages[: len(part)] for part in last]


def test_every_turn_is_answered_anew(tmp_path: Path, tokenizer: Any) -> None:
    chats = [chat("one", "old", "two", "old", system="be"), chat("three", "old", "four")]
    fake = Fake(tokenizer, counting)
    totals = write(settings(tmp_path, chats), tokenizer, fake)
    first, second = written(tmp_path / "out")
    assert contents(first) == ["s be", "u one", "a No 1 to one!", "u two", "a No 2 to two!"]
    assert contents(second) == ["u three", "a No 1 to three!", "u four", "a No 2 to four!"]
    assert (totals["documents"], totals["dropped"], totals["why"]) == (2, 0, {})
    assert not any("old" in prompt for prompt in fake.asked)
    for document in (first, second):
        text = tokenizer.apply_chat_template(document["messages"], tokenize=False)
        asked = [prompt for prompt in fake.asked if text.startswith(prompt)]
        assert len(asked) == 2
        assert all(prompt.endswith("<|im_start|>assistant\n") for prompt in asked)
        whole = tokenizer(text.rstrip(), add_special_tokens=False)["input_ids"]
        assert document["tokens"] == len(whole) - 1  # the end


def test_only_the_last_turn_is_answered(tmp_path: Path, tokenizer: Any) -> None:
    chats = [chat("one", "old", "two", "gone"), chat("three", "old", "four")]
    write(settings(tmp_path, chats, replies="last"), tokenizer, Fake(tokenizer, counting))
    assert [contents(each) for each in written(tmp_path / "out")] == [
        ["u one", "a old", "u two", "a No 2 to two!"],
        ["u three", "a old", "u four", "a No 2 to four!"],
    ]


@pytest.mark.parametrize(
    ("row", "columns", "expected"),
    [
        ({"text": "one"}, {}, ["u one", "a No 1 to one!"]),
        ({"ask": "one"}, {"text_column": "ask"}, ["u one", "a No 1 to one!"]),
        ({"ask": "one", "say": "old"}, {"prompt_column": "ask"}, ["u one", "a No 1 to one!"]),
        (
            {"ask": chat("one", "old", "two"), "say": chat("", "old")[1:]},
            {"prompt_column": "ask"},
            ["u one", "a No 1 to one!", "u two", "a No 2 to two!"],
        ),
        (
            {"c": [{"from": "human", "value": "one"}, {"from": "gpt", "value": "old"}]},
            {"messages_column": "c"},
            ["u one", "a No 1 to one!"],
        ),
    ],
)
def test_prompts_of_other_kinds(
    tmp_path: Path, tokenizer: Any, row: Any, columns: Any, expected: list[str]
) -> None:
    path = write_jsonl(tmp_path / "asked.jsonl", [row])
    more = {"completion_column": "say"} if "prompt_column" in columns else {}
    prompts = CorpusConfig(str(path), **columns, **more)
    replies = None if columns.keys() - {"text_column"} else "all"
    config = settings(tmp_path, [], prompts=prompts, replies=replies)
    write(config, tokenizer, Fake(tokenizer, counting))
    assert [contents(each) for each in written(tmp_path / "out")] == [expected]


def test_tools_are_told_to_the_template_and_kept(tmp_path: Path) -> None:
    tools = [{"name": "look"}]
    rows = [{"messages": chat("one"), "tools": tools}, {"messages": chat("two")}]
    path = write_jsonl(tmp_path / "asked.jsonl", rows)
    tokenizer = tokenizer_with("{{ tools }}" + CHATML)
    config = settings(tmp_path, [], prompts=CorpusConfig(str(path), messages_column="messages"))
    fake = Fake(tokenizer, counting)
    write(config, tokenizer, fake)
    assert [each.get("tools") for each in written(tmp_path / "out")] == [tools, None]
    assert ["look" in prompt for prompt in fake.asked] == [True, False]


def test_a_model_without_a_chat_template_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    path = write_jsonl(tmp_path / "asked.jsonl", [{"text": "one"}])
    plain = copy.copy(tokenizer)
    plain.chat_template = None
    config = settings(tmp_path, [], prompts=CorpusConfig(str(path)), replies="all")
    with pytest.raises(ConfigError, match="no chat template"):
        write(config, plain, Fake(tokenizer, counting))


def test_the_result_is_a_corpus(tmp_path: Path, tokenizer: Any) -> None:
    write(settings(tmp_path, [chat("one", "a")]), tokenizer, Fake(tokenizer, counting))
    corpus = Corpus(CorpusConfig(str(tmp_path / "out"), messages_column="messages"), tokenizer, 99)
    (found,) = corpus.sequences()
    assert tokenizer.decode(found.input_ids) == (
        "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\nNo 1 to one!<|im_end|>\n"
    )


def test_what_is_left_out_is_counted(tmp_path: Path, tokenizer: Any, capsys: Any) -> None:
    calls = {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}
    chats = [
        chat("good", "x"),
        chat("w " * 90, "x"),  # leaves no room
        chat("endless", "x"),
        chat("empty", "x"),
        [],
        chat(system="be"),
        [*chat("call"), calls, {"role": "tool", "content": "7"}],
        chat("grows", "x", "w " * 60, "x"),  # leaves no room later
        chat("good", "y"),  # is there already
        chat("again", "x"),
        None,
    ]

    def answer(text: str, seed: int) -> str | None:
        if "endless" in text:
            return None
        return "  " if "empty" in text else "ha " * 30 if "again" in text else counting(text, seed)

    config = settings(tmp_path, chats, max_length=90)
    totals = write(config, tokenizer, Fake(tokenizer, answer))
    assert [contents(each) for each in written(tmp_path / "out")] == [["u good", "a No 1 to good!"]]
    assert (totals["documents"], totals["dropped"]) == (1, 10)
    assert totals["why"] == {
        "without a user's turn": 3,
        "whose prompt leaves no room under max_length": 2,
        "with an answer cut at max_length": 1,
        "with an empty answer": 1,
        "with tool calls": 1,
        "there already": 1,
        "repetitive": 1,
    }
    assert "1 with an answer cut at max_length" in capsys.readouterr().err


def test_a_prompt_of_any_length_stays_whole(tmp_path: Path, tokenizer: Any) -> None:
    fake = Fake(tokenizer, counting)
    size = len(fake.ids(tokenizer.apply_chat_template(
        chat("long " * 50), tokenize=False, add_generation_prompt=True
    )))  # fmt: skip
    for length, kept in ((size + 1, 1), (size, 0)):
        config = settings(
            tmp_path,
            [chat("long " * 50), chat("a")],
            max_length=length,
            output=f"{tmp_path}/{kept}",
        )
        assert write(config, tokenizer, fake)["documents"] == kept + 1
    assert any("long " * 50 in prompt for prompt in fake.asked)


def test_tool_calls_stay_before_the_last_turn(tmp_path: Path, tokenizer: Any) -> None:
    calls = {"role": "assistant", "content": "f()", "tool_calls": [{"name": "f"}]}
    messages = [*chat("call"), calls, {"role": "tool", "content": "7"}, *chat("", "old")[1:]]
    config = settings(tmp_path, [messages], replies="last")
    write(config, tokenizer, Fake(tokenizer, counting))
    (found,) = written(tmp_path / "out")
    assert found["messages"][:3] == messages[:3]
    assert found["messages"][3]["content"].startswith("No ")


@pytest.mark.parametrize("tokens", [None, 700])
def test_resume_writes_the_same_documents(
    tmp_path: Path, tokenizer: Any, tokens: int | None
) -> None:
    chats = [chat(f"number {at}", "x", f"then {at}", *["y"] * (at % 2)) for at in range(10)]

    def answer(text: str, seed: int) -> str | None:
        return None if seed % 7 == 0 else f"{seed}"

    config = settings(tmp_path, chats, tokens=tokens)
    totals = write(config, tokenizer, Fake(tokenizer, answer))
    assert totals["files"] == 3 if tokens is None else totals["files"] > 3
    cut = settings(tmp_path, chats, tokens=tokens, output=str(tmp_path / "cut"))
    for _ in range(2):
        with pytest.raises(Interrupted):
            write(cut, tokenizer, Fake(tokenizer, answer, calls=3))
    assert write(cut, tokenizer, Fake(tokenizer, answer)) == totals
    assert written(tmp_path / "cut") == written(tmp_path / "out")
    ids = [each["id"] for each in written(tmp_path / "out")]
    assert len(set(ids)) == len(ids)
    with pytest.raises(RefusedError, match="replies"):
        write(settings(tmp_path, chats, replies="last"), tokenizer, Fake(tokenizer, answer))


def test_another_round_asks_the_same_with_other_seeds(tmp_path: Path, tokenizer: Any) -> None:
    chats = [chat(f"number {at}") for at in range(6)]

    def answer(text: str, seed: int) -> str:
        return f"{seed}"

    first = settings(tmp_path, chats)
    write(first, tokenizer, Fake(tokenizer, answer))
    once = written(tmp_path / "out")
    more = settings(tmp_path, chats, tokens=2 * sum(each["tokens"] for each in once))
    write(more, tokenizer, Fake(tokenizer, answer))
    documents = written(tmp_path / "out")
    assert documents[:6] == once
    assert len({each["messages"][1]["content"] for each in documents}) == len(documents) > 11


@pytest.mark.parametrize(
    ("template", "ends", "is_said"),
    [
        (CHATML, ["<eos>", "<|im_end|>"], False),
        (CHATML.replace("'<|im_end|>\n'", "' ' + eos_token"), ["<eos>"], False),
        (CHATML.replace("<|im_end|>\n", "\n<|im_end|>\n"), ["<eos>", "<|im_end|>"], False),
        (CHATML.replace("<|im_end|>\n", "\n"), ["<eos>"], True),
    ],
)
def test_turns_end_with_the_templates_token_and_the_models(
    tmp_path: Path, capsys: Any, template: str, ends: list[str], is_said: bool
) -> None:
    tokenizer = chat_tokenizer(tmp_path / "t", template)
    fake = Fake(tokenizer, counting, end=ends[-1])
    write(settings(tmp_path, [chat("one")]), tokenizer, fake)
    assert tokenizer.convert_ids_to_tokens(fake.stops) == ends
    assert ("writes no special token" in capsys.readouterr().err) == is_said


def test_nothing_that_ends_a_turn_is_refused(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(tmp_path / "t", CHATML.replace("<|im_end|>\n", "\n"))
    with pytest.raises(ConfigError, match="nothing ends a turn"):
        write(settings(tmp_path, [chat("one")]), tokenizer, Fake(tokenizer, counting), [])


STRIPS = CHATML.replace("m.content", "m.content | trim")
REASONS = CHATML.replace(
    "m.content",
    "(m.content if '</think>' in m.content or m.role == 'user' else '<think></think>' + m.content)",
)
OPENS = CHATML.replace("assistant\n", "assistant\n<think>")
HIDES = CHATML.replace("m.content", "m.content.split('</think>')[-1]")
THOUGHT = "<think>\nwhy\n</think>\n\nyes"


@pytest.mark.parametrize(
    ("template", "answer", "kept"),
    [
        (CHATML, " yes \n", " yes \n"),
        (STRIPS, " yes \n", "yes"),
        (CHATML.replace("m.content", "m.content.rstrip()"), " yes \n", " yes"),
        (CHATML, THOUGHT, THOUGHT),
        (CHATML, "<|im_start|>yes", "<|im_start|>yes"),
        (REASONS, THOUGHT, THOUGHT),
        (REASONS, "<think></think>yes", "<think></think>yes"),
        (REASONS, "yes", None),
        (OPENS, "why</think>yes", "<think>why</think>yes"),
        (HIDES, THOUGHT, None),
        (CHATML.replace("m.content", "m.content.replace('y', 'Y')"), "yes", None),
        (chat_templates.CHATML, "yes ", "yes "),
        (chat_templates.LLAMA_3, "yes ", "yes"),
        (chat_templates.GEMMA, "yes\n", "yes"),
        (chat_templates.MISTRAL, " yes", " yes"),
        (chat_templates.MISTRAL, "yes", None),
        (chat_templates.REASONING, "<think>\n\n</think>\n\nyes", "yes"),
        (chat_templates.REASONING, THOUGHT, None),
        (chat_templates.TRAILER, "yes ", "yes "),
    ],
)
def test_an_answer_is_kept_as_the_template_writes_it_back(
    tmp_path: Path, template: str, answer: str, kept: str | None
) -> None:
    tokenizer = tokenizer_with(template)
    chats = [chat("one"), chat("TWO")] if kept else [chat("ONE")]
    config = settings(tmp_path, chats)
    fake = Fake(tokenizer, lambda text, seed: answer, end="")
    if kept is None:
        with pytest.raises(ConfigError, match="1 with an answer that the chat template writes in"):
            write(config, tokenizer, fake)
        return
    write(config, tokenizer, fake)
    for document, asked in zip(written(tmp_path / "out"), fake.asked, strict=True):
        assert document["messages"][1] == {"role": "assistant", "content": kept}
        text = ChatTemplate(tokenizer).render(document["messages"])
        assert text.startswith((asked + answer, asked + kept))
        end = text.removeprefix(asked + answer).removeprefix(asked + kept).split(">")[0] + ">"
        assert tokenizer.convert_tokens_to_ids(end.strip()) == fake.stops[-1]


def test_reasoning_that_the_template_leaves_out_later_is_said(tmp_path: Path, capsys: Any) -> None:
    later = "(m.content if loop.last else m.content.split('</think>')[-1])"
    tokenizer = chat_tokenizer(tmp_path / "t", CHATML.replace("m.content", later))
    fake = Fake(tokenizer, lambda text, seed: f"<think>{seed}</think>yes")
    chats = [chat("one", "x", "two"), chat("three", "x", "four")]
    write(settings(tmp_path, chats, batch=1), tokenizer, fake)
    for document in written(tmp_path / "out"):
        assert all("<think>" in document["messages"][at]["content"] for at in (1, 3))
    assert not any("<think>" in prompt for prompt in fake.asked)
    assert capsys.readouterr().err.count("leaves out parts of answers") == 1
    write(settings(tmp_path, chats, replies="last", output=f"{tmp_path}/l"), tokenizer, fake)
    assert "leaves out parts of answers" not in capsys.readouterr().err


def test_special_tokens_that_a_message_spells(tmp_path: Path, tokenizer: Any) -> None:
    fake = Fake(tokenizer, counting)
    config = settings(tmp_path, [chat("a <|im_end|> b"), chat("c")])
    assert config.prompts is not None
    config.prompts.special_tokens = "split"
    write(config, tokenizer, fake)
    assert contents(written(tmp_path / "out")[0])[0] == "u a <|im_end|> b"
    assert "a <|im_end|> b<|im_end|>" in fake.asked[0]
    assert fake.prompts[0].count(fake.end) == 1


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([{"role": "user"}], "document 1: message 0: no content"),
        ("hi", "document 1: expected a list of messages, found text"),
        ([{"role": "system", "content": "x"}, *chat("hi")], "document 1: .*no system"),
    ],
)
def test_a_bad_prompt_names_its_document(tmp_path: Path, messages: Any, words: str) -> None:
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    tokenizer = chat_tokenizer(tmp_path / "t", refusing + CHATML)
    with pytest.raises(ConfigError, match=rf"prompts\.jsonl, {words}"):
        write(settings(tmp_path, [chat("a"), messages]), tokenizer, Fake(tokenizer, counting))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompts": None, "replies": "all"}, "replies all: chats or texts of users"),
        ({"prompts": CorpusConfig("x", tokens_column="i"), "replies": "all"}, "replies all: chats"),
        ({"prompts": CorpusConfig("x")}, "tokens: say how many to write"),
    ],
)
def test_settings_that_do_not_fit(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        settings(tmp_path, [], **changes)


def test_chats_are_answered_by_default(tmp_path: Path) -> None:
    assert settings(tmp_path, []).replies == "all"
    assert GenerateConfig("m", "o", 5).replies is None


@pytest.mark.vllm
@pytest.mark.long
def test_the_engine_answers_chats_that_stage_one_reads(tmp_path: Path) -> None:
    ends = list(range(0, 512, 8))
    model = chat_model(tmp_path / "model", ends)
    texts = some_texts(30)
    chats = [chat(texts[at], "old", texts[at + 1][:200], system="be") for at in range(20)]
    config = settings(tmp_path, chats, model=str(model), max_length=400, batch=8)
    assert config.prompts is not None
    output, prompts = config.output, config.prompts.path
    command = [sys.executable, str(SCRIPTS / "generate_corpus.py"), f"--model={model}"]
    command += [f"--output={output}", f"--prompts.path={prompts}", "--max_length=400", "--batch=8"]
    command += ["--prompts.messages_column=messages", "--min_length=0"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    documents = written(tmp_path / "out")
    assert len(documents) > 5
    tokenizer = ModelFolder(model).tokenizer
    for document in documents:
        roles = [each["role"] for each in document["messages"]]
        assert roles == ["system", "user", "assistant", "user", "assistant"]
        assert document["messages"][1] in (each[1] for each in chats)
        assert not any(each["content"] == "old" for each in document["messages"])
    chats_of = CorpusConfig(output, messages_column="messages")
    stage_one = dump_settings(tmp_path, model, Path(output), max_length=500)
    dumped = dump.run(replace(stage_one, corpus=chats_of))
    assert dumped["documents"] == len(documents)
    for sequence in Corpus(replace(chats_of, targets="assistant"), tokenizer, 500).sequences():
        learnt = tokenizer.decode(sequence.input_ids[sequence.positions + 1])
        assert learnt.count("<|im_end|>") == 2
