"""Results of a study: the numbers of each run, means and spread over seeds, the table."""

from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config import KINDS
from pipeline.json_files import read_json, read_lines
from pipeline.study.config import StudyConfig

Json = dict[str, Any]
BASE, RESULTS = "base", "results.json"


def of_run(folder: Path, base: Json) -> Json:
    """The numbers of one finished run."""
    measures = read_json(folder / "measures.json")
    summary = folder / "summary.json"
    trained = read_json(summary) if summary.exists() else {}
    return {
        **against(measures, base),
        "seconds": trained.get("seconds"),
        "null_test_kl": trained.get("null_test_kl"),
        "null_test": (trained.get("null_test") or {}).get("answer"),
        "curve": curve(folder / "metrics.jsonl"),
        **{kind: measures[kind] for kind in KINDS if kind in measures},
    }


def collect(config: StudyConfig, found: dict[str, Json], base: Json) -> Json:
    """The content of results.json: all finished runs, and their means and spread over seeds.

    `found` has the finished runs by name, each `of_run` with its arm, learning_rate and seed. The
    means are over the seeds of each arm and learning rate.
    """
    points: dict[tuple[str, float], list[Json]] = {}
    for of in found.values():
        points.setdefault((of["arm"], of["learning_rate"]), []).append(of)
    order = list(config.arms)
    return {
        "model": config.model,
        "max_length": config.max_length,
        "machine": machine(),
        "base": against(base, base) | base,
        "arms": [
            {"arm": arm, "learning_rate": rate, "seeds": sorted(of["seed"] for of in members)}
            | {
                name: spread([of[name] for of in members])
                for name in HEADLINE
                if all(name in member for member in members)
            }
            for (arm, rate), members in sorted(
                points.items(), key=lambda point: (order.index(point[0][0]), point[0][1])
            )
        ],
        "runs": found,
    }


HEADLINE = {
    "domain_perplexity": "domain perplexity",
    "general_perplexity": "general perplexity",
    "domain_gain": "domain gain",
    "general_loss": "general loss",
    "forward_kl": "KL(base‖m)",
    "reverse_kl": "KL(m‖base)",
    "top1_agreement": "same top-1",
    "other_loss": "other's loss",
    "other_forward_kl": "other's KL(base‖m)",
    "other_reverse_kl": "other's KL(m‖base)",
    "tasks_right": "tasks right",
    "tasks_kept": "tasks kept",
}
"""Measures of a run and their labels. Gain and losses are nats of log-perplexity against the base,
divergences are on the general text. The "other" measures are on general text of another source, if
the study has some; the tasks' are the share of right answers, and of the base's that are kept."""


def against(measures: Json, base: Json) -> Json:
    """The HEADLINE measures of one model."""
    domain, general = measures["domain"], measures["general"]
    found = {
        "domain_perplexity": domain["perplexity"],
        "general_perplexity": general["perplexity"],
        "domain_gain": -rise(domain, base["domain"]),
        "general_loss": rise(general, base["general"]),
        **{name: general[name] for name in ("forward_kl", "reverse_kl", "top1_agreement")},
    }
    if "other" in measures:
        other = measures["other"]
        found["other_loss"] = rise(other, base["other"])
        found |= {f"other_{name}": other[name] for name in ("forward_kl", "reverse_kl")}
    return {name: float(value) for name, value in found.items()}


def rise(measures: Json, base: Json) -> float:
    """Nats of log-perplexity above the base's; infinite or NaN where one of them is."""
    with np.errstate(all="ignore"):
        ours, theirs = np.log([float(of["perplexity"]) for of in (measures, base)])
        return float(ours - theirs)


def spread(values: list[float]) -> Json:
    """Mean and sample standard deviation, which is None for a single value."""
    with np.errstate(all="ignore"):  # a student that diverged
        deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
        return {"mean": float(np.mean(values)), "sd": deviation, "values": values}


def curve(metrics: Path) -> Json:
    """{"step", "domain", "general", "other"}: held-out perplexities during training; {"loss_step",
    "ce", "kl"}: the losses."""
    lines = read_lines(metrics) if metrics.exists() else []
    held = [line for line in lines if "eval_domain_perplexity" in line]
    kinds = [kind for kind in KINDS if any(f"eval_{kind}_perplexity" in line for line in held)]
    steps = [line for line in lines if "ce" in line]
    return {
        "step": [line["step"] for line in held],
        **{kind: [float(line[f"eval_{kind}_perplexity"]) for line in held] for kind in kinds},
        "loss_step": [line["step"] for line in steps],
        "ce": [line["ce"] for line in steps],
        "kl": [line["kl"] for line in steps],
    }


def machine() -> Json:
    import torch  # imported late: reading results needs no torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {"torch": torch.__version__, "device": device, "threads": torch.get_num_threads()}


def table(results: Json) -> str:
    """Markdown: one line per arm and learning rate, mean ± standard deviation over seeds."""
    rates = len({of["learning_rate"] for of in results["arms"]}) > 1
    shown = {name: label for name, label in HEADLINE.items() if name in results["base"]}
    head = ["arm", *(["learning rate"] if rates else []), "seeds", *shown.values()]
    base = {name: spread([results["base"][name]]) for name in shown}
    rows = []
    for of in [{"arm": BASE, "learning_rate": 0, "seeds": [], **base}, *results["arms"]]:
        rate = [f"{of['learning_rate']:g}"] if rates else []
        values = [show(name, of[name]) if name in of else "" for name in shown]
        rows.append([of["arm"], *rate, str(len(of["seeds"]) or ""), *values])
    lines = [" | ".join(row) for row in [head, ["---"] * len(head), *rows]]
    return "\n".join(f"| {line} |" for line in lines)


def show(name: str, value: Json) -> str:
    digits = {"domain_perplexity": 2, "general_perplexity": 2}.get(name, 3)
    if name.endswith("_kl"):
        digits = 4
    shown = f"{float(value['mean']):.{digits}f}"
    return shown if value["sd"] is None else f"{shown} ± {float(value['sd']):.{digits}f}"
