"""What vLLM writes goes to a file, and the reason why it stopped is one line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import ConfigError, FailedError, Interrupted
from pipeline.teacher import vllm_log
from pipeline.teacher.vllm_log import VllmLog
from tests.helpers.paths import ROOT

PROCESSES = """\
INFO 11-26 03:47:54 [core.py:120] Initializing a V1 LLM engine
(Worker pid=7) ERROR 11-26 03:47:55 [worker.py:900] Traceback (most recent call last):
(Worker pid=7) ERROR 11-26 03:47:55 [worker.py:900]   File "a.py", line 7, in __init__
(Worker pid=7) ERROR 11-26 03:47:55 [worker.py:900] ValueError: Head dimension 96 is not supported.
(EngineCore pid=6) ERROR 11-26 03:47:56 [core.py:1000] Exception: WorkerProc initialization failed \
due to an exception in a background process. See stack trace for root cause.
"""
BEGUN = "Engine core initialization failed. See root cause above. Failed core proc(s): {}"
PYDANTIC = (
    "1 validation error for ModelConfig\n  Value error, The context length is 64,\n but 128 was "
    "asked for [type=value_error, input_value=ArgsKwargs(...)]\n    For further information visit"
)


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> VllmLog:
    monkeypatch.setattr(vllm_log, "SHOWN", False)
    made = VllmLog()
    assert made.path is not None
    made.path.write_text(PROCESSES)
    return made


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (AssertionError("needs BF16."), "AssertionError: needs BF16."),
        (RuntimeError(BEGUN), "ValueError: Head dimension 96 is not supported."),
        (ValueError(PYDANTIC), "ValueError: The context length is 64, but 128 was asked for"),
        (OSError("one\n two\n  three"), "OSError: one two three"),
    ],
)
def test_the_reason_is_found(log: VllmLog, error: Exception, reason: str) -> None:
    assert log.reason(error) == reason


def test_a_log_without_a_reason(log: VllmLog) -> None:
    assert log.path is not None
    log.path.write_text("nothing\n")
    assert log.reason(RuntimeError(BEGUN)) == f"RuntimeError: {BEGUN}"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (AssertionError("needs BF16."), ConfigError),
        (RuntimeError(BEGUN), ConfigError),  # the reason is a ValueError
        (ValueError("Free memory on device is less than desired"), FailedError),
        (RuntimeError("CUDA error: unspecified launch failure"), FailedError),
        (Interrupted("stopped by SIGTERM"), Interrupted),
    ],
)
def test_the_exit_code_says_whether_to_try_again(
    log: VllmLog, error: Exception, kind: type[Exception]
) -> None:
    with pytest.raises(kind) as told, log.explained("some/model", "the first way's reason"):
        raise error
    if kind is not Interrupted:
        assert "\n" not in str(told.value)
        assert str(told.value).startswith("vLLM cannot run some/model: ")
        assert "; the first way's reason (its log: " in str(told.value)
        assert str(log.path) in str(told.value)


def test_own_lines_are_shown_and_all_others_go_to_the_file(tmp_path: Path) -> None:
    code = (
        "import os, subprocess, sys\n"
        "from pipeline.teacher.vllm_log import VllmLog\n"
        "log = VllmLog()\n"
        "with log.catching():\n"
        "    print('progress', file=sys.stderr)\n"
        "    print('a line of vLLM')\n"
        "    os.write(2, b'a kernel\\n')\n"
        "    engine = subprocess.Popen(['sh', '-c', 'read x; echo an engine >&2'], stdin=-1)\n"
        "print('after', file=sys.stderr)\n"
        "print('summary')\n"
        "engine.communicate(b'now\\n')\n"
        "print(log.path.read_text(), end='')\n"
        "log.remove()\n"
        "assert not log.path.exists()\n"
    )
    command = [sys.executable, "-c", code]
    quiet = {name: value for name, value in os.environ.items() if name != "VLLM_LOGGING_LEVEL"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=quiet)
    assert done.stderr == "progress\nafter\n"
    lines = done.stdout.splitlines()
    assert lines[0] == "summary"
    assert sorted(lines[1:]) == ["a kernel", "a line of vLLM", "an engine"]


def test_a_user_who_asks_for_vllms_lines_sees_them() -> None:
    code = (
        "import os\n"
        "os.environ['VLLM_LOGGING_LEVEL'] = 'INFO'\n"
        "from pipeline.teacher.vllm_log import VllmLog\n"
        "log = VllmLog()\n"
        "with log.catching():\n"
        "    print('a line of vLLM')\n"
        "print(log.path, log.place)\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines() == ["a line of vLLM", "None its log is above"]
