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
from datetime import datetime
from typing import Any


def main() -> None:
    seconds, memory, longest = map(int, sys.argv[1:])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the caller decides what Ctrl-C means
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever is printed is no answer
    from transformers.utils.chat_template_utils import render_jinja_template

    limit_memory(memory)
    template: dict[str, Any] = {}
    for line in sys.stdin.buffer:
        # SIGPROF, which is not caught, ends the process after so many seconds of its CPU time.
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            job = json.loads(line)
            if "source" in job:
                template = job
                continue
            answer = render(render_jinja_template, template, job["messages"], longest)
            data = json.dumps(answer).encode()
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


def render(jinja: Any, template: dict[str, Any], messages: Any, longest: int) -> dict[str, str]:
    given = dict(template["given"])
    if template["now"] is not None:
        given["strftime_now"] = datetime.fromisoformat(template["now"]).strftime
    try:
        ((text,), _) = jinja([messages], chat_template=template["source"], **given)
    except MemoryError:
        raise
    except Exception as error:  # a template raises whatever its expressions raise
        return {"error": (str(error).splitlines() or [""])[0][:500] or type(error).__name__}
    if len(text) > longest:
        return {"error": f"it makes more than {longest:,} characters of text"}
    return {"text": text}


if __name__ == "__main__":
    main()
