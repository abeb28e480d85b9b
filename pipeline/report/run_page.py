"""The page about one training run."""

from pathlib import Path

from pipeline.config import KINDS
from pipeline.json_files import read_json, read_lines
from pipeline.report.html import axes, heading, lead, page, pairs, picture
from pipeline.types import Json

KNOWN = {
    "steps": "steps",
    "null_test_kl": "null_test_kl",
    "seconds": "seconds",
    "domain_tokens": "domain targets",
    "general_tokens": "general targets",
}
"""Numbers of the summary, with their labels."""


def report(folder: Path) -> str:
    lines = read_lines(folder / "metrics.jsonl")
    summary_file = folder / "summary.json"
    summary = read_json(summary_file) if summary_file.exists() else {}
    known = {label: summary[name] for name, label in KNOWN.items() if name in summary}
    parts = [lead(in_words(lines, summary)), pairs(known | null_test(summary))]
    for title, plots in [
        ("Losses", {"cross-entropy, domain": ["ce"], "KL to the base, general": ["kl"]}),
        (
            "Held-out perplexity",
            {kind: [f"eval_{kind}_perplexity"] for kind in KINDS},
        ),
        ("Speed", {"targets per second": ["tokens_per_s"], "share spent waiting": ["wait_share"]}),
        ("Optimizer", {"learning rate": ["learning_rate"], "gradient norm": ["grad_norm"]}),
    ]:
        drawn = curves(lines, plots)
        if drawn:
            parts += [heading(title), drawn]
    if "identity" in summary:
        parts += [heading("Settings"), pairs(summary["identity"])]
    return page(f"Training run {folder}", parts)


def in_words(lines: list[Json], summary: Json) -> str:
    """How far the run is, and what its losses did."""
    last = max((line["step"] for line in lines), default=0)
    said = f"The run took {last:,} steps" if summary else f"The run has taken {last:,} steps so far"
    counts = {"domain": "domain_tokens", "general": "general_tokens"}
    found = [f"{summary[of]:,} {kind}" for kind, of in counts.items() if of in summary]
    said += f", on {' and '.join(found)} targets." if found else "."
    for name, label in (("ce", "Cross-entropy on the domain"), ("kl", "KL to the base")):
        values = [float(line[name]) for line in lines if name in line]
        if any(values):
            said += f" {label} went from {values[0]:.3g} to {values[-1]:.3g} nats."
    for kind in KINDS:
        held = [float(line[of]) for line in lines if (of := f"eval_{kind}_perplexity") in line]
        if len(held) > 1:
            said += f" Held-out {kind} perplexity went from {held[0]:.4g} to {held[-1]:.4g}."
    return said


def null_test(summary: Json) -> Json:
    """What the null test answered, and where a difference begins; nothing for older runs."""
    found = summary.get("null_test") or {}
    return {
        label: found[name]
        for name, label in (("answer", "null test"), ("where", "null test, difference"))
        if found.get(name)
    }


def curves(lines: list[Json], plots: dict[str, list[str]]) -> str | None:
    """Plots of logged values by step, side by side; None if the log has none of them."""
    there = {
        title: names
        for title, names in plots.items()
        if any(name in line for line in lines for name in names)
    }
    if not there:
        return None
    figures, drawn = axes(len(there))
    for axis, (title, names) in zip(drawn, there.items(), strict=True):
        for name in names:
            points = [(line["step"], float(line[name])) for line in lines if name in line]
            axis.plot(*zip(*points, strict=True), marker="." if len(points) < 30 else None)
        axis.set(title=title, xlabel="optimizer step")
    return picture(figures, ", ".join(there))
