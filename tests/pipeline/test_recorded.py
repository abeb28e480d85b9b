"""Settings that are recorded beside a result."""

import pytest

from pipeline.config import CorpusConfig, DumpConfig, GenerateConfig
from pipeline.errors import RefusedError
from pipeline.recorded import recorded, refuse_other_settings


def test_every_difference_is_named() -> None:
    there = {"loss": {"alpha": 1.0, "direction": "forward"}, "mix": 1}
    refuse_other_settings("runs/a", there, dict(there))
    with pytest.raises(RefusedError) as told:
        refuse_other_settings("runs/a", there, {"loss": {"alpha": 2.0}, "mix": 1}, "study")
    assert "runs/a holds a study with other settings" in str(told.value)
    assert "loss.alpha: 1.0 in the study, 2.0 asked for" in str(told.value)
    assert "loss.direction: 'forward' in the study, None asked for" in str(told.value)
    assert "mix" not in str(told.value)


def test_records_are_those_of_earlier_releases_where_nothing_is_new() -> None:
    old = recorded(GenerateConfig("m", "o", 5, prompts=CorpusConfig("c")))
    columns = {"text_column", "messages_column"}
    assert set(old["prompts"]) == {"path", *columns, "split", "skip", "limit"}
    assert "replies" not in old
    assert (
        recorded(DumpConfig("m", CorpusConfig("c"), "o"))["corpus"].keys() == old["prompts"].keys()
    )
    new = GenerateConfig("m", "o", 5, prompts=CorpusConfig("c", special_tokens="split"))
    assert recorded(new)["prompts"]["special_tokens"] == "split"
    again = GenerateConfig("m", "o", 5, prompts=CorpusConfig("c", reread=True))
    assert recorded(again) == old
