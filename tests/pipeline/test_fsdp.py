"""What of FSDP2 can be tested without GPUs: accelerate 1.15 does not shard on a CPU."""

from pathlib import Path

import pytest

from tests.pipeline.corpora import some_texts, write_texts
from tests.pipeline.runs import script, settings, yaml_of


@pytest.mark.slow
def test_on_a_cpu_it_is_refused_and_not_passed_over(
    tmp_path: Path, model_path: Path, dump_path: Path
) -> None:
    domain = write_texts(tmp_path / "domain.jsonl", some_texts(4))
    training = {"fsdp": True, "fsdp_config": {"version": 2}}
    config = settings(tmp_path, model_path, dump_path, domain, training=training)
    done = script(yaml_of(tmp_path / "config.yaml", config), ranks=2)
    assert done.returncode != 0
    assert "accelerate shards on several GPUs only" in done.stderr
