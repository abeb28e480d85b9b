"""The assistant's tokens in chats of every style, token by token."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from pipeline.chats import BadChat, ChatTemplate
from pipeline.config import CorpusConfig
from pipeline.corpus import Corpus
from tests.helpers.chat_templates import (
    CHATML,
    GEMMA,
    LLAMA_3,
    MARKED,
    MISTRAL,
    OPENED,
    REASONING,
    TRAILER,
    tokenizer_with,
)
from tests.helpers.corpora import write_jsonl

Message = dict[str, Any]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
ARGUMENTS = {"a": 1}
CALL = {"function": {"name": "add", "arguments": ARGUMENTS}, "id": "123456789"}
CALLED = json.dumps(CALL["function"])
USED = json.dumps(TOOLS[0])


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def reply(content: str, **more: Any) -> Message:
    return {"role": "assistant", "content": content, **more}


def tool(content: str) -> Message:
    return {"role": "tool", "content": content}


SYSTEM = {"role": "system", "content": "Be brief."}
TWO = [user("Hi"), reply("Hello, you."), user("And é🙂?"), reply(" Well \n\n")]
STEPS = [user("1+1?"), reply("", tool_calls=[CALL]), tool("2"), reply("It is 2.")]
HELP = "<|im_start|>system\nYou are a helpful assistant."
DATE = "<s><|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\n"
HEADS = {
    role: f"<|start_header_id|>{role}<|end_header_id|>\n\n"
    for role in ("user", "assistant", "ipython")
}
CHATS = {
    "chatml": (
        CHATML,
        [SYSTEM, *TWO],
        None,
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>"
        "assistant\n«Hello, you.<|im_end|>»\n<|im_start|>user\nAnd é🙂?<|im_end|>\n<|im_start|>"
        "assistant\n« Well \n\n<|im_end|>»\n",
    ),
    "chatml, tools": (
        CHATML,
        STEPS,
        TOOLS,
        f"{HELP}\n\n# Tools\n<tools>\n{USED}\n</tools><|im_end|>\n<|im_start|>user\n1+1?<|im_end|>"
        f"\n<|im_start|>assistant\n«\n<tool_call>\n{CALLED}\n</tool_call><|im_end|>»\n<|im_start|>"
        "user\n<tool_response>\n2\n</tool_response><|im_end|>\n<|im_start|>assistant\n«It is 2."
        "<|im_end|>»\n",
    ),
    "chatml, several replies": (
        CHATML,
        [user("Hi"), reply("One"), reply(""), user("no answer")],
        None,
        f"{HELP}<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n«One<|im_end|>»"
        "\n<|im_start|>assistant\n«<|im_end|>»\n<|im_start|>user\nno answer<|im_end|>\n",
    ),
    "llama 3": (
        LLAMA_3,
        [SYSTEM, *TWO],
        None,
        f"{DATE}Be brief.<|eot_id|>{HEADS['user']}Hi<|eot_id|>{HEADS['assistant']}«Hello, you."
        f"<|eot_id|>»{HEADS['user']}And é🙂?<|eot_id|>{HEADS['assistant']}«Well<|eot_id|>»",
    ),
    "llama 3, tools": (
        LLAMA_3,
        [user("1+1?"), {"role": "assistant", "tool_calls": [CALL]}, tool("2"), reply("It is 2.")],
        None,
        f"{DATE}<|eot_id|>{HEADS['user']}1+1?<|eot_id|>{HEADS['assistant']}«"
        '{"name": "add", "parameters": {"a": 1}}'
        f"<|eot_id|>»{HEADS['ipython']}2<|eot_id|>{HEADS['assistant']}«It is 2.<|eot_id|>»",
    ),
    "gemma": (
        GEMMA,
        TWO,
        None,
        "<s><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n«Hello, you.<end_of_turn>»"
        "\n<start_of_turn>user\nAnd é🙂?<end_of_turn>\n<start_of_turn>model\n«Well<end_of_turn>»\n",
    ),
    "mistral": (
        MISTRAL,
        TWO,
        None,
        "<s>[INST] Hi[/INST]« Hello, you.</s>»[INST] And é🙂?[/INST]« Well</s>»",
    ),
    "mistral, tools": (
        MISTRAL,
        STEPS,
        TOOLS,
        f"<s>[AVAILABLE_TOOLS] [{USED}][/AVAILABLE_TOOLS][INST] 1+1?[/INST]«[TOOL_CALLS] [{CALLED}]"
        '</s>»[TOOL_RESULTS] {"content": 2}[/TOOL_RESULTS]« It is 2.</s>»',
    ),
    "reasoning": (
        REASONING,
        [user("a"), reply("A", reasoning_content="first"), user("b"), reply("A")],
        None,
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n«A<|im_end|>»\n<|im_start|>user\nb"
        "<|im_end|>\n<|im_start|>assistant\n«<think>\n\n</think>\n\nA<|im_end|>»\n",
    ),
    "reasoning, opened by the prompt": (
        OPENED,
        [user("a"), reply("A", reasoning_content="first")],
        None,
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n<think>\n«first\n</think>\n\n"
        "A<|im_end|>»\n",
    ),
    "a token at the end of every chat": (
        TRAILER,
        [*TWO[:3], reply("Well")],
        None,
        "<|user|>\nHi<|end|>\n<|assistant|>\n«Hello, you.<|end|>»\n<|user|>\nAnd é🙂?<|end|>\n"
        "<|assistant|>\n«Well<|end|>»\n</s>",
    ),
}


def rendered(
    template: str, messages: list[Message], tools: Any = None, **more: Any
) -> tuple[str, str]:
    """(the text, the text with «marks» around what is learnt)."""
    text = ChatTemplate(tokenizer_with(template)).render(messages, tools, "assistant", **more)
    marked, at = "", 0
    for start, stop in text.spans or []:
        marked += f"{text[at:start]}«{text[start:stop]}»"
        at = stop
    return str(text), marked + text[at:]


@pytest.mark.parametrize("name", CHATS)
def test_the_assistant_writes_this(name: str) -> None:
    template, messages, tools, expected = CHATS[name]
    text, marked = rendered(template, messages, tools)
    assert marked == expected
    own = tokenizer_with(template).apply_chat_template(messages, tools=tools, tokenize=False)
    assert without_date(text) == without_date(own)


def without_date(text: str) -> str:
    return re.sub(r"Date: \S+ \S+ \d+", "", text)


def tokens_of(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, messages: list[Message], **given: Any
) -> list[tuple[str, bool]]:
    """(token, whether it is learnt) of a chat without tools, read from a corpus."""
    path = write_jsonl(tmp_path / "c.jsonl", [{"messages": messages}])
    config = CorpusConfig(str(path), messages_column="messages", targets="assistant", **given)
    (sequence,) = Corpus(config, tokenizer, 10_000).sequences()
    assert sequence.targets is not None
    names = tokenizer.convert_ids_to_tokens(sequence.input_ids.tolist())
    return list(zip(names, sequence.targets.tolist(), strict=True))


def pieces_of(tokenizer: PreTrainedTokenizerFast, marked: str) -> list[tuple[str, bool]]:
    """The tokens of each piece of a marked text, which no token may cross."""
    found = []
    for number, piece in enumerate(marked.replace("»", "«").split("«")):
        found += [(token, number % 2 == 1) for token in tokenizer.tokenize(piece)]
    return found


@pytest.mark.parametrize("how", ["parse", "split"])
@pytest.mark.parametrize("name", [name for name in CHATS if CHATS[name][2] is None])
def test_each_token_is_marked(tmp_path: Path, name: str, how: str) -> None:
    template, messages, _, expected = CHATS[name]
    tokenizer = tokenizer_with(template)
    found = tokens_of(tmp_path, tokenizer, messages, special_tokens=how)
    assert found == pieces_of(tokenizer, expected)


@pytest.mark.parametrize("name", [name for name in CHATS if CHATS[name][0] is CHATML])
def test_generation_markers_mark_the_same(name: str) -> None:
    _, messages, tools, expected = CHATS[name]
    assert rendered(MARKED, messages, tools)[1] == expected


START = "<|im_start|>assistant\n"
PLAIN = START + "{{ m.content }}<|im_end|>"
BODY = START + "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
AROUND = {
    "a macro": "{% macro say(m) %}" + BODY + "{% endmacro %}{{ say(m) }}",
    "a caller": "{% macro say() %}{{ caller() }}{% endmacro %}{% call say() %}"
    + BODY
    + "{% endcall %}",
    "a variable": "{% set x %}" + BODY + "{% endset %}{{ x }}",
    "a filter": "{% filter trim %} " + BODY + "{% endfilter %}",
    "markers": "{% generation %}" + BODY + "{% endgeneration %}",
    "a comment": PLAIN + "{# {% generation %}{% endgeneration %} #}",
}


@pytest.mark.parametrize("around", AROUND)
def test_markers_that_do_not_say_where_they_are_are_not_used(around: str) -> None:
    """transformers itself marks other characters for all of these."""
    template = (
        f"{{% for m in messages %}}{{% if m.role == 'user' %}}{{{{ m.content }}}}<|im_end|>"
        f"{{% else %}}{AROUND[around]}{{% endif %}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{START}{{% endif %}}"
    )
    _, marked = rendered(template, TWO)
    assert marked == (
        f"Hi<|im_end|>{START}«Hello, you.<|im_end|>»And é🙂?<|im_end|>{START}« Well \n\n<|im_end|>»"
    )


def test_markers_mark_what_transformers_marks(tmp_path: Path) -> None:
    template = (
        f"{{% for m in messages %}}{{% if m.role == 'user' %}}{{{{ m.content }}}}<|im_end|>\n"
        f"{{% else %}}{BODY}\n{{% endif %}}{{% endfor %}}"
    )
    tokenizer = tokenizer_with(template)
    ours = [is_learnt for _, is_learnt in tokens_of(tmp_path, tokenizer, TWO)]
    own = tokenizer.apply_chat_template(TWO, return_dict=True, return_assistant_tokens_mask=True)
    assert ours == [bool(mark) for mark in own["assistant_masks"]]
    assert any(ours)


PIECES = st.text("a \n🙂", max_size=3) | st.sampled_from(["<|im_end|>", "</s>", "<|im_start|>"])
MESSAGES = st.lists(
    st.tuples(
        st.sampled_from(["user", "assistant", "tool"]), st.lists(PIECES, max_size=3).map("".join)
    ),
    max_size=6,
)


@settings(max_examples=50, deadline=None)
@given(MESSAGES)
def test_every_turn_is_found_whatever_is_said(turns: list[tuple[str, str]]) -> None:
    messages = [SYSTEM, *({"role": role, "content": content} for role, content in turns)]
    expected = [f"{content}<|im_end|>" for role, content in turns if role == "assistant"]
    for template in (CHATML, MARKED):
        text = ChatTemplate(tokenizer_with(template)).render(messages, targets="assistant")
        assert [text[start:stop] for start, stop in text.spans or []] == expected


def test_a_chat_without_an_answer_has_no_targets() -> None:
    for template in (CHATML, MARKED):
        text, marked = rendered(template, [SYSTEM, user("Hi")])
        assert marked == text


@pytest.mark.parametrize(
    ("template", "messages", "tools", "words"),
    [
        (
            MISTRAL, TWO, TOOLS,
            r"does not show where message 1 begins: the messages up to there are rendered as "
            r"'<s>\[AVAILABLE_TOOLS\] .*', in the whole chat as '<s>\[INST\] Hi.*'. Put \{% gen",
        ),
        (
            OPENED, TWO, None,
            "does not show where message 1 begins: .* as '<think>', in the whole chat as 'Hello, y",
        ),
        (
            REASONING, [user("a"), reply("A", reasoning_content="r"), tool("t"), reply("B"), *TWO],
            None, "does not show where message 3 begins: .* as '<think>', in the whole .* 'A<",
        ),
        (
            "{% for m in messages %}{{ m.role }}: {{ m.content }}, {{ messages | length }}\n"
            "{% endfor %}", TWO, None, "does not show where message 1 begins: .* 'user: Hi, 1'",
        ),
        (
            "{% for m in messages %}{{ m.role }}: {{ m.content if loop.last else '...' }}</s>"
            "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}", TWO[1:], None,
            "does not show where message 0 ends: .* rendered as 'assistant: Hello, you.</s>', in",
        ),
        (
            CHATML.replace("'assistant' %}", "'assistant' and message.content %}"),
            [user("a"), reply(""), reply("b")], None, "does not show where message 1 is",
        ),
        (CHATML, [reply("Hi"), user("a")], None, r"the first 0 messages alone\)"),
        (GEMMA, [user("a"), user("b"), reply("c")], None, "cannot render it: Conversation roles"),
    ],
)  # fmt: skip
def test_a_template_that_does_not_show_it_is_refused(
    template: str, messages: list[Message], tools: Any, words: str
) -> None:
    with pytest.raises(BadChat, match=words):
        rendered(template, messages, tools)


def test_a_turn_of_which_two_ends_would_do_is_refused() -> None:
    forged = "A<|im_end|>\nA"
    messages = [user("a"), reply(forged, reasoning_content="r"), user("b"), reply("B")]
    with pytest.raises(BadChat, match="does not show where message 1 ends"):
        rendered(REASONING, messages)
