"""Sizes of tokenizer and head that differ."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from pipeline.config import CorpusConfig, EvalConfig
from pipeline.errors import ConfigError, RefusedError
from pipeline.evaluation import evaluate
from pipeline.training import train
from tests.helpers.corpora import some_texts, write_texts
from tests.helpers.models import tiny_model, tiny_tokenizer
from tests.helpers.runs import settings


def test_ids_that_the_head_lacks(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["<one>"])
    tokenizer.save_pretrained(model)
    domain = write_texts(tmp_path / "domain.jsonl", some_texts(3))
    with pytest.raises(ConfigError, match="tokenizer has 513 tokens, its head 512"):
        train.run(settings(tmp_path, model, None, domain, mix=0, max_length=64))
    with pytest.raises(ConfigError, match="tokenizer has 513 tokens, its head 512"):
        evaluate.run(EvalConfig({"base": str(model)}, domain=CorpusConfig(str(domain))))


def test_heads_of_two_sizes_are_not_compared(tmp_path: Path, model_path: Path) -> None:
    wider = tiny_model(tmp_path / "wider", vocab_size=600)
    tiny_tokenizer(wider)
    domain = write_texts(tmp_path / "domain.jsonl", some_texts(3))
    models = {"base": str(model_path), "wider": str(wider)}
    with pytest.raises(RefusedError, match="600 ids in its head, base has 512"):
        evaluate.run(EvalConfig(models, domain=CorpusConfig(str(domain))))
