"""A picture of a study: what each run gained on the domain, against how far it moved elsewhere.

    python scripts/studies/frontier.py STUDY/results.json PICTURE.png
    python scripts/studies/frontier.py STUDY/results.json PICTURE.png --x forward_kl

--x is one of the measures of results.json, by default the KL to the base on text of another source.
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

LABELS = {
    "other_forward_kl": "KL to the base on text of another source, nats",
    "forward_kl": "KL to the base on general text, nats",
    "general_loss": "loss on general text, nats of log-perplexity",
}
MARKERS = "os^Dv<>Pp*Xh"


def main(results: Path, picture: Path, x: str) -> None:
    found = json.loads(results.read_text(encoding="utf-8"))
    plt.rcParams["svg.hashsalt"] = "frontier"
    figure, plot = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    plot.plot(0, 0, "k+", label="base")
    for number, arm in enumerate(found["arms"]):
        name, rate = arm["arm"], arm["learning_rate"]
        runs = [
            run
            for run in found["runs"].values()
            if (run["arm"], run["learning_rate"]) == (name, rate)
        ]
        marker = MARKERS[number % len(MARKERS)]
        points = [run[x] for run in runs], [run["domain_gain"] for run in runs]
        plot.scatter(*points, s=30, marker=marker, label=name)
    plot.set(xlabel=LABELS.get(x, x), ylabel="gain on the domain, nats")
    plot.grid(True, alpha=0.3)
    plot.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(picture, dpi=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--x", default="other_forward_kl")
    given = parser.parse_args()
    main(given.results, given.picture, given.x)
