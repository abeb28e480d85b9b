"""A chat template that never ends, or grows without end, ends its own process and no other."""

import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from pipeline import chat_renderer
from pipeline.chat_renderer import CannotRender, Part, Renderer

HELLO = [{"role": "user", "content": "hello"}]


def template(source: str, now: str | None = None) -> dict[str, Any]:
    return {"source": source, "given": {"bos_token": "<s>"}, "now": now}


@pytest.fixture(scope="module")
def renderer() -> Iterator[Renderer]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat_renderer, "CPU_SECONDS", 1)
        patch.setattr(chat_renderer, "MEMORY", 256 << 20)
        made = Renderer()
        yield made
        made.stop()


BOMBS = {
    "loops": "{% for a in range(9999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a power": "{{ 9 ** (9 ** 9) ** 9 }}",
    "a long string": "{{ 'a' * 10 ** 12 }}",
    "a long list": "{{ [0] * 10 ** 12 }}",
    "a width": "{{ '%999999999999d' % 1 }}",
    "doubling": "{% set n = namespace(x='a') %}{% for i in range(99) %}"
    "{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "nested products": "{{ ('a' * 99999) * 99999 }}",
    "recursion": "{% macro m(x) %}{{ m(x) }}{% endmacro %}{{ m(1) }}",
    "a large range": "{{ range(10 ** 9) | list }}",
    "nested too deep": "{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}",
    "a type": "{{ 1 + 'a' }}",
    "a call": "{{ messages() }}",
    "an attribute": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "syntax": "{% for %}",
    "much text": "{% for a in range(999) %}{{ 'a' * 99999 }}{% endfor %}",
}


@pytest.mark.parametrize("source", BOMBS.values(), ids=BOMBS)
def test_each_bomb_is_an_error_and_the_next_chat_is_rendered(
    renderer: Renderer, source: str
) -> None:
    with pytest.raises(CannotRender) as refused:
        renderer.render(template(source), HELLO)
    assert str(refused.value)
    good = template("{{ bos_token }}{{ messages[0].content }}")
    assert renderer.render(good, HELLO).text == "<s>hello"


def test_the_limit_is_named(renderer: Renderer) -> None:
    with pytest.raises(CannotRender, match="it takes more than 1 s of CPU time"):
        renderer.render(template(BOMBS["loops"]), HELLO)
    with pytest.raises(CannotRender, match="it takes more than 256 MiB"):
        renderer.render(template(BOMBS["doubling"]), HELLO)
    with pytest.raises(CannotRender, match="it makes more than 16,777,216 characters"):
        renderer.render(template(BOMBS["much text"]), HELLO)


def test_beginnings_are_compared_with_the_whole(renderer: Renderer) -> None:
    say = template(
        "{% for m in messages %}{{ m.content }}{{ raise_exception('two') if loop.length == 2 }}"
        "{% endfor %}{{ '>' if add_generation_prompt else '.' }}"
    )
    messages = [{"role": "user", "content": text} for text in ("a", "b", "c")]
    found = renderer.render(say, messages, beginnings=[(0, True), (1, False), (2, True), (3, True)])
    assert found.text == "abc."
    error = found.parts.pop((2, True))
    assert isinstance(error, CannotRender)
    assert str(error) == "two"
    assert found.parts == {
        (0, True): Part(0, ">"),
        (1, False): Part(1, "."),
        (3, True): Part(3, ">"),
    }


def test_a_chat_of_many_turns_has_limits_too() -> None:
    """No rendering alone reaches one."""
    cheap = template("{{ '%d' % (messages | length) }}{{ 'a' * 4000 }}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat_renderer, "CHAT_SECONDS", 0)
        made = Renderer()
        with pytest.raises(CannotRender, match="turn by turn, it takes more than 0 s of CPU time"):
            made.render(cheap, HELLO * 3, beginnings=[(1, True), (2, True)])
        made.stop()
        patch.setattr(chat_renderer, "CHAT_SECONDS", 60)
        patch.setattr(chat_renderer, "LONGEST", 6000)
        with pytest.raises(CannotRender, match="turn by turn, it makes more than 6,000 characters"):
            made.render(cheap, HELLO * 3, beginnings=[(1, True), (2, True)])
        assert made.render(cheap, HELLO * 3, beginnings=[(1, True)]).text.startswith("3a")
        made.stop()


def test_what_a_job_answers(renderer: Renderer) -> None:
    say = template("{{ messages[0].content }}{{ strftime_now('%Y') }}", "2024-07-26T00:00:00")
    for text in ["a\nb\x00\u2028", "🙂", "\ud800", "x" * 100_000]:
        messages = [{"role": "user", "content": text}]
        assert renderer.render(say, messages).text == text + "2024"


def test_threads_get_their_own_answers(renderer: Renderer) -> None:
    found: dict[int, set[str]] = {}

    def work(number: int) -> None:
        own = template(f"{number}:{{{{ messages[0].content }}}}")
        found[number] = {renderer.render(own, HELLO).text for _ in range(50)}

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: {f"{number}:hello"} for number in range(4)}


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_starts_its_own(renderer: Renderer) -> None:
    say = template("{{ messages[0].content }}")
    assert renderer.render(say, HELLO).text == "hello"
    child = os.fork()
    if child == 0:
        try:
            own = renderer.render(say, [{"role": "user", "content": "forked"}]).text
            os._exit(0 if own == "forked" else 1)
        finally:
            os._exit(2)
    assert renderer.render(say, HELLO).text == "hello"
    assert os.waitpid(child, 0)[1] == 0
    assert renderer.render(say, HELLO).text == "hello"


def test_an_interruption_leaves_no_answer_behind(
    renderer: Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    say = template("{{ messages[0].content }}")
    renderer.render(say, HELLO)
    assert renderer.process is not None

    class Interrupted(BaseException):
        pass

    def readline() -> bytes:
        raise Interrupted

    monkeypatch.setattr(renderer.process, "stdout", type("Pipe", (), {"readline": readline}))
    monkeypatch.setattr(renderer.process, "communicate", renderer.process.wait)
    with pytest.raises(Interrupted):
        renderer.render(say, [{"role": "user", "content": "lost"}])
    assert renderer.render(say, HELLO).text == "hello"
