"""What stage two could not train is refused before it is dumped."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import T5Config

from pipeline.config import CorpusConfig, DumpConfig
from pipeline.dump import dump
from pipeline.errors import ConfigError
from pipeline.models.directory import ModelFolder
from pipeline.models.trainable import check_trainable
from tests.helpers.architectures import KINDS, saved, tiny
from tests.helpers.corpora import some_texts, write_texts
from tests.helpers.models import quantise_int8, tiny_model, tiny_tokenizer


@pytest.mark.parametrize("kind", list(KINDS))
def test_what_can_be_trained_is_taken(kind: str, tmp_path: Path) -> None:
    check_trainable(ModelFolder(saved(tiny(kind), tmp_path)))


def test_a_quantised_base_is_taken(tmp_path: Path) -> None:
    """The student may be the same model in whole numbers."""
    model = quantise_int8(tiny_model(tmp_path, tie=False, dtype=torch.bfloat16))
    check_trainable(ModelFolder(model))


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_a_dump_that_stage_two_would_refuse_is_not_begun(tmp_path: Path, engine: str) -> None:
    corpus = write_texts(tmp_path / "corpus.jsonl", some_texts(2))

    def refused(model: Path, why: str) -> None:
        config = DumpConfig(
            str(model), CorpusConfig(str(corpus)), str(tmp_path / "dump"), engine=engine
        )
        with pytest.raises(ConfigError, match=why):
            dump.run(config)
        assert not (tmp_path / "dump").exists()

    T5Config(d_model=16, d_ff=16, num_layers=1, num_heads=2).save_pretrained(tmp_path / "t5")
    tiny_tokenizer(tmp_path / "t5")
    refused(tmp_path / "t5", "could not train it.* no causal language model of it")
    more_ids = tiny_model(tmp_path / "more ids")
    tiny_tokenizer(more_ids, vocab_size=600)
    refused(more_ids, "its tokenizer has 600 tokens, its head 512")


def test_a_head_that_is_not_linear_is_refused(
    model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = ModelFolder(model_path)
    model = folder.empty()
    model.lm_head = nn.Sequential(nn.Linear(64, 512))
    monkeypatch.setattr(ModelFolder, "empty", lambda _: model)
    with pytest.raises(ConfigError, match=r"could not train it.* a plain linear layer is needed"):
        check_trainable(folder)
