"""Chats become text, or a message that says which message is wrong."""

import copy
from pathlib import Path
from typing import Any

import pytest

from pipeline.chats import BadChat, ChatTemplate
from pipeline.models.directory import ModelFolder

ASKS = (
    "{% for m in messages %}<{{ m.role }}{% if 'name' in m %} {{ m.name }}{% endif %}>"
    "{% if 'tool_calls' in m %}[{{ m.tool_calls|length }}]{% endif %}{{ m.content }};{% endfor %}"
)
PARTS = "{% for m in messages %}{% for p in m.content %}({{ p.text }}){% endfor %}{% endfor %}"
REFUSES = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('No system role') }}"
    "{% endif %}{{ '<' + m.role + '>' + m.content }}{% endfor %}"
)
CLOCK = (
    "{{ strftime_now('%d %b %Y %H:%M:%S.%f') }}{% for m in messages %}{{ m.content }}{% endfor %}"
)


@pytest.fixture
def template(model_path: Path):  # type: ignore[no-untyped-def]
    def make(source: Any) -> ChatTemplate:
        tokenizer = copy.copy(ModelFolder(model_path).tokenizer)
        tokenizer.chat_template = source
        return ChatTemplate(tokenizer)

    return make


def user(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([user("a"), {"role": "x", "content": "b", "name": "n"}], "<user>a;<x n>b;"),
        ([user("a", name=None, tool_calls=None)], "<user>a;"),
        ([{"role": "x", "content": None, "tool_calls": [{}]}], "<x>[1];"),
        ([{"role": "x", "tool_calls": [{"a": None}]}], "<x>[1];"),
        ([user("2024-01-01")], "<user>2024-01-01;"),
        ([user([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])], "<user>ab;"),
        ([user("")], "<user>;"),
        ([{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "<user>a;<assistant>b;"),
        ([{"from": "system", "value": "a"}, {"from": "tool", "value": "b"}], "<system>a;<tool>b;"),
        ([{"from": "observation", "value": "a", "name": "n"}], "<tool n>a;"),
        ([{"from": "x", "role": "y", "content": "a"}], "<y>a;"),
        ([], ""),
    ],
)
def test_messages_are_rendered(template, messages: list[Any], text: str) -> None:  # type: ignore[no-untyped-def]
    assert template(ASKS).render(messages) == text


def test_a_template_of_parts_gets_parts(template) -> None:  # type: ignore[no-untyped-def]
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert template(PARTS).render([user(parts)]) == "(a)(b)"


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ('[{"role": "user", "content": "a"}]', "expected a list of messages, found text"),
        ({"messages": [user("a")]}, "expected a list of messages, found an object"),
        (["a"], "message 0: expected an object with role and content, found text"),
        ([[user("a")]], "message 0: expected an object with role and content, found a list"),
        ([user("a"), {"from": "gpt"}], "message 1: no content"),
        ([{"from": ["gpt"], "value": "b"}], "message 0: expected text in role, found a list"),
        ([{"content": "a"}], "message 0: expected text in role, found nothing"),
        ([user("a"), user(None)], "message 1: no content"),
        ([user(5)], "message 0: expected text in content, found int"),
        ([user(["a"])], "message 0: expected parts with a type in content, found text"),
        ([user([{"type": "text"}])], "message 0: expected text in a part, found nothing"),
        ([user([{"type": "image"}])], "message 0: a part is image"),
        ([user("\ud800")], "cannot render it: .*surrogates"),
    ],
)
def test_what_is_no_chat_is_refused(template, messages: Any, words: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(BadChat, match=words):
        template(ASKS).render(messages)


def test_the_refusal_of_a_template_is_passed_on(template) -> None:  # type: ignore[no-untyped-def]
    refuses = template(REFUSES)
    with pytest.raises(BadChat, match=r"the chat template of .* cannot render it: No system role"):
        refuses.render([{"role": "system", "content": "a"}])
    with pytest.raises(BadChat, match="cannot render it"):
        refuses.render([{"role": "assistant", "tool_calls": []}])
    assert refuses.render([user([{"type": "text", "text": "u"}])]) == "<user>u"


def test_the_clock_stands_still(template) -> None:  # type: ignore[no-untyped-def]
    clock = template(CLOCK)
    assert clock.render([user("a")]) == "26 Jul 2024 00:00:00.000000a"
    assert clock.identity()["date"] == "2024-07-26"


def test_the_identity_is_that_of_the_template(template) -> None:  # type: ignore[no-untyped-def]
    one, same, other = template(ASKS), template(ASKS), template(PARTS)
    assert one.identity() == same.identity() != other.identity()
    assert set(one.identity()) == {"fingerprint"}


def test_chats_with_tools_get_the_template_for_tools(template) -> None:  # type: ignore[no-untyped-def]
    """As apply_chat_template does, where a tokenizer has several."""
    both = template({"default": ASKS, "tool_use": "{{ tools[0].name }} " + ASKS})
    assert both.render([user("a")]) == both.render([user("a")], []) == "<user>a;"
    assert both.render([user("a")], [{"name": "t"}]) == "t <user>a;"
    assert both.render([user("a")], '[{"name": "t"}]') == "t <user>a;"
    identity = both.identity()
    other = template({"default": ASKS, "tool_use": ASKS + "!"}).identity()
    assert len({identity.pop("with_tools"), other.pop("with_tools")}) == 2
    assert identity == other == template(ASKS).identity()


@pytest.mark.parametrize(
    ("tools", "words"),
    [(5, "found int"), ("{", "text that is no JSON"), ({}, "found an object"), ([5], "other val")],
)
def test_what_are_no_tools_is_refused(template, tools: Any, words: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(BadChat, match=f"tools: expected a list of objects, .*{words}"):
        template(ASKS).render([user("a")], tools)


def test_a_tokenizer_without_template(template) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(BadChat, match="chat_template is not set"):
        template(None)
