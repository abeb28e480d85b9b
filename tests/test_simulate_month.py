"""The simulation of many preempted workers: it finds nothing, and would find what is wrong."""

import importlib
import sys
from collections.abc import Callable
from typing import Any

import pytest

import pipeline.dump.partitions as partitions
from storage import CorruptShard, ShardWriter, gc
from storage.store import Store
from tests.helpers.paths import ROOT

sys.path.append(str(ROOT / "scripts" / "benchmarks"))
virtual: Any = importlib.import_module("virtual_time")
simulated: Any = importlib.import_module("simulated_store")
month: Any = importlib.import_module("simulate_month")

# A slow store that fails often, and machines that live for two shards: much happens in a few days.
FAULTS = simulated.Faults(delay=60.0, lost=0.02, unanswered=0.03, doubled=0.03, fatal=0.005)
DAYS = {"workers": 6, "partitions": 6, "days": 4.0, "shard": 4.0, "life": 8.0, "orphans": 0.6}


def simulate(seed: int = 0, **changes: Any) -> Any:
    return month.simulate(month.Month(**DAYS, seed=seed, faults=FAULTS, **changes))


def test_nothing_is_lost_or_doubled() -> None:
    report = simulate()
    assert report.faults == 0, report
    assert report.rows == report.month.sequences
    # It was no quiet month.
    assert min(report.in_commit, report.orphans, report.frozen, report.second, report.strays) > 0
    happened = report.happened
    assert min(happened[name] for name in ("lost", "unanswered", "doubled", "refused")) > 0
    assert 0 < report.twice < 3


def test_a_month_follows_from_its_seed() -> None:
    first, again = (str(simulate(codec="v1", seed=1)) for _ in range(2))
    assert first == again


def lost_answers_are_another_writer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The own marker, created by a request whose answer was lost, is taken for another's."""

    def create(store: Store, name: str, data: bytes) -> bool:
        try:
            put = lambda: store.fs.pipe_file(store / name, data, mode="create")  # noqa: E731
            store.attempt("write", name, put)
        except FileExistsError:
            return False
        return True

    monkeypatch.setattr(Store, "create", create)


def markers_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """The store creates what is there already."""
    put = simulated.Bucket.put
    monkeypatch.setattr(simulated.Bucket, "put", lambda *of, new: put(*of, new=False))


def numbers_are_newer_than_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer takes the next free number, and goes on from the document that it read before."""
    monkeypatch.setattr(partitions, "ShardWriter", lambda partition, _: ShardWriter(partition))


def gc_removes_what_is_young(monkeypatch: pytest.MonkeyPatch) -> None:
    """gc removes files that no marker names yet, and reads only the markers that it has listed."""
    leftovers = month.leftovers
    listed = gc.MARKER.fullmatch
    monkeypatch.setattr(gc, "marker_of", lambda name: name if listed(name) else None)
    monkeypatch.setattr(month, "leftovers", lambda path: leftovers(path, hours=0))


@pytest.mark.parametrize(
    ("broken", "changes"),
    [
        (lost_answers_are_another_writer, {}),
        (markers_are_replaced, {}),
        (numbers_are_newer_than_places, {}),
        (gc_removes_what_is_young, {"gc_every": 1.0}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_broken_protocol_is_found(
    broken: Callable[[pytest.MonkeyPatch], None],
    changes: dict[str, float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By the audit, or already by a writer that reads markers which do not fit together."""
    broken(monkeypatch)
    try:
        report = simulate(codec="v1", **changes)
    except CorruptShard:
        return
    assert report.faults > 0, report


def test_processes_take_turns_in_the_order_of_their_times() -> None:
    clock, seen = virtual.Clock(), list[tuple[str, float]]()
    machines = {name: virtual.Machine() for name in ("goes on", "frozen", "killed")}

    def work(name: str) -> None:
        for _ in range(3):
            clock.sleep(10.0)
            seen.append((name, clock.now))

    for name, machine in machines.items():
        clock.start(lambda name=name: work(name), machine)
    clock.call(15.0, lambda: setattr(machines["frozen"], "frozen_until", 100.0))
    clock.call(25.0, lambda: clock.kill(machines["killed"]))
    clock.run()
    assert [time for name, time in seen if name == "goes on"] == [10, 20, 30]
    assert [time for name, time in seen if name == "frozen"] == [10, 100, 110]
    assert [time for name, time in seen if name == "killed"] == [10, 20]
    assert [time for _, time in seen] == sorted(time for _, time in seen)


def test_an_error_of_a_process_ends_the_run() -> None:
    clock = virtual.Clock()
    clock.start(lambda: clock.sleep(1 / 0), virtual.Machine())
    with pytest.raises(ZeroDivisionError):
        clock.run()
