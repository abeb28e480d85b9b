"""Runs of earlier releases resume; another rendering of the domain does not."""

import pytest

from pipeline.errors import RefusedError
from pipeline.recorded import refuse_other_settings
from pipeline.training.identity import completed


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
