"""The whole job in minutes, offline: a base model, its dump, two students, their comparison.

General text is the English prose that ships with every Python (the reference manual's topics and
the standard library's docstrings); the domain is the standard library's code, without them. Every
stage is the project's own script, started as a user would, with the configs of
scripts/configs/demo.
"""

import ast
import hashlib
import json
import pydoc_data.topics
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from pipeline import json_files, script_files
from pipeline.places import check_output
from pipeline.progress import say
from pipeline.recorded import refuse_other_settings

CONFIGS = "configs/demo"
SKIPPED = {"test", "tests", "idlelib", "lib2to3", "pydoc_data", "turtledemo", "site-packages"}
GENERAL, DOMAIN = "general", "domain"
SHORTEST = 200  # characters; shorter docstrings are left out
DOMAIN_CHARACTERS = 900_000
HELD_OUT = 8  # one document in this many is held out


def run(output: str, overrides: dict[str, list[str]]) -> dict[str, Any]:
    """Make the demo in `output`. Finished stages are kept, so an interrupted demo is resumed.

    `overrides` adds options to the scripts, by stage. Returns the content of results.json.
    """
    check_output(output, {})
    folder = Path(output)
    began = time.monotonic()
    check_same(folder, overrides)
    if not (folder / "data" / "domain-train.jsonl").exists():
        step("text: Python's own documentation and code")
        make_texts(folder / "data")
    if not (folder / "init" / "config.json").exists():
        make_model(folder / "init", folder / "data" / "general-train.jsonl")
    for title, stage, script in [
        ("base model: trained from nothing on the general text", "base", "train_student.py"),
        ("stage one: vLLM reads the general text, top-k go to disk", "dump", "dump_logits.py"),
        ("student ce: cross-entropy on the domain, nothing else", "ce", "train_student.py"),
        ("student mol: the same, and KL to the dump", "mol", "train_student.py"),
        ("evaluation on held-out documents", "evaluate", "evaluate.py"),
    ]:
        step(title)
        run_stage(folder, script, stage, overrides.get(stage, []))
    results = json_files.read_json(folder / "results.json")
    plot(folder)
    say(f"\n{verdict(results)}")
    say(
        f"\n{folder}/results.json, {folder}/perplexities.png, the models in "
        f"{folder}/{{base,ce,mol}}/model, the dump in {folder}/dump "
        f"(python -m storage inspect {folder}/dump). {time.monotonic() - began:.0f} s"
    )
    return results


def check_same(folder: Path, overrides: dict[str, list[str]]) -> None:
    """Record the settings of all stages; RefusedError where the folder has a demo with other ones.

    Earlier releases left no record. The stages themselves refuse other settings too.
    """
    files = sorted(script_files.script(CONFIGS).glob("*.yaml"))
    settings = {
        "overrides": overrides,
        "configs": {file.stem: yaml.safe_load(file.read_text()) for file in files},
    }
    record = folder / "demo.json"
    if record.exists():
        refuse_other_settings(folder, json_files.read_json(record), settings, "demo")
    folder.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(settings, indent=1) + "\n")


def step(title: str) -> None:
    say(f"\n=== {title}")


def run_stage(folder: Path, script: str, stage: str, options: list[str]) -> None:
    """A script of the project, with paths relative to the demo's folder."""
    config = script_files.script(f"{CONFIGS}/{stage}.yaml")
    script_files.run_script(script, "--config", str(config), *options, folder=folder)


def make_texts(folder: Path) -> None:
    """{general,domain}-{train,test}.jsonl: documents with an id and a text, no text twice."""
    documents: dict[str, list[dict[str, str]]] = {
        f"{kind}-{part}": [] for kind in (GENERAL, DOMAIN) for part in ("train", "test")
    }
    characters = 0
    seen = set()
    for kind, name, text in sorted(texts(), key=lambda found: hash_of(found[1])):
        if text in seen or (kind == DOMAIN and characters > DOMAIN_CHARACTERS):
            continue
        seen.add(text)
        characters += len(text) if kind == DOMAIN else 0
        part = "test" if int(hash_of(name), 16) // 256 % HELD_OUT == 0 else "train"
        documents[f"{kind}-{part}"].append({"id": name, "text": text})
    folder.mkdir(parents=True, exist_ok=True)
    for name, found in documents.items():
        lines = "".join(json.dumps(document) + "\n" for document in found)
        (folder / f"{name}.jsonl").write_text(lines)
        size = sum(len(document["text"]) for document in found)
        say(f"{name}: {len(found)} documents, {size / 1e6:.2f} M characters")


def hash_of(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def texts() -> Iterator[tuple[str, str, str]]:
    """(kind, name, text) of each text. Modules are parsed, not imported."""
    for name, text in pydoc_data.topics.topics.items():
        yield GENERAL, f"topic {name}", text
    library = Path(sysconfig.get_path("stdlib"))
    for file in sorted(library.rglob("*.py")):
        module = file.relative_to(library)
        if SKIPPED & set(module.parts):
            continue
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue  # test files that are wrong on purpose
        for at, doc in enumerate(take_docstrings(tree)):
            if len(doc) >= SHORTEST:
                yield GENERAL, f"docstring {module} {at}", doc
        yield DOMAIN, f"module {module}", ast.unparse(tree)


def take_docstrings(tree: ast.Module) -> list[str]:
    """Remove the docstrings of a module, its classes and functions, and return them."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            doc = ast.get_docstring(node)
            if doc is not None:
                found.append(doc)
                node.body = node.body[1:] or [ast.Pass()]
    return found


def make_model(folder: Path, text: Path) -> None:
    """A small Qwen3 with random weights, and a byte-level BPE trained on the general text."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, logging

    logging.disable_progress_bar()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with text.open() as lines:
        tokenizer.train_from_iterator((json.loads(line)["text"] for line in lines), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    torch.manual_seed(0)
    shape = Qwen3Config(
        vocab_size=4096,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=fast.eos_token_id,
    )
    Qwen3ForCausalLM(shape).save_pretrained(folder)
    fast.save_pretrained(folder)


def read_perplexities(metrics: Path) -> dict[str, list[float]]:
    """{"step", "domain", "general"} from a run's metrics.jsonl."""
    found: dict[str, list[float]] = {"step": [], DOMAIN: [], GENERAL: []}
    for line in json_files.read_lines(metrics):
        if "eval_domain_perplexity" in line:
            found["step"].append(line["step"])
            found[DOMAIN].append(float(line["eval_domain_perplexity"]))
            found[GENERAL].append(float(line["eval_general_perplexity"]))
    return found


def plot(folder: Path) -> None:
    """perplexities.png: both perplexities over the steps of both students."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, colour, label in [("ce", "C3", "cross-entropy only"), ("mol", "C0", "MoL from disk")]:
        curve = read_perplexities(folder / name / "metrics.jsonl")
        for axis, kind in zip(axes, (DOMAIN, GENERAL), strict=True):
            axis.plot(curve["step"], curve[kind], colour, label=label, marker="o", markersize=3)
    for axis, title in zip(axes, ("domain: Python code", "general: English prose"), strict=True):
        axis.set(title=title, xlabel="optimizer step", ylabel="held-out perplexity", yscale="log")
        axis.yaxis.set_major_formatter("{x:.0f}")
        axis.yaxis.set_minor_formatter("{x:.0f}")
        axis.grid(True, which="both", alpha=0.3)
        axis.legend()
    figure.savefig(folder / "perplexities.png", dpi=120)
    pyplot.close(figure)


def verdict(results: dict[str, Any]) -> str:
    """The measured changes in words."""
    base, ce, mol = (results["models"][name] for name in ("base", "ce", "mol"))

    def change(model: dict[str, Any], kind: str) -> str:
        ratio = float(model[f"{kind}_perplexity"]) / float(base[f"{kind}_perplexity"]) - 1
        return f"{ratio:+.0%}"

    kl = {name: float(results["models"][name]["kl_to_base"]) for name in ("ce", "mol")}
    return (
        f"Against the base, cross-entropy alone changed the domain perplexity by "
        f"{change(ce, DOMAIN)} and the general one by {change(ce, GENERAL)}; MoL by "
        f"{change(mol, DOMAIN)} and {change(mol, GENERAL)}. KL to the base on general text: "
        f"{kl['ce']:.3f} nats after cross-entropy alone, {kl['mol']:.3f} after MoL."
    )
