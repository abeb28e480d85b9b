"""Sizes of tokenizer and head that differ."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.config import CorpusConfig, EvalConfig, HeldOutConfig
from pipeline.corpus import Corpus
from pipeline.data.packing import packed_rows
from pipeline.dump import dump
from pipeline.dump import recompute as verify
from pipeline.errors import ConfigError
from pipeline.evaluation import evaluate
from pipeline.models.directory import ModelFolder
from pipeline.models.vocabulary import difference_from_dump, tokenizer_files
from pipeline.token_sequences import read_tokens
from pipeline.training import train
from storage import LogitDataset
from tests.helpers import scripts
from tests.helpers.corpora import some_texts, write_texts
from tests.helpers.dumps import settings as dump_settings
from tests.helpers.models import tiny_model, tiny_tokenizer
from tests.helpers.runs import script, settings, yaml_of


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


def test_heads_of_two_widths_are_compared(tmp_path: Path, model_path: Path) -> None:
    """The model's 64 own columns have the mass e: its base's ids have 1 − e of theirs."""
    wide = widened(model_path, tmp_path / "wide")
    domain = write_texts(tmp_path / "domain.jsonl", some_texts(4))
    models = {"base": str(model_path), "wide": str(wide)}
    config = EvalConfig(models, general=CorpusConfig(str(domain)), max_length=64)
    found = evaluate.run(config)["models"]["wide"]["general"]
    text = read_tokens(Corpus(config.general, ModelFolder(wide).tokenizer, 64))
    parts = [logits_of(wide, one.input_ids)[:-1].softmax(1)[:, 512:].sum(1) for one in text]
    e = torch.cat(parts)
    assert found["forward_kl"] == pytest.approx(-(1 - e).log().mean().item(), rel=1e-4)
    reverse = (1 - e) * (1 - e).log() + e * (e.log() + 30)
    assert found["reverse_kl"] == pytest.approx(reverse.mean().item(), rel=1e-4)
    config.base = "wide"  # now the base's own columns, which are taken for padding, are left out
    found = evaluate.run(config)["models"]["base"]["general"]
    assert found["forward_kl"] == pytest.approx(0, abs=1e-6)
    assert found["reverse_kl"] == pytest.approx(0, abs=1e-6)


def test_a_wider_student_is_measured_with_its_own_columns_in_the_tail(
    tmp_path: Path, model_path: Path, dump_path: Path
) -> None:
    """In float64 from the definition, in training and in verify_dump.py --against."""
    wide = widened(model_path, tmp_path / "wide")
    domain = write_texts(tmp_path / "domain.jsonl", some_texts(3))
    config = settings(tmp_path, wide, dump_path, domain, training={"max_steps": 1})
    config.held_out = HeldOutConfig(dump=str(dump_path), dump_limit=5)
    config.training |= {"eval_strategy": "steps", "eval_on_start": True, "eval_steps": 9}
    train.run(config)
    first = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
    expected = []
    for row in range(5):
        record = LogitDataset(dump_path)[row]
        q = logits_of(wide, record.input_ids).softmax(1)[:-1].numpy()
        ids, stored = record.topk.dense()
        p, a = np.exp(stored.astype(float)), np.exp(record.topk.tail_logprob.astype(float))
        kept = np.take_along_axis(q, ids, 1)
        one = (p * np.log(p / kept)).sum(1) + a * np.log(a / (1 - kept.sum(1)))
        np.testing.assert_allclose(verify.row_kl(record, load(wide)), one, atol=1e-6)
        expected.append(one)
    assert first["eval_general_kl"] == pytest.approx(np.concatenate(expected).mean(), rel=1e-4)


def test_a_narrower_student_folds_what_it_lacks(
    tmp_path: Path, model_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The base's padding has mass here, and is among the kept ids."""
    texts = write_texts(tmp_path / "texts.jsonl", some_texts(12))
    wide = widened(model_path, tmp_path / "wide")
    config = dump_settings(tmp_path, wide, texts, k=12)
    dump.run(config)
    held = np.concatenate([record.topk.ids for record in LogitDataset(config.output)])
    assert (held >= 512).any()
    run = settings(tmp_path, model_path, Path(config.output), texts, training={"max_steps": 2})
    run.held_out.dump = config.output
    run.training |= {"eval_strategy": "steps", "eval_steps": 1}
    summary = train.run(run)
    assert np.isfinite(summary["eval_general_kl"])
    said = capsys.readouterr().err
    assert said.count("the student's head has 512 columns, that of the dump") == 2  # two dumps
    for record in LogitDataset(config.output):
        (row,) = packed_rows([], [record], vocab_size=512)
        assert int(row["targets"]["ids"].max()) < 512
        mass = row["targets"]["logprobs"].exp().sum(1) + row["targets"]["tail_logprob"].exp()
        np.testing.assert_allclose(mass, 1, atol=1e-5)
    assert np.isfinite(verify.check_row(0, LogitDataset(config.output)[0], load(model_path)).kl_max)


@pytest.mark.slow
def test_the_scripts_train_a_student_with_added_tokens(
    tmp_path: Path, model_path: Path, dump_path: Path
) -> None:
    """Three tokens more and a head padded to a multiple of 64, which the domain uses."""
    student = tmp_path / "student"
    shutil.copytree(model_path, student)
    model, tokenizer = load(model_path), AutoTokenizer.from_pretrained(model_path)
    assert tokenizer.add_tokens(["<gene>", "myocardium", "mRNA"]) == 3
    model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64)
    assert model.config.vocab_size == 576
    model.save_pretrained(student)
    tokenizer.save_pretrained(student)
    texts = [f"<gene> mRNA {text} myocardium" for text in some_texts(6)]
    domain = write_texts(tmp_path / "domain.jsonl", texts)
    held_out = HeldOutConfig(dump=str(dump_path), domain=CorpusConfig(str(domain)))
    config = settings(tmp_path, student, dump_path, domain, held_out=held_out)
    config.training |= {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2}
    config.training |= {"save_strategy": "steps", "save_steps": 2}
    done = script(yaml_of(tmp_path / "run.yaml", config))
    assert done.returncode == 0, done.stderr
    assert "no bound applies" in done.stderr
    run = tmp_path / "run"
    summary = json.loads((run / "summary.json").read_text())
    assert 0 <= summary["null_test_kl"] < 0.1
    saved = ModelFolder(run / "model")
    assert saved.vocab_size == 576
    ids = saved.tokenizer("<gene> mRNA myocardium")["input_ids"]
    assert {512, 513, 514} <= set(ids)
    models = {"base": str(model_path), "student": str(run / "model")}
    words = ["--models", json.dumps(models), "--general.path", domain, "--max_length", "64"]
    done = scripts.run("evaluate.py", *words)
    assert done.returncode == 0, done.stderr
    assert "student: has 3 tokens that base lacks" in done.stderr


def test_a_dump_without_the_tokenizer_compares_fingerprints(
    tmp_path: Path, model_path: Path, dump_path: Path
) -> None:
    student = tmp_path / "student"
    shutil.copytree(model_path, student)
    tokenizer = AutoTokenizer.from_pretrained(student)
    tokenizer.add_special_tokens({"pad_token": "<eos>", "bos_token": "<eos>"})
    tokenizer.save_pretrained(student)
    folder = ModelFolder(student)
    assert difference_from_dump(folder, LogitDataset(dump_path), "it") is None  # bos is not used
    bare = tmp_path / "bare"
    shutil.copytree(dump_path, bare, ignore=shutil.ignore_patterns("tokenizer"))
    assert difference_from_dump(ModelFolder(model_path), LogitDataset(bare), "it") is None
    found = difference_from_dump(folder, LogitDataset(bare), "it")
    assert found is not None
    assert "the dump has no tokenizer files" in found
    broken = tmp_path / "broken"
    shutil.copytree(dump_path, broken)
    (broken / "tokenizer/tokenizer.json").write_text("{")
    assert "cannot be read" in str(difference_from_dump(folder, LogitDataset(broken), "it"))
    tiny_tokenizer(tmp_path / "another", 400).save_pretrained(broken / "tokenizer")
    found = difference_from_dump(folder, LogitDataset(broken), "it")
    assert "not those that its plan was made with" in str(found)
    assert tokenizer_files(LogitDataset(dump_path)) == ModelFolder(model_path).tokenizer_files()


def load(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path)


def logits_of(model: Path, ids: Any) -> torch.Tensor:
    """float64 [T, V]."""
    with torch.no_grad():
        logits: torch.Tensor = load(model)(torch.tensor(ids[None].astype("int64"))).logits[0]
    return logits.double()


def widened(model: Path, target: Path) -> Path:
    """A copy whose head is untied and has 64 columns more, which have mass."""
    shutil.copytree(model, target)
    loaded = load(model)
    rows = loaded.get_input_embeddings().weight
    torch.manual_seed(3)
    head = torch.cat([rows, 0.2 * torch.randn(64, rows.shape[1])]).detach().clone()
    loaded.resize_token_embeddings(576, mean_resizing=False)
    loaded.config.tie_word_embeddings = False
    loaded.lm_head.weight = torch.nn.Parameter(head)
    loaded.save_pretrained(target)
    return target
