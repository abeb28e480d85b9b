"""What peft refuses is a setting, and named."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ConfigError
from pipeline.models.directory import ModelFolder
from pipeline.training.student import with_lora
from tests.helpers.runs import settings


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"no_such": 1}, r"lora\.no_such: .*unexpected keyword"),
        ({"r": -1}, r"lora\.r: .* positive integer"),
        ({"r": {"class_path": "os.system"}}, r"lora\.r: "),
        ({"target_modules": "["}, r"lora\.target_modules: unterminated"),
        ({"target_modules": 5}, "lora"),
        ({"rank_pattern": 5}, "lora"),
        ({"task_type": "X"}, "lora"),
        ({"loftq_config": 5, "init_lora_weights": "loftq"}, "lora"),
        ({"init_lora_weights": "nonsense"}, "lora"),
    ],
)
def test_adapters_that_peft_refuses(
    model_path: Path, tmp_path: Path, given: dict[str, Any], message: str
) -> None:
    config = settings(tmp_path, model_path, None, Path("d"), mix=0, max_length=64)
    config.lora = {"target_modules": "all-linear", **given}
    with pytest.raises(ConfigError, match=message):
        with_lora(ModelFolder(model_path).load("float32"), config)
