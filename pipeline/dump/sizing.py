"""How large a dump becomes on how many machines: engines, partitions, disk, requests, hours.

    python -m pipeline.dump.sizing

prints the tables of deploy/SIZING.md. They follow from a few laws, and each law says where it was
measured. `--estimate` puts in their place what it measures of a corpus and a model.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

MACHINES = (1, 4, 16, 64)
TOKENS = (10**8, 10**9, 10**10)
START_SHARE = 0.05
"""Most of a partition's time that its engine's start may take, where partitions can be larger."""
ROUNDS = 4
"""Most partitions for each engine. What a lost engine leaves at the end is one of them."""
OPEN_SHARDS = 2
"""of an engine, on its machine: one is filled while one is committed."""


class Law(NamedTuple):
    """A number, its unit, and where it was measured."""

    value: float
    unit: str
    source: str


LAWS = {
    "v3, by default": Law(39.7, "bytes a token", "storage/BENCHMARKS.md"),
    "v3": Law(60.0, "bytes a token", "storage/BENCHMARKS.md"),
    "v2": Law(71.9, "bytes a token", "storage/BENCHMARKS.md"),
    "v1": Law(111.8, "bytes a token", "storage/BENCHMARKS.md"),
    "entries that the cut-off leaves": Law(43, "a token", "pipeline/dump/README.md"),
    "CPU beside the engine": Law(18.8, "µs a token", "pipeline/dump/README.md"),
    "requests, v3": Law(11, "a shard", "tests/pipeline/dump/test_sizing.py"),
    "requests, v1 and v2": Law(7, "a shard", "tests/pipeline/dump/test_sizing.py"),
    "requests of starts and ends": Law(23, "a partition", "tests/pipeline/dump/test_sizing.py"),
    "requests of the manifest": Law(1, "a shard", "tests/pipeline/dump/test_sizing.py"),
    "requests of the manifest, too": Law(2, "a partition", "tests/pipeline/dump/test_sizing.py"),
}
"""Bytes are those of 64 entries of 32,768 ids. An id of V takes log2(V / 32,768) bits more."""


@dataclass(frozen=True)
class Engine:
    """What one engine does, and what its dump takes.

    tokens_per_s     of the engine, with top-k and writing
    bytes_per_token  of the shards
    start_s          seconds until it is ready
    shard_tokens     tokens of a shard
    shared_tables    whether shards share tables, as in version 3
    """

    tokens_per_s: float
    bytes_per_token: float
    start_s: float
    shard_tokens: int = 1_000_000
    shared_tables: bool = True


@dataclass(frozen=True)
class Size:
    """A dump of `tokens` by `engines` engines on `machines` machines."""

    tokens: float
    machines: int
    engines: int
    of: Engine

    @property
    def partitions(self) -> int:
        """As many for each engine as keep its starts short, up to ROUNDS."""
        work = self.tokens / self.engines / self.of.tokens_per_s
        rounds = START_SHARE * work / max(self.of.start_s, 1e-9)
        return self.engines * min(max(int(rounds), 1), ROUNDS)

    @property
    def seconds(self) -> float:
        """Each engine starts for each of its partitions, and all end together."""
        rounds = self.partitions // self.engines
        return rounds * self.of.start_s + self.tokens / self.engines / self.of.tokens_per_s

    @property
    def starting(self) -> float:
        """Share of the time in which engines start."""
        return self.partitions // self.engines * self.of.start_s / self.seconds

    @property
    def shards(self) -> int:
        """Each partition ends with a shard of its own."""
        each = self.tokens / self.partitions / self.of.shard_tokens
        return self.partitions * max(1, math.ceil(each))

    @property
    def disk(self) -> float:
        """Bytes of the dump."""
        return self.tokens * self.of.bytes_per_token

    @property
    def staging(self) -> float:
        """Bytes of open shards on a machine, where the dump is remote."""
        shard = min(self.of.shard_tokens, self.tokens / self.partitions)
        return OPEN_SHARDS * self.engines / self.machines * shard * self.of.bytes_per_token

    @property
    def cores(self) -> float:
        """CPU cores of a machine that are busy beside its engines."""
        per_token = LAWS["CPU beside the engine"].value * 1e-6
        return self.engines / self.machines * self.of.tokens_per_s * per_token

    @property
    def requests_per_s(self) -> float:
        """of all machines to the store, while they write."""
        law = LAWS["requests, v3" if self.of.shared_tables else "requests, v1 and v2"]
        each = LAWS["requests of starts and ends"]
        return (law.value * self.shards + each.value * self.partitions) / self.seconds

    @property
    def manifest_requests(self) -> float:
        """to finish the dump."""
        each, part = LAWS["requests of the manifest"], LAWS["requests of the manifest, too"]
        return each.value * self.shards + part.value * self.partitions


Cell = Callable[[Size], str]
WORK: dict[str, Cell] = {
    "machines": lambda size: short(size.machines),
    "engines": lambda size: short(size.engines),
    "partitions": lambda size: short(size.partitions),
    "hours": lambda size: short(size.seconds / 3600),
    "starts": lambda size: f"{size.starting:.0%}",
    "cores": lambda size: short(size.cores),
    "staging, GB": lambda size: short(size.staging / 1e9),
    "requests/s": lambda size: short(size.requests_per_s),
    "manifest": lambda size: short(size.manifest_requests),
}
"""Columns of what depends on the machines. `cores` and `staging` are those of one machine."""
CONTENT: dict[str, Cell] = {
    "tokens": lambda size: f"{short(size.tokens / 1e9)} B",
    "disk, GB": lambda size: short(size.disk / 1e9),
}


def short(value: float) -> str:
    """Two digits, or all of a larger number."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def table(sizes: Iterable[Size], columns: dict[str, Cell]) -> str:
    """A Markdown table with a row for each size."""
    rows = [[cell(size) for cell in columns.values()] for size in sizes]
    return lines_of([[*columns], ["---"] * len(columns), *rows])


def lines_of(rows: Iterable[Iterable[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def bytes_of(vocab_size: int) -> float:
    """Bytes a token of version 3 with its cut-off, in a larger vocabulary than that of the law."""
    law, entries = LAWS["v3, by default"], LAWS["entries that the cut-off leaves"]
    return law.value + entries.value * max(0.0, math.log2(vocab_size / LAW_VOCAB)) / 8


def on_machines(tokens: float, engines: int, of: Engine) -> str:
    """The table of one dump on MACHINES machines with so many engines each."""
    return table((Size(tokens, m, m * engines, of) for m in MACHINES), WORK)


def page() -> str:
    """The tables of deploy/SIZING.md."""
    laws = [[name, f"{law.value:g} {law.unit}", law.source] for name, law in LAWS.items()]
    found = [Size(tokens, m, m * GPUS, QWEN3_8B) for tokens in TOKENS for m in MACHINES]
    return "\n\n".join(
        [
            lines_of([["law", "", "measured in"], ["---"] * 3, *laws]),
            table(found, CONTENT | WORK),
        ]
    )


GPUS = 8
"""of a machine, with an engine each."""
LAW_VOCAB = 32_768
QWEN3_8B = Engine(tokens_per_s=26_000, bytes_per_token=bytes_of(151_936), start_s=120)
"""Arithmetic, not a measurement: see pipeline/dump/README.md. The start is assumed."""

if __name__ == "__main__":
    print(page())
