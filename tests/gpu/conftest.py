"""Checks on a GPU: skipped where something is missing; each tells the runner what becomes of it.

`@pytest.mark.gpu(devices=2, package="vllm", seconds=300)` says what a check needs, and how long it
may take. It takes the fixture `measured` for its numbers. The runner (`python -m tests.gpu`) reads
a line of JSON for each event from the file that EVENTS names.
"""

import json
import os
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.device import DEVICE, missing
from tests.gpu.measured import Measured

EVENTS = "GPU_CHECK_EVENTS"
SECONDS = 180
"""A check may take this long unless it says otherwise."""

measures = pytest.StashKey[Measured]()
lacking = pytest.StashKey[str | None]()


def tell(check: str, event: str, **more: Any) -> None:
    if EVENTS in os.environ:
        with Path(os.environ[EVENTS]).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"check": check, "event": event, **more}) + "\n")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        marks = list(item.iter_markers("gpu"))
        if not marks:
            continue
        needs: dict[str, Any] = {"devices": 1, "package": None, "seconds": SECONDS}
        for mark in reversed(marks):  # the nearest one last
            needs |= mark.kwargs
        item.stash[lacking] = lacks = missing(needs["devices"], needs["package"])
        if lacks is not None:
            item.add_marker(pytest.mark.skip(reason=lacks))
        about = (getattr(item, "obj", None).__doc__ or "").strip().partition("\n")[0]
        tell(item.nodeid, "found", about=about, lacks=lacks, **needs)


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Measured:
    request.node.stash[measures] = found = Measured()
    return found


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        tell(item.nodeid, "started")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    result = yield
    if item.get_closest_marker("gpu"):
        wait()  # a kernel's error belongs to the check that started it
        if measures in item.stash:
            item.stash[measures].check()
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    decides = report.when == "call" or (report.when == "setup" and not report.passed)
    if decides and item.get_closest_marker("gpu"):
        found = item.stash.get(measures, Measured())
        why = reason(report, call)
        told = {"result": report.outcome, "why": why, "measured": found.lines()}
        tell(item.nodeid, "ended", seconds=call.duration, **told)
        if report.failed and broken():
            item.session.shouldstop = "CUDA does not work any more in this process"
    return report


def reason(report: pytest.TestReport, call: pytest.CallInfo[None]) -> str:
    """Why a check failed or was skipped, in a line."""
    if call.excinfo is None or report.passed:
        return ""
    if report.skipped:
        return str(call.excinfo.value)
    lines = str(call.excinfo.value).strip().splitlines() or [""]
    return f"{call.excinfo.typename}: {lines[0]}"[:500]


def wait() -> None:
    """Raises RuntimeError where a kernel has failed."""
    if DEVICE == "cuda" and "torch" in sys.modules:
        import torch

        torch.cuda.synchronize()


def broken() -> bool:
    """Whether an earlier error, such as an illegal address, has ended CUDA in this process."""
    try:
        wait()
    except RuntimeError:
        return True
    return False
