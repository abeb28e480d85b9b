"""The page about a study: the domain gain of each run against its loss on general text."""

import math
from itertools import cycle
from math import ceil
from pathlib import Path
from typing import Any

from pipeline.agreement import Answer
from pipeline.config import KINDS
from pipeline.json_files import read_json
from pipeline.report import task_parts
from pipeline.report.html import axes, heading, lead, note, page, pairs, picture, quote, table
from pipeline.study.results import RESULTS
from pipeline.study.results import table as as_markdown
from pipeline.types import Json
from storage.text import printable

DIFFERENT = Answer.DIFFERENT.value
MARKERS = "os^Dv<>Pp*Xh"
BELOW: Json = {"loc": "outside lower center", "fontsize": "small"}


def report(folder: Path) -> str:
    results = read_json(folder / RESULTS)
    return page(
        f"Study of {results['model']}",
        [
            lead(f"{in_words(results)} {task_parts.said(results)}".strip()),
            heading("The frontier"),
            frontier(results),
            heading("Arms"),
            arms(results),
            note(
                "Mean ± standard deviation over the seeds. Gain and loss are nats of "
                "log-perplexity against the base. Divergences and top-1 are on the general text; "
                "columns named other's are on general text of another source. All measures are "
                "means over targets, the tokens that are learnt."
            ),
            *task_parts.of_arms(results),
            *forgetting(results),
            heading("Runs"),
            runs(results),
            note("Intervals: 95 % bootstrap over held-out documents."),
            *differences(results),
            *examples(results),
            heading("Made with"),
            pairs(results["machine"] | {"max_length": results["max_length"]}),
        ],
    )


NEARLY = 0.95  # of the largest gain


def in_words(results: Json) -> str:
    """Which arm gains most on the domain, and which of those that gain nearly as much loses
    least."""
    found = {
        label: [float(of[name]["mean"]) for name in ("domain_gain", "general_loss")]
        for label, of in zip(by_arm(results), results["arms"], strict=True)
    }
    found = {label: both for label, both in found.items() if all(map(math.isfinite, both))}
    if not found:
        return "No arm has a finished run without NaN yet."
    best = max(found, key=lambda label: found[label][0])
    gain, loss = found[best]
    said = f"{best} gains most on the domain: {gain:.3f} nats of log-perplexity. "
    said += f"On general text it {moved(loss)}."
    near = [label for label, (of, _) in found.items() if of >= NEARLY * gain]
    least = min(near, key=lambda label: found[label][1])
    if gain > 0 and least != best:
        gain, loss = found[least]
        said += f" Of the arms that gain at least {NEARLY:.0%} of that, {least} loses least: it "
        said += f"gains {gain:.3f} nats, and on general text it {moved(loss)}."
    return said


def moved(loss: float) -> str:
    """A loss in nats as words; one below 0 is a gain."""
    return f"loses {loss:.3f} nats" if loss >= 0 else f"gains {-loss:.3f} nats"


def pareto(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (loss, gain) that no other point beats in both, sorted by loss."""
    front: list[tuple[float, float]] = []
    for loss, gain in sorted(set(points), key=lambda point: (point[0], -point[1])):
        if not front or gain > front[-1][1]:
            front.append((loss, gain))
    return front


def frontier(results: Json) -> str:
    labels = len(results["arms"]) + 1
    figures, [plot] = axes(1, 5.6, 3.8 + 0.2 * ceil(labels / 3))
    for (label, of), colour, marker in zip(
        by_arm(results).items(), colours(len(results["arms"])), cycle(MARKERS), strict=False
    ):
        loss, gain = ([float(one[name]) for one in of] for name in ("general_loss", "domain_gain"))
        plot.scatter(loss, gain, color=colour, marker=marker, label=label, s=30, zorder=3)
    runs = results["runs"].values()
    points = [(float(one["general_loss"]), float(one["domain_gain"])) for one in runs]
    points = [point for point in points if all(map(math.isfinite, point))]  # not diverged
    front = pareto([(0.0, 0.0), *points])
    plot.step(*zip(*front, strict=True), where="post", color="0.5", linewidth=1, zorder=1)
    plot.scatter([0], [0], color="k", marker="+", label="base", zorder=2)
    plot.set(
        xlabel="loss on general text, nats of log-perplexity",
        ylabel="gain on the domain, nats",
    )
    figures[0].legend(ncols=3, **BELOW)
    caption = "One point per run. Grey: the Pareto front. Left and up is better."
    return picture(figures, caption)


def by_arm(results: Json) -> dict[str, list[Json]]:
    """The runs by arm, in the table's order; also by learning rate if there are several."""
    rates = len({of["learning_rate"] for of in results["arms"]}) > 1
    found: dict[str, list[Json]] = {}
    for of in results["arms"]:
        label = f"{of['arm']} {of['learning_rate']:g}" if rates else of["arm"]
        label = printable(f" {label}" if label.startswith("_") else label)  # no legend shows _x
        found[label] = [
            one
            for one in results["runs"].values()
            if (one["arm"], one["learning_rate"]) == (of["arm"], of["learning_rate"])
        ]
    return found


def colours(number: int) -> list[Any]:
    from matplotlib import colormaps

    map_ = colormaps["tab10" if number <= 10 else "tab20"]
    return [map_(at % map_.N) for at in range(number)]


def arms(results: Json) -> str:
    """The content of table.md as HTML."""
    lines = [line.strip("| ").split(" | ") for line in as_markdown(results).splitlines()]
    rows = [[cell.strip() for cell in line] for line in lines]
    return table(rows[0], rows[2:])


def forgetting(results: Json) -> list[str]:
    """Plots of perplexity by step, averaged over each arm's seeds; empty if none was measured."""
    drawn = {
        label: [one["curve"] for one in of if one["curve"]["step"]]
        for label, of in by_arm(results).items()
    }
    drawn = {label: curves for label, curves in drawn.items() if curves}
    if not drawn:
        return []
    [first, *_], *_ = drawn.values()
    kinds = [kind for kind in KINDS if kind in first]
    figures, plots = axes(len(kinds), height=3.0 + 0.2 * ceil(len(drawn) / 2))
    for (label, curves), colour in zip(drawn.items(), colours(len(drawn)), strict=True):
        for plot, kind in zip(plots, kinds, strict=True):
            values = zip(*(map(float, curve[kind]) for curve in curves), strict=False)
            mean = [sum(value) / len(value) for value in values]
            plot.plot(curves[0]["step"][: len(mean)], mean, color=colour, label=label)
            plot.set(title=kind, xlabel="optimizer step", ylabel="held-out perplexity")
            plot.set_yscale("log")
            plot.yaxis.set_major_formatter("{x:.3g}")
            plot.yaxis.set_minor_formatter("{x:.3g}")
    for figure in figures:
        figure.legend(*plots[0].get_legend_handles_labels(), ncols=2, **BELOW)
    return [heading("Forgetting, step by step"), picture(figures, "Means over the seeds.")]


def runs(results: Json) -> str:
    """A table with one line per run and kind of text."""
    head = ["run", "text", "perplexity", "95 %", "KL(base‖m)", "95 %", "KL(m‖base)"]
    head += ["tail KL", "ECE", "documents worse"]
    rows = []
    for name, one in results["runs"].items():
        for kind in KINDS:
            if kind in one:
                of = one[kind]
                row = [name, kind, digits(of["perplexity"], 2), span(of, "perplexity", 2)]
                row += [digits(of["forward_kl"], 4), span(of, "forward_kl", 4)]
                row += [digits(of["reverse_kl"], 4), digits(of["tail_kl"], 3), digits(of["ece"], 3)]
                rows.append([*row, f"{of['documents_worse']} of {of['documents']}"])
    return table(head, rows)


def differences(results: Json) -> list[str]:
    """A note on the runs that went on although the null test found a difference."""
    found = [name for name, one in results["runs"].items() if one.get("null_test") == DIFFERENT]
    kl = max((float(results["runs"][name]["null_test_kl"]) for name in found), default=0.0)
    return [
        note(f"Null test: {DIFFERENT}, {kl:.1e} nats at most, accepted in {', '.join(found)}.")
    ] * bool(found)


def span(of: Json, name: str, number: int) -> str:
    low, high = of["intervals"][name]
    return f"{digits(low, number)} to {digits(high, number)}"


def digits(value: float | str, number: int) -> str:
    """JSON holds NaN and infinities as text."""
    return f"{float(value):.{number}f}"


def examples(results: Json, shown: int = 2) -> list[str]:
    """The general documents with the largest loss in the first run of each arm."""
    parts = [heading("General documents with the largest loss")]
    for label, of in by_arm(results).items():
        parts.append(heading(label, 3))
        for example in of[0]["general"]["worst"][:shown]:
            names = ("base_nats_per_token", "nats_per_token")
            before, after = (digits(example[name], 2) for name in names)
            parts.append(
                note(
                    f"document {example['document']}, {example['tokens']:,} targets: "
                    f"{before} → {after} nats per token"
                )
            )
            parts.append(quote(example["text"]))
    return parts
