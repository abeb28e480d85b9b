"""A study's numbers, also those of a student that diverged."""

import json
import math
from typing import Any

import pytest

from pipeline.json_files import strict
from pipeline.study.results import against, show, spread


def measures(perplexity: float) -> Any:
    """As they are read from a file."""
    names = ("forward_kl", "reverse_kl", "top1_agreement")
    text = {"perplexity": perplexity, **dict.fromkeys(names, perplexity)}
    return json.loads(json.dumps(strict({"domain": text, "general": text})))


@pytest.mark.parametrize("perplexity", [math.inf, math.nan])
def test_a_student_that_diverged_has_no_gain(perplexity: float) -> None:
    found = against(measures(perplexity), measures(20.0))
    expected = (-math.inf, math.inf) if perplexity == math.inf else (math.nan, math.nan)
    assert (found["domain_gain"], found["general_loss"]) == pytest.approx(expected, nan_ok=True)
    line = spread([found["general_loss"], 1.0])
    assert not math.isfinite(line["mean"])
    assert show("general_loss", json.loads(json.dumps(strict(line)))) in ("inf ± nan", "nan ± nan")


def test_spread() -> None:
    assert spread([1.0, 3.0]) == {"mean": 2.0, "sd": pytest.approx(2**0.5), "values": [1.0, 3.0]}
    assert spread([1.0])["sd"] is None
