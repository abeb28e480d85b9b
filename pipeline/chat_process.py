"""The program of the process that renders chats (chat_renderer.py starts it by its path).

It reads one JSON line for each job and answers with one. A chat template is code of a model that
may come from anyone: a loop that never ends, or text that doubles, ends this process or its job,
not the caller. The kernel keeps the limits, so nothing in a template can get around them.
"""

import json
import os
import resource
import signal
import sys
import time
from bisect import bisect_left
from collections.abc import Callable
from datetime import datetime
from functools import lru_cache, partial
from typing import Any

from jinja2 import Environment, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

Rendered = dict[str, Any]


def main() -> None:
    seconds, chat_seconds, memory, longest = map(int, sys.argv[1:])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the caller decides what Ctrl-C means
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever is printed is no answer
    from transformers.utils.chat_template_utils import render_jinja_template

    limit_memory(memory)
    template: dict[str, Any] = {}
    for line in sys.stdin.buffer:
        try:
            job = json.loads(line)
            if "source" in job:
                template = job
                continue
            render = partial(rendered, render_jinja_template, template, seconds, longest)
            data = json.dumps(answer(job, render, chat_seconds, longest)).encode()
        except MemoryError:
            data = json.dumps({"error": f"it takes more than {memory >> 20} MiB"}).encode()
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        answers.write(data + b"\n")
        answers.flush()


def limit_memory(most: int) -> None:
    """At most `most` bytes more than the process has now."""
    with open("/proc/self/statm", encoding="ascii") as file:
        now = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (now + most, now + most))


def answer(
    job: dict[str, Any], render: Callable[..., Rendered], seconds: int, longest: int
) -> Rendered:
    """The text of the messages, and what the asked beginnings of them make of it."""
    messages, given = job["messages"], {"tools": job["tools"]}
    found = render(messages, given | {"return_assistant_tokens_mask": job["marked"]})
    if "error" in found:
        return found
    began, others, parts = time.process_time(), 0, []
    for number, prompt in job["beginnings"]:
        part = render(messages[:number], given | {"add_generation_prompt": prompt})
        parts.append(against(found["text"], part))
        others += len(parts[-1].get("rest", ""))
        if time.process_time() - began >= seconds:
            return {"error": f"turn by turn, it takes more than {seconds} s of CPU time"}
        if others > longest:
            return {"error": f"turn by turn, it makes more than {longest:,} characters of text"}
    return found | {"beginnings": parts}


def against(whole: str, part: Rendered) -> Rendered:
    """A rendering as the characters that the whole begins with, too, and the others."""
    if "error" in part:
        return part
    same = same_start(whole, part["text"])
    return {"same": same, "rest": part["text"][same:]}


def same_start(one: str, other: str) -> int:
    """Number of characters that both begin with."""
    most = range(min(len(one), len(other)))
    return bisect_left(most, True, key=lambda at: one[: at + 1] != other[: at + 1])


def rendered(
    jinja: Any,
    template: dict[str, Any],
    seconds: int,
    longest: int,
    messages: Any,
    more: dict[str, Any],
) -> Rendered:
    given = template["given"] | more
    if template["now"] is not None:
        given["strftime_now"] = datetime.fromisoformat(template["now"]).strftime
    # SIGPROF, which is not caught, ends the process after so many seconds of its CPU time.
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        (text,), marks = jinja([messages], chat_template=template["source"], **given)
    except MemoryError:
        raise
    except Exception as error:  # a template raises whatever its expressions raise
        return {"error": (str(error).splitlines() or [""])[0][:500] or type(error).__name__}
    if len(text) > longest:
        return {"error": f"it makes more than {longest:,} characters of text"}
    return {
        "text": text,
        "marks": marks[0] if marks and marks_are_right(template["source"]) else None,
    }


class Generation(Extension):
    """Parses the generation markers, as transformers does."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 reads it from the class

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("generation"), [], [], body).set_lineno(line)


@lru_cache(maxsize=1)
def marks_are_right(source: str) -> bool:
    """Whether a template has generation markers, and none within a block that is written later,
    such as a macro: transformers counts the characters that are written when a marker is met."""
    tree = Environment(extensions=[Generation, loopcontrols]).parse(source)
    later = (nodes.Macro, nodes.AssignBlock, nodes.FilterBlock, nodes.CallBlock)
    return bool(generations(tree)) and not any(map(generations, tree.find_all(later)))


def generations(node: nodes.Node) -> list[nodes.CallBlock]:
    """The generation blocks within a node."""
    calls = [(each, each.call.node) for each in node.find_all(nodes.CallBlock)]
    return [each for each, call in calls if isinstance(call, nodes.ExtensionAttribute)]


if __name__ == "__main__":
    main()
