"""The calculator of deploy/SIZING.md: its laws, its tables, and the page."""

import importlib
import re
import sys
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.dump import sizing
from pipeline.dump.sizing import LAWS, MACHINES, Engine, Size
from tests.helpers.dumps import OPENING
from tests.helpers.paths import ROOT

sys.path.append(str(ROOT / "scripts" / "benchmarks"))
month: Any = importlib.import_module("simulate_month")
simulated: Any = importlib.import_module("simulated_store")


def test_the_page_has_what_the_calculator_prints() -> None:
    page = (ROOT / "deploy" / "SIZING.md").read_text()
    assert all(part in page for part in sizing.page().split("\n\n")), (
        "python -m pipeline.dump.sizing prints other tables: copy them into the page"
    )


def test_measured_laws_stand_in_the_pages_that_they_name() -> None:
    """The others are measured here."""
    paged = {name: law for name, law in LAWS.items() if law.source.endswith(".md")}
    assert len(paged) == 6
    for name, law in paged.items():
        source = (ROOT / law.source).read_text()
        assert re.search(rf"(?<![\d.]){law.value:g}(?:\.0)?(?![\d.])", source), name


def requests(codec: str, partitions: int, days: int) -> tuple[int, int, int]:
    """(requests while a quiet dump is written, those of two manifests, shards)."""
    none = simulated.Faults(0.1, 20.0, 0.0, 0.0, 0.0, 0.0, 0.0, 10**9, 0.0)
    undisturbed = month.Month(
        *(1, partitions, float(days), 1.0, 1e9),
        orphans=0.0,
        outages=1e-9,
        gc_every=1e9,
        codec=codec,
        faults=none,
    )
    before: list[Counter[str]] = []

    class Counting(month.Fleet):
        def finish(self) -> None:
            before.append(Counter(self.bucket.requests))
            if len(before) == 1:  # one task, not two
                super().finish()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(month, "Fleet", Counting)
        report = month.simulate(undisturbed)
    assert report.faults == 0
    writing = before[0].total()
    return writing, report.requests.total() - writing, report.shards


@pytest.mark.parametrize(("codec", "law"), [("v3", "requests, v3"), ("v1", "requests, v1 and v2")])
def test_requests_follow_the_laws(codec: str, law: str) -> None:
    """Of an undisturbed dump, whose four partitions have six shards each. The simulation leaves out
    how a partition learns what to read."""
    partitions = 4
    writing, manifest, shards = requests(codec, partitions, days=1)
    assert shards == 24
    ends = (LAWS["requests of starts and ends"].value - OPENING) * partitions
    assert writing <= LAWS[law].value * shards + ends
    each, part = (LAWS[f"requests of the manifest{more}"].value for more in ("", ", too"))
    assert manifest <= each * shards + part * partitions + 5


@given(
    st.floats(1e3, 1e12),
    st.integers(1, 64),
    st.builds(
        Engine, st.floats(1, 1e6), st.floats(1, 1e3), st.floats(0, 1e4), st.integers(1, 1 << 30)
    ),
)
def test_sizes_add_up(tokens: float, engines: int, of: Engine) -> None:
    sizes = [Size(tokens, machines, machines * engines, of) for machines in MACHINES]
    for size in sizes:
        assert size.partitions % size.engines == 0
        assert size.engines <= size.partitions <= sizing.ROUNDS * size.engines
        assert size.shards * of.shard_tokens >= 0.999 * tokens
        assert 0 <= size.starting <= 1
        if size.partitions > size.engines:
            assert size.starting <= sizing.START_SHARE * 1.001
        alone = size.seconds * size.engines * of.tokens_per_s
        assert alone >= 0.999 * tokens
    seconds = [size.seconds for size in sizes]
    assert seconds == sorted(seconds, reverse=True)


def test_a_known_size() -> None:
    """1.04 B tokens at 26,000 a second by 8 engines: 5,000 s and two starts."""
    size = Size(1.04e9, 1, 8, Engine(26_000, 60, 100, 1_000_000))
    assert size.partitions == 16
    assert size.seconds == 5200
    assert size.shards == 16 * 65
    assert size.disk == 62.4e9
    assert size.staging == 2 * 8 * 60e6
    assert size.cores == pytest.approx(8 * 26_000 * 18.8e-6)
    assert size.requests_per_s == pytest.approx((11 * 1040 + 23 * 16) / 5200)
    assert size.manifest_requests == 1040 + 2 * 16
