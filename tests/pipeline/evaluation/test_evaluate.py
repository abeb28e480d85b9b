"""Perplexities and distances against a naive computation in float64."""

import io
import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pipeline.config import CorpusConfig, EvalConfig, TaskConfig
from pipeline.corpus import Corpus
from pipeline.errors import ConfigError, RefusedError
from pipeline.evaluation import evaluate
from pipeline.models.directory import ModelFolder
from pipeline.token_sequences import read_tokens
from tests.helpers import scripts
from tests.helpers.corpora import some_texts, write_jsonl, write_texts
from tests.helpers.masks import read_masked, some_targets
from tests.helpers.models import tiny_model
from tests.helpers.questions import write_questions


@pytest.fixture
def student(tmp_path: Path) -> Path:
    return tiny_model(tmp_path / "student", seed=3)


@pytest.fixture
def general(tmp_path: Path) -> Path:
    return write_texts(tmp_path / "general.jsonl", some_texts(9))


def naive(model: Path, base: Path, corpus: Path, k: int, masks: bool) -> dict[str, float]:
    """One sequence and position at a time, all of it in float64, from the definitions."""
    ours = AutoModelForCausalLM.from_pretrained(model).double()
    theirs = AutoModelForCausalLM.from_pretrained(base).double()
    sums = np.zeros(8)
    confidence, correct = [], []
    for sequence in Corpus(CorpusConfig(str(corpus)), ModelFolder(base).tokenizer, 100).sequences():
        ids = torch.from_numpy(sequence.input_ids[None].astype(np.int64))
        with torch.no_grad():
            q = ours(ids).logits[0, :-1].log_softmax(-1)
            p = theirs(ids).logits[0, :-1].log_softmax(-1)
        targets = some_targets(len(sequence.input_ids))
        for t in range(len(q)):
            if masks and not targets[t + 1]:
                continue
            tail = p[t].argsort(descending=True)[k:]
            a = p[t][tail].exp().sum()
            within_p, within_q = p[t][tail].log_softmax(0), q[t][tail].log_softmax(0)
            sums += [
                1,
                -q[t, ids[0, t + 1]].item(),
                (p[t].exp() * (p[t] - q[t])).sum().item(),
                (q[t].exp() * (q[t] - p[t])).sum().item(),
                float(q[t].argmax() == p[t].argmax()),
                float(q[t].argmax() == ids[0, t + 1]),
                a.item(),
                (a * (within_p.exp() * (within_p - within_q)).sum()).item(),
            ]
            confidence.append(q[t].max().exp().item())
            correct.append(float(q[t].argmax() == ids[0, t + 1]))
    tokens, nll, forward, reverse, same, right, mass, within = sums
    bins = np.floor(np.array(confidence) * 15)
    gaps = [
        abs(np.mean(np.array(confidence)[bins == b]) - np.mean(np.array(correct)[bins == b]))
        * np.mean(bins == b)
        for b in np.unique(bins)
    ]
    return {
        "tokens": tokens,
        "perplexity": math.exp(nll / tokens),
        "nats_per_token": nll / tokens,
        "forward_kl": forward / tokens,
        "reverse_kl": reverse / tokens,
        "top1_agreement": same / tokens,
        "top1_accuracy": right / tokens,
        "tail_mass": mass / tokens,
        "tail_kl": within / mass,
        "ece": sum(gaps),
    }


@pytest.mark.parametrize(("batch_tokens", "masks"), [(64, False), (1000, False), (200, True)])
def test_measures_equal_the_naive_ones(
    tmp_path: Path,
    model_path: Path,
    student: Path,
    general: Path,
    batch_tokens: int,
    masks: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if masks:
        monkeypatch.setattr(evaluate, "read_tokens", read_masked)
    domain = write_texts(tmp_path / "domain.jsonl", [text[::-1] for text in some_texts(5)])
    other = write_texts(tmp_path / "other.jsonl", [text.swapcase() for text in some_texts(3)])
    report = evaluate.run(
        EvalConfig(
            models={"base": str(model_path), "student": str(student)},
            domain=CorpusConfig(str(domain)),
            general=CorpusConfig(str(general)),
            other=CorpusConfig(str(other)),
            max_length=100,
            batch_tokens=batch_tokens,
            tail_k=20,
        )
    )
    for name, path in [("base", model_path), ("student", student)]:
        for kind, corpus in [("domain", domain), ("general", general), ("other", other)]:
            expected = naive(path, model_path, corpus, 20, masks)
            measured = {key: report["models"][name][kind][key] for key in expected}
            assert measured == pytest.approx(expected, rel=1e-4, abs=1e-6)
    found = report["models"]["student"]
    assert found["general"]["tail_mass"] > 0.1, "the tail is too small for this test"
    assert found["kl_to_base"] == found["general"]["forward_kl"] > 0.1
    assert found["domain_perplexity"] == found["domain"]["perplexity"]
    assert report["models"]["base"]["kl_to_base"] == 0


def test_script_prints_a_table_and_writes_json(
    tmp_path: Path, model_path: Path, student: Path, general: Path
) -> None:
    config = {
        "models": {"base": str(model_path), "student": str(student)},
        "general": {"path": str(general)},
        "output": str(tmp_path / "results" / "results.json"),
    }
    (tmp_path / "c.yaml").write_text(json.dumps(config))
    done = scripts.run("evaluate.py", "--config", tmp_path / "c.yaml")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results" / "results.json").read_text())
    assert set(results["models"]) == {"base", "student"}
    line = next(line for line in done.stdout.splitlines() if line.startswith("student"))
    assert f"{results['models']['student']['general_perplexity']:.3f}" in line


@pytest.mark.parametrize(("factor", "shown"), [(math.nan, "NaN"), (3000.0, "Infinity")])
def test_a_model_that_diverged_is_measured_as_one(
    tmp_path: Path,
    model_path: Path,
    student: Path,
    general: Path,
    capsys: pytest.CaptureFixture[str],
    factor: float,
    shown: str,
) -> None:
    weights = load_file(student / "model.safetensors")
    weights["model.norm.weight"] *= factor
    save_file(weights, student / "model.safetensors", {"format": "pt"})
    models = {"base": str(model_path), "student": str(student)}
    output = tmp_path / "results.json"
    evaluate.run(EvalConfig(models, general=CorpusConfig(str(general)), output=str(output)))
    found = json.loads(output.read_text(), parse_constant=pytest.fail)["models"]
    assert found["student"]["general_perplexity"] == shown
    assert math.isfinite(found["base"]["general_perplexity"])
    general_text = found["student"]["general"]
    assert general_text["documents_worse"] == general_text["documents"] == 9
    assert not math.isfinite(float(general_text["intervals"]["perplexity"][1]))
    assert ("nan" if factor != factor else "inf") in capsys.readouterr().out


def test_results_are_there_whatever_the_encoding(
    tmp_path: Path, model_path: Path, general: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table has characters that ASCII lacks."""
    printed = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", printed)
    output = tmp_path / "results.json"
    config = EvalConfig({"base": str(model_path)}, general=CorpusConfig(str(general)))
    config.output = str(output)
    evaluate.run(config)
    assert output.exists()
    printed.seek(0)
    assert "KL(base?m)" in printed.read()


def test_worst_documents_are_those_whose_loss_rises_most(
    tmp_path: Path, model_path: Path, student: Path, general: Path
) -> None:
    report = evaluate.run(
        EvalConfig(
            {"base": str(model_path), "student": str(student)}, general=CorpusConfig(str(general))
        )
    )
    found = report["models"]["student"]["general"]
    losses = {}
    for name, path in [("base", model_path), ("student", student)]:
        model = AutoModelForCausalLM.from_pretrained(path)
        corpus = Corpus(CorpusConfig(str(general)), ModelFolder(path).tokenizer, 2048)
        for sequence in corpus.sequences():
            ids = torch.from_numpy(sequence.input_ids[None].astype(np.int64))
            with torch.no_grad():
                losses[name, sequence.document] = model(ids, labels=ids).loss.item()
    rises = {at: losses["student", at] - losses["base", at] for _, at in losses}
    assert found["documents"] == len(rises) == 9
    assert found["documents_worse"] == sum(rise > 0 for rise in rises.values())
    [first, *_] = found["worst"]
    assert first["document"] == max(rises, key=rises.__getitem__)
    assert first["base_nats_per_token"] == pytest.approx(
        losses["base", first["document"]], rel=1e-4
    )
    assert some_texts(9)[first["document"]].startswith(first["text"][:40])


def test_sequences_are_spread_over_the_text(model_path: Path, general: Path) -> None:
    tokenizer = ModelFolder(model_path).tokenizer
    text = read_tokens(Corpus(CorpusConfig(str(general)), tokenizer, 16))
    few = text.spread(7)
    assert len(few) == 7
    assert len(text) > 30
    chosen = [round(at) for at in np.arange(7) * len(text) // 7]
    assert few.documents.tolist() == text.documents[chosen].tolist()
    assert all((few[i].input_ids == text[at].input_ids).all() for i, at in enumerate(chosen))
    assert text.spread(1000) is text


def test_other_tokenizer_is_refused(
    tmp_path: Path, model_path: Path, student: Path, general: Path
) -> None:
    shutil.copytree(student, tmp_path / "other")
    tokenizer = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    a, b = "A", "B"
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(tokenizer))
    models = {"base": str(model_path), "other": str(tmp_path / "other")}
    with pytest.raises(RefusedError, match="another tokenizer"):
        evaluate.run(EvalConfig(models, general=CorpusConfig(str(general))))


def test_nothing_to_evaluate_is_an_error(tmp_path: Path, model_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"give domain\.path"):
        EvalConfig({"base": str(model_path)})
    with pytest.raises(ConfigError, match="must be one of the models"):
        EvalConfig({"student": str(model_path)}, general=CorpusConfig("x.jsonl"))
    empty = write_texts(tmp_path / "empty.jsonl", ["", ""])
    with pytest.raises(ConfigError, match="two tokens"):
        evaluate.run(EvalConfig({"base": str(model_path)}, general=CorpusConfig(str(empty))))
    first_token = {"input_ids": [5, 6, 7], "loss_mask": [1, 0, 0]}  # which nothing predicts
    masked = CorpusConfig(
        str(write_jsonl(tmp_path / "masked.jsonl", [first_token] * 2)), tokens_column="input_ids"
    )
    with pytest.raises(ConfigError, match="none of its 2 documents has a token to learn"):
        evaluate.run(EvalConfig({"base": str(model_path)}, general=masked))


def test_tasks_beside_the_texts_or_alone(
    tmp_path: Path, model_path: Path, student: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval", reason="needs mol-distill[tasks]")
    given: dict[str, Any] = {
        "models": {"student": str(student), "base": str(model_path)},
        "tasks": {
            name: TaskConfig(path=str(write_questions(tmp_path / f"{name}.jsonl", number)))
            for name, number in (("one", 12), ("two", 5))
        },
        "output": str(tmp_path / "out" / "results.json"),
    }
    found = evaluate.run(EvalConfig(**given))
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == found
    tasks, base = (found["models"][name]["tasks"] for name in ("student", "base"))
    assert list(tasks) == ["one", "two"]
    answered = (tmp_path / "out" / "results.answers.jsonl").read_text()
    rows = [json.loads(line) for line in answered.splitlines()]
    assert len(rows) == 2 * 17
    right = {(row["model"], row["task"], row["question"]): row["scores"]["acc"] for row in rows}
    kept = [right["student", "one", n] * right["base", "one", n] for n in range(12)]
    assert tasks["one"]["kept"] == sum(kept)
    assert tasks["one"]["right"] == sum(right["student", "one", n] for n in range(12))
    assert base["one"]["kept"] == base["one"]["base_right"] == base["one"]["right"]
    all_tasks = found["models"]["student"]["all_tasks"]
    assert all_tasks["kept"] == tasks["one"]["kept"] + tasks["two"]["kept"]
    assert all_tasks["questions"] == 17
    printed = capsys.readouterr().out
    assert f"student kept {all_tasks['kept']} of the {all_tasks['base_right']} quest" in printed
    assert "perplexity" not in printed

    given["general"] = CorpusConfig(str(write_texts(tmp_path / "general.jsonl", some_texts(4))))
    both = evaluate.run(EvalConfig(**given))["models"]["student"]
    assert both["tasks"] == tasks
    assert both["kl_to_base"] > 0


def test_the_answers_are_not_written_over_the_questions(tmp_path: Path, model_path: Path) -> None:
    file = write_questions(tmp_path / "results.answers.jsonl")
    given = {"one": TaskConfig(path=str(file))}
    config = EvalConfig(
        {"base": str(model_path)}, tasks=given, output=str(tmp_path / "results.json")
    )
    with pytest.raises(ConfigError, match=r"output .*results\.answers\.jsonl: .*tasks\.one\.path"):
        evaluate.run(config)
