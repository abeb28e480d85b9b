"""What a byte of a dump buys: a study's arms by the bytes of their dumps.

    python scripts/studies/bytes.py STUDY
    python scripts/studies/bytes.py STUDY --picture PICTURE.png --beside k64

Prints a table: of each arm the bytes that a token of its dump takes on disk, what its students
gained on the domain, and how far they moved from the base on held-out text.
With --beside, the differences to that arm, of runs with the same seed: they read the same text in
the same order. The picture shows gain against KL, and the bytes by colour.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

from storage import Dump

Json = dict[str, Any]
KL, OTHER = "forward_kl", "other_forward_kl"


def read(file: Path) -> Json:
    found: Json = json.loads(file.read_text(encoding="utf-8"))
    return found


def dump_of(folder: Path, run: str) -> str | None:
    found = read(folder / "runs" / run / "run.json")
    given: str | None = found["train"].get("dump")
    return given if found["arm"]["targets"] in ("stored", "renormalised") else None


def bytes_a_token(dump: str) -> float:
    """Of the shards. The tables, which a dump has once, are left out."""
    shards = Dump(dump).now().shards()
    return sum(s.marker["bytes"] for s in shards) / sum(s.tokens for s in shards)


def mean(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{spread}"


def main(folder: Path, beside: str | None, picture: Path | None) -> None:
    runs = read(folder / "results.json")["runs"]
    of_arm: dict[str, dict[int, Json]] = {}
    places = {}
    for name, run in runs.items():
        of_arm.setdefault(run["arm"], {})[run["seed"]] = run
        places[run["arm"]] = dump_of(folder, name)
    shown = {"domain_gain": "domain gain", KL: "KL(base‖m)", OTHER: "other text's KL"}
    shown = {name: title for name, title in shown.items() if all(name in r for r in runs.values())}
    titles = [f"{title}, beside {beside}" if beside else title for title in shown.values()]
    print("|", " | ".join(["arm", "seeds", "bytes a token", *titles]), "|")
    print("|" + " --- |" * (3 + len(titles)))
    points = []
    for arm, found in of_arm.items():
        dump = places[arm]
        size = bytes_a_token(dump) if dump else None
        same = of_arm[beside] if beside else dict.fromkeys(found, dict.fromkeys(shown, 0.0))
        values = [
            [run[name] - same[seed][name] for seed, run in found.items() if seed in same]
            for name in shown
        ]
        row = [arm, str(len(found)), f"{size:.1f}" if size else "", *map(mean, values)]
        print("|", " | ".join(row), "|")
        points.append((arm, size, *map(statistics.mean, values[:2])))
    if picture:
        draw(points, titles, picture)


def draw(points: list[Any], titles: list[str], picture: Path) -> None:
    """Gain against KL; the colour is the bytes of a token, and a cross has no dump."""
    plt.rcParams["svg.hashsalt"] = "bytes"
    figure, plot = plt.subplots(figsize=(7.6, 4.6), layout="constrained")
    with_dump = [point for point in points if point[1]]
    _, sizes, gains, kls = zip(*with_dump, strict=True)
    shown = plot.scatter(kls, gains, c=sizes, norm="log", cmap="viridis_r", s=24)
    for name, size, gain, kl in points:
        if size is None:
            plot.plot(kl, gain, "kx", markersize=5)
        label = name if size is None else f"{name} {size:.0f}"
        plot.annotate(label, (kl, gain), (4, 2), textcoords="offset points", fontsize=6)
    figure.colorbar(shown, label="bytes of a token on disk")
    plot.set(xlabel=f"{titles[1]}, nats", ylabel=f"{titles[0]}, nats")
    plot.grid(True, alpha=0.3)
    plot.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, dpi=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", type=Path)
    parser.add_argument("--beside", help="an arm whose runs the others' are compared with")
    parser.add_argument("--picture", type=Path)
    given = parser.parse_args()
    main(given.study, given.beside, given.picture)
