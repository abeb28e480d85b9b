"""Stage two through the real code and the real script."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from pipeline import cli
from pipeline.config import (
    CorpusConfig,
    EvalConfig,
    HeldOutConfig,
    LossConfig,
    NullTestConfig,
)
from pipeline.data.mixing import GeneralStream, MixedDataset
from pipeline.data.packing import collate
from pipeline.dump import recompute
from pipeline.errors import ConfigError, RefusedError
from pipeline.evaluation import evaluate
from pipeline.losses import sparse_divergence
from pipeline.models.directory import ModelFolder
from pipeline.token_sequences import TokenSequences
from pipeline.training import train, trainer
from pipeline.training.forward import add_distill_forward
from pipeline.training.output import COMPLETE
from pipeline.training.trainer import DistillTrainer
from storage import Dump, LogitDataset, Record, TopK, create_dump
from tests.helpers import scripts
from tests.helpers.architectures import saved, sharpened, tiny
from tests.helpers.corpora import some_texts, write_jsonl, write_texts
from tests.helpers.dumps import dumped, with_rows
from tests.helpers.masks import some_targets
from tests.helpers.models import tiny_model
from tests.helpers.paths import ROOT
from tests.helpers.runs import SCRIPT, assert_close, script, settings, steps, yaml_of


@pytest.fixture
def domain(tmp_path: Path) -> Path:
    return write_texts(tmp_path / "domain.jsonl", [text[::-1] for text in some_texts(12)])


# ---- the loss in the forward


def scaled_or_capped(kind: str) -> PreTrainedModel:
    """A tiny model that scales or caps the logits of its linear head."""
    torch.manual_seed(0)
    shape = {
        "vocab_size": 512,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "initializer_range": 0.5,
    }
    if kind == "gemma2":
        return Gemma2ForCausalLM(Gemma2Config(**shape, final_logit_softcapping=1.0))
    if kind == "cohere":
        return CohereForCausalLM(CohereConfig(**shape, logit_scale=0.25))
    return GraniteForCausalLM(GraniteConfig(**shape, logits_scaling=4.0))


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize(
    ("arch", "tie"),
    [("qwen3", True), ("llama", False), ("gemma2", True), ("cohere", True), ("granite", True)],
)
def test_forward_gives_ce_and_kl_with_their_gradients(
    tmp_path: Path, model_path: Path, dump_path: Path, arch: Any, tie: bool, direction: Any
) -> None:
    from pipeline.corpus import Corpus
    from pipeline.models.directory import ModelFolder

    corpus = write_texts(tmp_path / "d.jsonl", some_texts(4))
    tokens = TokenSequences(
        Corpus(CorpusConfig(str(corpus)), ModelFolder(model_path).tokenizer, 100)
    )
    data = MixedDataset(tokens, GeneralStream([LogitDataset(dump_path)], [1], 0), 1.0, 0, 2)
    (batch,) = collate([data[0], data[1]])["packed"]
    targets = batch["targets"]
    if arch in ("qwen3", "llama"):
        student = tiny_model(tmp_path / "student", arch, tie, seed=5)
        model = AutoModelForCausalLM.from_pretrained(student)
    else:
        model = scaled_or_capped(arch)
        model.set_attn_implementation("eager")  # which knows a cap of the attention
    labels, rows = len(targets["labels"]), targets["rows"]

    plain = model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
    logits = plain.logits[0, rows]
    ce = torch.nn.functional.cross_entropy(logits[:labels], targets["labels"], reduction="none")
    kl = sparse_divergence(
        logits[labels:],
        targets["ids"].long(),
        targets["logprobs"],
        targets["tail_logprob"],
        direction,
    )
    weights = torch.rand(len(rows))
    expected = (weights * torch.cat([ce, kl])).sum()
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    add_distill_forward(model, direction)
    found = model(**batch | {"targets": {**targets, "row_weights": weights}})
    found["loss"].backward()
    torch.testing.assert_close(found["loss"], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["losses"], torch.cat([ce, kl]), rtol=1e-4, atol=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-4)


def test_a_model_that_changes_its_logits_is_refused() -> None:
    class Bent(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = output.logits + 2 * output.logits.abs()
            return output

    shape = {"num_hidden_layers": 1, "num_attention_heads": 2, "initializer_range": 0.5}
    model = Bent(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=32, **shape))
    with pytest.raises(ConfigError, match="does something to its logits"):
        add_distill_forward(model, "forward")


# ---- whole runs


@pytest.mark.parametrize("cap", [3.0, 50.0])
def test_a_soft_cap_of_the_attention_passes_the_null_test(
    tmp_path: Path, domain: Path, cap: float
) -> None:
    """Gemma 2 with scores that the cap bends, dumped and trained: both keep the cap."""
    model = saved(sharpened(tiny("gemma2", attn_logit_softcapping=cap), 3.0), tmp_path / "model")
    made = dumped(model, write_texts(tmp_path / "general.jsonl", some_texts(6)), tmp_path / "dump")
    summary = train.run(settings(tmp_path, model, made, domain, training={"max_steps": 1}))
    assert abs(summary["null_test_kl"]) < 2e-4
    folder = ModelFolder(model)
    reference = folder.load("float32")
    reference.set_attn_implementation("eager")
    checks = [recompute.check_row(row, LogitDataset(made)[row], reference) for row in range(6)]
    assert max(check.kl_mean for check in checks) < 2e-4


def test_sequences_with_rows_of_their_own_are_dumped_trained_and_evaluated(
    tmp_path: Path, domain: Path
) -> None:
    """LFM2 has convolutions, which cannot keep packed sequences apart."""
    model = saved(tiny("lfm2"), tmp_path / "model")
    general = write_texts(tmp_path / "general.jsonl", some_texts(8))
    made = dumped(model, general, tmp_path / "dump")
    held_out = HeldOutConfig(domain=CorpusConfig(str(domain)))
    config = settings(tmp_path, model, made, domain, held_out=held_out, training={"max_steps": 6})
    done = script(yaml_of(tmp_path / "config.yaml", config))
    assert done.returncode == 0, done.stderr
    assert re.search(r"its own: [1-9]\d?% of the tokens in the decoder are padding", done.stderr)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert abs(summary["null_test_kl"]) < 2e-4
    losses = [step["loss"] for step in steps(config.output)]
    assert losses[-1] < losses[0]
    student = tmp_path / "run" / "model"
    models = {"base": str(model), "student": str(student)}
    report = evaluate.run(EvalConfig(models, domain=CorpusConfig(str(domain)), max_length=100))
    found = report["models"]["student"]["domain_perplexity"]
    assert found < report["models"]["base"]["domain_perplexity"]
    assert found == pytest.approx(summary["eval_domain_perplexity"], rel=1e-3)


def test_a_run_learns_and_leaves_a_plain_model(
    tmp_path: Path, model_path: Path, dump_path: Path, domain: Path
) -> None:
    config = settings(
        tmp_path,
        model_path,
        dump_path,
        domain,
        held_out=HeldOutConfig(domain=CorpusConfig(str(domain))),
        training={"num_train_epochs": 4, "eval_on_start": True},
    )
    summary = train.run(config)
    logged = steps(config.output)
    assert [line["step"] for line in logged] == list(range(1, summary["steps"] + 1))
    assert logged[-1]["ce"] < logged[0]["ce"]
    for line in logged:
        assert line["loss"] == pytest.approx(line["ce"] + line["kl"], rel=1e-5)
    assert summary["domain_tokens"] == logged[-1]["domain_tokens"] > 0
    assert summary["general_tokens"] == logged[-1]["general_tokens"] > 0
    assert 0 <= summary["null_test_kl"] < 1e-3
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    perplexities = [
        json.loads(line)["eval_domain_perplexity"] for line in lines if "eval_domain" in line
    ]
    assert len(perplexities) == 5
    assert perplexities[-1] < perplexities[0]
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert student.dtype == torch.float32
    from pipeline.models.directory import ModelFolder, tokenizer_fingerprint

    saved = tokenizer_fingerprint(ModelFolder(tmp_path / "run" / "model").tokenizer)
    assert saved == tokenizer_fingerprint(ModelFolder(model_path).tokenizer)
    # The same command again has nothing to do.
    assert train.run(config) == summary


def test_a_run_learns_and_counts_targets_alone(
    tmp_path: Path, model_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A domain of tokens with a mask, and a dump of a share of the positions."""
    general = write_texts(tmp_path / "general.jsonl", some_texts(12))
    made = dumped(model_path, general, tmp_path / "dump", positions=0.4)
    lengths = range(5, 45, 5)
    documents = [
        {"input_ids": list(range(3, 3 + n)), "loss_mask": some_targets(n).astype(int).tolist()}
        for n in lengths
    ]
    without = {"input_ids": [7, 8, 9], "loss_mask": [0, 0, 0]}
    file = write_jsonl(tmp_path / "domain.jsonl", [without, *documents])
    corpus = CorpusConfig(str(file), tokens_column="input_ids")
    held_out = HeldOutConfig(domain=corpus)
    training = {"num_train_epochs": 4, "eval_on_start": True}
    config = settings(tmp_path, model_path, made, tmp_path, held_out=held_out, training=training)
    config.domain = corpus
    summary = train.run(config)
    targets = sum(sum(document["loss_mask"]) for document in documents)
    assert summary["domain_tokens"] == 4 * targets
    records = GeneralStream([LogitDataset(made)], [1], 42).records(range(4 * len(documents)))
    assert summary["general_tokens"] == sum(len(record.topk) for record in records)
    assert 0.3 < len(records[0].topk) / len(records[0].input_ids) < 0.5
    assert "1 of 9 documents have nothing to learn" in capsys.readouterr().err
    assert summary["identity"]["domain_targets"] == {"which": "mask"}
    assert 0 <= summary["null_test_kl"] < 1e-3
    first, *_, last = steps(config.output)
    assert last["ce"] < first["ce"]


def test_domain_alone_needs_no_dump(tmp_path: Path, model_path: Path, domain: Path) -> None:
    config = settings(tmp_path, model_path, None, domain, mix=0, max_length=100)
    summary = train.run(config)
    assert summary["general_tokens"] == 0
    assert summary["kl"] == 0
    assert summary["null_test_kl"] is None
    assert "domain_targets" not in summary["identity"]


def test_lora_trains_and_is_merged(
    tmp_path: Path, dump_path: Path, model_path: Path, domain: Path
) -> None:
    config = settings(
        tmp_path,
        model_path,
        dump_path,
        domain,
        lora={"r": 4, "target_modules": "all-linear"},
        training={"learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 5},
    )
    summary = train.run(config)
    logged = steps(config.output)
    assert summary["null_test_kl"] < 1e-3
    assert logged[-1]["ce"] < logged[0]["ce"]
    before = AutoModelForCausalLM.from_pretrained(model_path).state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").state_dict()
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert not any("norm" in name or "embed" in name for name in changed)
    assert (tmp_path / "run" / "checkpoint-5" / "adapter_model.safetensors").exists()


def test_lora_on_the_head_is_refused(
    tmp_path: Path, dump_path: Path, model_path: Path, domain: Path
) -> None:
    config = settings(
        tmp_path, model_path, dump_path, domain, lora={"r": 4, "target_modules": ["lm_head"]}
    )
    with pytest.raises(ConfigError, match="leave lm_head out"):
        train.run(config)


@pytest.mark.slow
def test_batches_rows_and_ranks_do_not_change_training(
    tmp_path: Path, model_path: Path, dump_path: Path, domain: Path
) -> None:
    """The steps are the same, however the sequences of a step are split."""
    runs = {}
    for name, ranks, size, accumulation, row_tokens in [
        ("one batch", 1, 8, 1, None),
        ("eight batches", 1, 1, 8, None),
        ("one batch in short rows", 1, 8, 1, 150),
        ("two ranks, each four batches", 2, 1, 4, None),
        ("two ranks, each one batch in rows, not equally many", 2, 4, 1, 150),
    ]:
        config = settings(
            tmp_path,
            model_path,
            dump_path,
            domain,
            output=str(tmp_path / name),
            row_tokens=row_tokens,
            gradient_cosine_steps=6,
            training={
                "per_device_train_batch_size": size,
                "gradient_accumulation_steps": accumulation,
            },
        )
        done = script(yaml_of(tmp_path / "config.yaml", config), ranks=ranks)
        assert done.returncode == 0, done.stderr
        runs[name] = steps(config.output)
    expected = runs.pop("one batch")
    assert len(expected) == 12
    for name, found in runs.items():
        print(name)  # shown if the assertion fails
        assert_close(found, expected)


@pytest.mark.slow
def test_resume_in_the_second_epoch_and_at_another_number_of_ranks(
    tmp_path: Path, model_path: Path, dump_path: Path
) -> None:
    domain = write_texts(tmp_path / "domain.jsonl", [text[::-1] for text in some_texts(120)])
    whole = settings(tmp_path, model_path, dump_path, domain, output=str(tmp_path / "whole"))
    done = script(yaml_of(tmp_path / "whole.yaml", whole))
    assert done.returncode == 0, done.stderr
    expected = steps(whole.output)
    epoch = len(expected) // 2

    cut = settings(tmp_path, model_path, dump_path, domain, output=str(tmp_path / "cut"))
    config = yaml_of(tmp_path / "cut.yaml", cut)
    running = scripts.Script(SCRIPT, "--config", config)
    try:
        metrics = Path(cut.output) / "metrics.jsonl"
        give_up = time.monotonic() + 500
        while not metrics.exists() or len(metrics.read_text().splitlines()) < epoch + 5:
            assert running.poll() is None
            assert time.monotonic() < give_up
            time.sleep(0.01)
        running.send_signal(signal.SIGTERM)
        stopped_by = running.done(timeout=500)
    finally:
        running.kill()
    assert stopped_by.returncode == 75, stopped_by.stderr
    assert "run the same command again" in stopped_by.stderr
    stopped = len(steps(cut.output))
    assert epoch + 5 <= stopped < len(expected)
    shutil.copytree(cut.output, tmp_path / "ranks")
    again = script(config)
    assert again.returncode == 0, again.stderr
    assert f"resuming from checkpoint-{stopped}" in again.stderr
    assert steps(cut.output) == expected
    before = AutoModelForCausalLM.from_pretrained(Path(whole.output) / "model").state_dict()
    after = AutoModelForCausalLM.from_pretrained(Path(cut.output) / "model").state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)

    # At another number of ranks each step has the same rows.
    ranks = settings(
        tmp_path,
        model_path,
        dump_path,
        domain,
        output=str(tmp_path / "ranks"),
        training={"per_device_train_batch_size": 1},
    )
    again = script(yaml_of(tmp_path / "ranks.yaml", ranks), ranks=2)
    assert again.returncode == 0, again.stderr
    assert f"resuming from checkpoint-{stopped}" in again.stderr
    assert_close(steps(ranks.output), expected)


@pytest.mark.slow
def test_a_signal_to_two_ranks_saves_a_checkpoint_that_both_resume(
    tmp_path: Path, model_path: Path, dump_path: Path, domain: Path
) -> None:
    """torchrun passes the signal on to all ranks. Each waits for the step after which all save."""
    config = settings(tmp_path, model_path, dump_path, domain, training={"max_steps": 200})
    file, run = yaml_of(tmp_path / "config.yaml", config), Path(config.output)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [sys.executable, *launcher, str(SCRIPT), "--config", str(file)]
    with (tmp_path / "log").open("w") as log:
        running = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    try:
        give_up = time.monotonic() + 300
        while not (run / "metrics.jsonl").exists() or not steps(run):
            assert running.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < give_up
            time.sleep(0.01)
        running.send_signal(signal.SIGTERM)
        running.wait(timeout=300)
    finally:
        running.kill()
    shown = (tmp_path / "log").read_text()
    assert shown.count("SIGTERM: saving a checkpoint after this step") == 2, shown
    stopped = len(steps(run))
    assert 0 < stopped < 200
    assert [path.parent.name for path in run.glob(f"*/{COMPLETE}")] == [f"checkpoint-{stopped}"]
    again = script(file, ranks=2)
    assert again.returncode == 0, again.stderr
    assert f"resuming from checkpoint-{stopped}" in again.stderr
    assert [line["step"] for line in steps(run)] == list(range(1, 201))


def test_an_incomplete_checkpoint_is_not_resumed(
    tmp_path: Path, model_path: Path, dump_path: Path, domain: Path
) -> None:
    config = settings(
        tmp_path,
        model_path,
        dump_path,
        domain,
        training={
            "max_steps": 12,
            "save_strategy": "steps",
            "save_steps": 4,
            "save_total_limit": 2,
        },
    )
    train.run(config)
    expected = steps(config.output)
    run = tmp_path / "run"
    assert len(expected) == 12
    assert sorted(path.name for path in run.glob("checkpoint-*")) == [
        "checkpoint-12",
        "checkpoint-8",
    ]
    (run / "checkpoint-12" / "distill.json").unlink()  # as if killed while saving
    (run / "summary.json").unlink()
    train.run(config)
    assert steps(run) == expected


def test_loss_is_ce_plus_alpha_times_kl_per_token_of_the_step(
    tmp_path: Path, model_path: Path, dump_path: Path, domain: Path
) -> None:
    """alpha scales the KL in the loss, but not the logged KL."""
    first = []
    for alpha in (0.0, 3.0):
        config = settings(
            tmp_path,
            tiny_model(tmp_path / "other", seed=9),
            dump_path,
            domain,
            loss=LossConfig(alpha=alpha),
            output=str(tmp_path / f"alpha{alpha}"),
            training={"max_steps": 1, "gradient_accumulation_steps": 3},
        )
        train.run(config)
        first.append(steps(config.output)[0])
    assert first[0]["kl"] == pytest.approx(first[1]["kl"]) != 0
    assert first[0]["ce"] == pytest.approx(first[1]["ce"])
    assert first[0]["loss"] == pytest.approx(first[0]["ce"])
    assert first[1]["loss"] == pytest.approx(first[1]["ce"] + 3 * first[1]["kl"])


def test_saving_evaluating_and_resuming_leave_dropout_as_it_is(
    tmp_path: Path, model_path: Path, dump_path: Path, domain: Path, capsys: Any
) -> None:
    """What a step draws depends neither on checkpoints and evaluations nor on an interruption."""
    config = settings(
        tmp_path,
        model_path,
        dump_path,
        domain,
        lora={"r": 4, "target_modules": "all-linear", "lora_dropout": 0.3},
        held_out=HeldOutConfig(dump=str(dump_path), dump_limit=4),
    )
    train.run(replace(config, training=config.training | {"eval_strategy": "no"}))
    expected, run = steps(config.output), Path(config.output)
    shutil.rmtree(run)
    config.training |= {"save_strategy": "steps", "save_steps": 3}
    config.training |= {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True}
    train.run(config)
    assert steps(run) == expected
    epoch = len(expected) // 2
    for stopped in (3, epoch):
        for step in range(stopped + 3, len(expected) + 1, 3):
            shutil.rmtree(run / f"checkpoint-{step}")
        (run / "summary.json").unlink()
        train.run(config)
        assert f"resuming from checkpoint-{stopped}" in capsys.readouterr().err
        assert steps(run) == expected


@pytest.mark.parametrize(("logging", "evaluation"), [(4, 3), (3, 2)])
def test_evaluations_leave_the_log_of_training_as_it_is(
    tmp_path: Path,
    model_path: Path,
    dump_path: Path,
    domain: Path,
    monkeypatch: pytest.MonkeyPatch,
    logging: int,
    evaluation: int,
) -> None:
    """The losses are means over all steps since the last log, and the speed is that of training."""
    clock = [0]

    class Timed(DistillTrainer):
        """A step takes 1 s, and an evaluation 100."""

        def training_step(self, *arguments: Any) -> torch.Tensor:
            clock[0] += 1
            return super().training_step(*arguments)

        def mean_kl(self, *arguments: Any) -> float:
            clock[0] += 100
            return super().mean_kl(*arguments)

    monkeypatch.setattr(trainer, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    runs = []
    for strategy in ("no", "steps"):
        config = settings(
            tmp_path,
            model_path,
            dump_path,
            domain,
            output=str(tmp_path / strategy),
            loss=LossConfig(alpha=0.5),
            held_out=HeldOutConfig(dump=str(dump_path), dump_limit=4),
            training={
                "max_steps": 12,
                "logging_steps": logging,
                "eval_strategy": strategy,
                "eval_steps": evaluation,
                "eval_on_start": strategy == "steps",
            },
        )
        train.run(config, Timed)
        lines = (tmp_path / strategy / "metrics.jsonl").read_text().splitlines()
        runs.append([json.loads(line) for line in lines])
    plain, evaluated = runs
    assert [line["step"] for line in plain] == list(range(logging, 13, logging))
    assert [line for line in evaluated if "loss" in line] == plain
    evaluations = [line["step"] for line in evaluated if "eval_general_kl" in line]
    assert evaluations == list(range(0, 13, evaluation))
    for line in plain:
        assert line["loss"] == pytest.approx(line["ce"] + 0.5 * line["kl"], rel=1e-5)


# ---- refusals


def shifted(record: Record) -> Record:
    ids, logprobs = record.topk.dense()
    return Record(
        record.doc_id,
        record.chunk,
        record.input_ids,
        TopK.from_dense(
            np.roll(ids, 1, 0), np.roll(logprobs, 1, 0), np.roll(record.topk.tail_logprob, 1)
        ),
    )


def test_null_test_names_shifted_positions(
    tmp_path: Path, model_path: Path, dump_path: Path, domain: Path
) -> None:
    dump = with_rows(dump_path, tmp_path / "shifted", shifted)
    config = settings(tmp_path, model_path, dump, domain)
    with pytest.raises(RefusedError, match=r"Shifted by -1 positions"):
        train.run(config)
    config.null_test = NullTestConfig(batches=0)
    train.run(config)


def test_null_test_has_no_bound_for_another_student(
    tmp_path: Path, model_path: Path, dump_path: Path, domain: Path, capsys: Any
) -> None:
    other = tiny_model(tmp_path / "other", seed=9)
    summary = train.run(settings(tmp_path, other, dump_path, domain, training={"max_steps": 1}))
    assert summary["null_test_kl"] > 0.1
    assert "no bound applies" in capsys.readouterr().err


def test_other_vocabulary_is_refused_before_weights_load(
    tmp_path: Path, dump_path: Path, domain: Path
) -> None:
    student = tiny_model(tmp_path / "student", vocab_size=600)
    (student / "model.safetensors").unlink()
    config = settings(tmp_path, student, dump_path, domain)
    with pytest.raises(RefusedError, match=r"the text .* in the dump, .* in the student"):
        train.run(config)
    done = script(yaml_of(tmp_path / "c.yaml", config))
    assert done.returncode == 3
    assert "Traceback" not in done.stderr


def test_other_tokenizer_is_refused(
    tmp_path: Path, model_path: Path, dump_path: Path, domain: Path
) -> None:
    student = tmp_path / "student"
    shutil.copytree(model_path, student)
    tokenizer = json.loads((student / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    a, b = "A", "B"
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (student / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(RefusedError, match="the token 'A' is 33 in the dump, 34 in the student"):
        train.run(settings(tmp_path, student, dump_path, domain))


def test_a_run_resumes_with_the_same_dump_only(
    tmp_path: Path, model_path: Path, dump_path: Path, domain: Path
) -> None:
    keep = {"save_strategy": "steps", "save_steps": 4}
    config = settings(tmp_path, model_path, dump_path, domain, training=keep)
    train.run(config)
    other = with_rows(dump_path, tmp_path / "other", lambda record: record)
    assert LogitDataset(other).fingerprint != LogitDataset(dump_path).fingerprint
    config.dump = str(other)
    with pytest.raises(RefusedError, match=r"dump: '.*' in the run, '.*' asked for"):
        train.run(config)
    (tmp_path / "run" / "summary.json").unlink()  # now unfinished: the checkpoint names the dump
    with pytest.raises(RefusedError, match=r"dump: '.*' in the run, '.*' asked for"):
        train.run(config)


def test_unfinished_dump_is_bad_input(
    tmp_path: Path, model_path: Path, dump_path: Path, domain: Path
) -> None:
    unfinished = tmp_path / "unfinished"
    plan = {name: v for name, v in Dump(dump_path).plan.items() if name != "format_version"}
    create_dump(unfinished, plan)
    config = settings(tmp_path, model_path, unfinished, domain)
    assert cli.main(lambda: train.run(config), None) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training": {"lerning_rate": 1}}, "did you mean learning_rate"),
        ({"training": {"output_dir": "x"}}, "set output"),
        ({"training": {"eval_strategy": "epoch"}}, "nothing to evaluate on"),
        ({"training": {"learning_rate": 1e30, "max_grad_norm": 0.0}}, "the loss is"),
        ({"max_length": 5000}, "reads at most 2048"),
        ({"lora": {"rank": 3}}, "lora"),
    ],
)
def test_bad_settings_say_what_to_do(
    tmp_path: Path,
    model_path: Path,
    dump_path: Path,
    domain: Path,
    changes: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(ConfigError, match=message):
        train.run(settings(tmp_path, model_path, dump_path, domain, **changes))


def test_a_student_in_float16_is_refused(tmp_path: Path, model_path: Path, domain: Path) -> None:
    model = tmp_path / "half"
    shutil.copytree(model_path, model)
    given = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(given | {"dtype": "float16"}))
    config = settings(tmp_path, model, None, domain, mix=0, max_length=100, dtype="auto")
    with pytest.raises(ConfigError, match="set dtype: float32"):
        train.run(config)
    assert not Path(config.output).exists()


def test_an_empty_domain_is_refused(tmp_path: Path, model_path: Path, dump_path: Path) -> None:
    empty = write_texts(tmp_path / "empty.jsonl", ["", ""])
    with pytest.raises(ConfigError, match="none of its 2 documents has a token to learn"):
        train.run(settings(tmp_path, model_path, dump_path, empty))


def test_script_refuses_other_temperatures_and_misspelt_keys(
    tmp_path: Path, model_path: Path, dump_path: Path, domain: Path
) -> None:
    config = yaml_of(tmp_path / "c.yaml", settings(tmp_path, model_path, dump_path, domain))
    hot = script(config, "--loss.temperature", "2")
    assert hot.returncode == 2
    assert "do not determine the distribution" in hot.stderr
    wrong = script(config, "--loss.aplha", "2", env={"COLUMNS": "200"})
    assert wrong.returncode == 2
    assert "did you mean loss.alpha?" in wrong.stderr
    assert not (tmp_path / "run").exists()
