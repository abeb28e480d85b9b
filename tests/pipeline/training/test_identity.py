"""Runs of earlier releases resume; another rendering of the domain does not."""

import pytest

from pipeline.errors import RefusedError
from pipeline.recorded import refuse_other_settings
from pipeline.training.identity import completed
from pipeline.types import Json


def test_a_run_without_the_rendering_is_resumed() -> None:
    there, here = {"mix": 1}, {"mix": 1, "domain_rendering": {"sample": "a"}}
    refuse_other_settings("run", completed(there, here), here)
    with pytest.raises(RefusedError, match="mix: 1 in the run, 2 asked for"):
        refuse_other_settings("run", completed(there, here), {**here, "mix": 2})


def test_another_rendering_is_another_run() -> None:
    there, here = ({"domain_rendering": {"sample": name}} for name in "ab")
    with pytest.raises(RefusedError, match=r"domain_rendering\.sample: 'a' in the run, 'b'"):
        refuse_other_settings("run", completed(there, here), here)


def test_a_model_that_computes_otherwise_is_another_run() -> None:
    here = {"model": "a", "model_config": {"rms_norm_eps": "0.1"}}
    refuse_other_settings("run", completed({"model": "a"}, here), here)
    there = {"model": "a", "model_config": {"rms_norm_eps": "1e-06"}}
    with pytest.raises(RefusedError, match=r"model_config\.rms_norm_eps: '1e-06' in the run"):
        refuse_other_settings("run", completed(there, here), here)


def test_a_run_of_before_does_not_say_how_chats_with_tools_were_rendered() -> None:
    def of(**template: str) -> Json:
        return {
            "domain_rendering": {"sample": "s", "chat_template": {"fingerprint": "f"} | template}
        }

    here = {"model_config": {}, **of(with_tools="t")}
    refuse_other_settings("run", completed(of(), here), here)
    for there in (of(), of(with_tools="u")):
        there = {"model_config": {}, **there}
        with pytest.raises(RefusedError, match=r"chat_template\.with_tools: .*, 't' asked for"):
            refuse_other_settings("run", completed(there, here), here)
