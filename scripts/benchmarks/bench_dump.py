"""Stage one against its lower bounds: tokens per second, and CPU time of the front end.

    python scripts/benchmarks/bench_dump.py --corpus corpus.jsonl --model MODEL --random --rounds 3

floor 1   the engine's prefill, without any output
floor 2   prefill, and the head on every position
dump      scripts/dump_logits.py to disk: corpus, tokens, top-k, codec, shards, markers
flat      vLLM's prompt_logprobs as flat lists
dict      vLLM's prompt_logprobs as dictionaries
hf        transformers, one sequence at a time

Every run is a process with one engine. A round runs all cases in turn, and a ratio compares runs of
the same round. --random adds a model with random weights whose body outweighs its head, as in large
models; --shape says how large it is. Without --corpus, documents of random words are made.
Front-end CPU is the CPU time of this side's threads in microseconds per token. It includes vLLM's
processing of the answers, but not its engine. On a GPU, the last lines have the arithmetic of the
weights that a token is multiplied with, those of the head where it runs, and that of one large
matrix product.

    python scripts/benchmarks/bench_dump.py --corpus corpus.jsonl --targets --rounds 5

measures instead what targets save. One engine answers the same sequences with all targets, with a
share of them, and with every second turn of a chat. The model has random weights, and a head as
heavy as its body. The work of the head is what a case takes beyond the body alone in the same
round, in CPU time: set VLLM_CPU_OMP_THREADS_BIND=0, because threads that wait for each other take
it, too.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads would not be counted
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the floors replace the plug-in's pooler

RUNS = ("floor 1", "floor 2", "dump", "flat", "dict", "hf")
SLOW = 8  # flat, dict and hf read one document in so many
TURN = 32  # tokens of a turn, of which every second one is learnt


def random_model(
    folder: Path,
    texts: list[str],
    width: int = 512,
    layers: int = 8,
    ids: int = 8192,
    dtype: str = "bfloat16",
) -> Path:
    """A Qwen3 with random weights.

    By default the head is 12 % of the weights that are multiplied; with 32,768 ids and a width of
    256 it is half of them.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=8192, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=ids,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=max(1, width // 128),
        head_dim=64,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )
    Qwen3ForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def random_corpus(file: Path, documents: int) -> Path:
    """Documents of 100 to 600 words, whose frequencies follow Zipf's law."""
    import numpy as np

    rng = np.random.default_rng(0)
    letters = rng.integers(ord("a"), ord("z") + 1, (4096, 8)).astype(np.uint8)
    words = [bytes(row[: rng.integers(2, 9)]).decode() for row in letters]
    with file.open("w", encoding="utf-8") as lines:
        for _ in range(documents):
            at = rng.zipf(1.2, rng.integers(100, 600)) % len(words)
            lines.write(json.dumps({"text": " ".join(words[one] for one in at)}) + "\n")
    return file


def multiplied(model: str) -> tuple[int, int]:
    """(weights of the body, of the head) that a token is multiplied with."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    with init_empty_weights():
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
        made = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    head = made.get_output_embeddings().weight
    embeddings = made.get_input_embeddings().weight
    others = {id(one): one.numel() for one in made.parameters() if one.ndim > 1}
    for one in (head, embeddings):
        others.pop(id(one), None)
    return sum(others.values()), head.numel()


def rate_of_a_product(width: int = 8192) -> float:
    """FLOP/s of one bfloat16 matrix product on the GPU."""
    from processes import in_child, seconds_of

    def work(send: Any) -> None:
        import torch

        one, other = torch.randn(2, width, width, device="cuda", dtype=torch.bfloat16)
        times = [seconds_of(lambda: one @ other, "cuda") for _ in range(10)]
        send(2 * width**3 / median(times))

    rate: float = in_child(work)[0][0]
    return rate


def settings(given: argparse.Namespace, output: str) -> Any:
    from pipeline.config import CorpusConfig, DumpConfig

    share = SLOW if given.run in ("flat", "dict", "hf") else 1
    return DumpConfig(
        model=given.model[0],
        corpus=CorpusConfig(given.corpus, limit=max(1, given.documents // share)),
        output=output,
        k=given.k,
        max_length=512,
        engine="transformers" if given.run == "hf" else "vllm",
    )


def replace_pooler(with_head: bool) -> None:
    """Make the plug-in return zeros; with `with_head`, it still applies the head."""
    import torch

    from pipeline.teacher import topk_model

    def pack(model: Any, hidden: Any, k: int, how: Any, vocab_size: int) -> Any:
        rows = topk_model.rows_at_a_time(topk_model.LOGITS_BYTES_CPU, vocab_size)
        for part in hidden.split(rows) if with_head else ():
            model.compute_logits(part)
        return torch.zeros(len(hidden), 1, dtype=torch.int32)

    topk_model.pack_topk = pack


def run_one(given: argparse.Namespace) -> dict[str, float]:
    """Run one case in this process: tokens, seconds, CPU seconds of the front end."""
    from dataclasses import replace

    from pipeline.corpus import Corpus
    from pipeline.dump import dump
    from pipeline.models.directory import ModelFolder
    from pipeline.teacher import choose
    from pipeline.teacher import vllm_teacher as teacher

    cpu: Counter[str] = Counter()
    run = threading.Thread.run

    def counted(thread: threading.Thread) -> None:
        run(thread)
        cpu[thread.name] += time.thread_time()  # type: ignore[assignment]

    threading.Thread.run = counted  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        config = settings(given, folder + "/dump")
        model = ModelFolder.find(config.model)
        config = replace(config, dtype=model.dtype(config.dtype))
        if given.run.startswith("floor"):
            replace_pooler(with_head=given.run == "floor 2")
            teacher.Pooled.answer = lambda path, sequence, output: None  # type: ignore
        if given.run in ("flat", "dict"):
            teacher.class_overrides = lambda architectures: {}
        made: list[Any] = []
        clock = {"inside": 0.0, "began": 0.0}
        make = choose.make_teacher

        def watched(*arguments: Any) -> Any:
            found = make(*arguments)
            made.append(found)
            if hasattr(found, "engine"):
                step = found.engine.step

                def timed() -> Any:
                    before = time.thread_time()
                    outputs = step()
                    clock["inside"] += time.thread_time() - before
                    return outputs

                found.engine.step = timed
                processor = found.engine.output_processor
                process = processor.process_outputs

                def processed(*outputs: Any, **named: Any) -> Any:
                    before = time.thread_time()
                    made = process(*outputs, **named)
                    clock["inside"] -= time.thread_time() - before
                    return made

                processor.process_outputs = processed
            if given.run == "dict":
                found.path.params.flat_logprobs = False
                found.path.answer = lambda sequence, output: None
            clock["began"] = time.thread_time()
            return found

        if given.run == "dump":
            dump.make_teacher = watched
            summary = dump.run(config)
            seconds = summary["tokens"] / summary["tokens_per_s"]
            tokens = summary["tokens"]
        else:
            corpus = Corpus(config.corpus, model.tokenizer, config.max_length)
            sequences = list(corpus.sequences())
            tokens = sum(len(sequence.input_ids) for sequence in sequences)
            started = watched(config, model)
            begin = time.monotonic()
            for _ in started.topk(iter(sequences)):
                pass
            seconds = time.monotonic() - begin
        outside = time.thread_time() - clock["began"] - clock["inside"]
    names = ("reading ahead", "writing behind", "encoding", "committing")
    threads = sum(seconds for name, seconds in cpu.items() if name.startswith(names))
    return {"tokens": tokens, "seconds": seconds, "cpu": outside + threads}


def save(given: argparse.Namespace, model: Path) -> None:
    """Print the CPU time that one engine takes for each choice of targets."""
    from dataclasses import replace

    import numpy as np

    from pipeline.config import CorpusConfig
    from pipeline.corpus import Corpus, Sequence
    from pipeline.models.directory import ModelFolder
    from pipeline.positions import Share
    from pipeline.teacher.vllm_teacher import VllmTeacher

    folder = ModelFolder(model)
    corpus = Corpus(CorpusConfig(given.corpus, limit=given.documents), folder.tokenizer, 512)
    sequences = [each for each in corpus.sequences() if len(each.input_ids) > 2 * TURN]

    def share(positions: float) -> list[Sequence]:
        draw = Share(positions).draw
        masks = [draw(each.doc_id, each.chunk, None, len(each.input_ids)) for each in sequences]
        return [replace(each, targets=mask) for each, mask in zip(sequences, masks, strict=True)]

    turns = [np.arange(len(each.input_ids)) // TURN % 2 == 1 for each in sequences]
    nothing = [replace(each, targets=np.zeros(len(each.input_ids), bool)) for each in sequences]
    cases = {
        "body alone": nothing,
        "all": sequences,
        "every second turn": [
            replace(each, targets=mask) for each, mask in zip(sequences, turns, strict=True)
        ],
        **{f"positions {positions}": share(positions) for positions in (0.5, 0.2, 0.05)},
    }
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    with VllmTeacher(folder, given.k, 512, "float32") as teacher:
        for number in range(given.rounds + 1):  # the first one warms up
            for name, chosen in cases.items():
                begin = time.process_time()
                for _ in teacher.topk(iter(chosen)):
                    pass
                seconds[name] += [time.process_time() - begin] if number else []
    tokens = sum(len(each.input_ids) for each in sequences)
    print(f"\n{tokens:,} tokens, k = {given.k}, {given.rounds} rounds, {os.cpu_count()} cores")
    print(f"{'':<18}{'targets':>9}{'CPU us/token':>14}{'of all':>8}{'head, of all':>14}")
    for name, chosen in cases.items():
        rows = list(zip(seconds[name], seconds["all"], seconds["body alone"], strict=True))
        whole = median(one / full for one, full, _ in rows)
        head = median((one - body) / (full - body) for one, full, body in rows)
        targets = sum(len(each.positions) for each in chosen)
        print(
            f"{name:<18}{targets / tokens:>9.1%}{1e6 * median(seconds[name]) / tokens:>14,.0f}"
            f"{whole:>8.2f}{head:>14.2f}"
        )


def main(words: list[str] | None = None) -> bool:
    """Returns whether something failed: False, since what fails ends the process."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", help="documents, as for dump_logits.py")
    parser.add_argument(
        "--model", action="append", default=[], help="model directory; may be repeated"
    )
    parser.add_argument(
        "--random", action="store_true", help="add a random model with a heavy body"
    )
    parser.add_argument(
        "--targets", action="store_true", help="measure what targets save, on a model of its own"
    )
    parser.add_argument(
        "--shape", type=int, nargs=3, default=[512, 8, 8192], metavar=("WIDTH", "LAYERS", "IDS"),
        help="of the random model",
    )  # fmt: skip
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)  # of gpu_bench.py
    parser.add_argument("--documents", type=int, default=400, help="documents to read")
    parser.add_argument("--k", type=int, default=64, help="entries of a distribution")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each case")
    parser.add_argument(
        "--only", nargs="+", choices=RUNS, default=list(RUNS), help="run only these cases"
    )
    parser.add_argument("--run", choices=RUNS, help=argparse.SUPPRESS)
    given = parser.parse_args(words)
    if given.run:
        print(json.dumps(run_one(given)))
        return False
    with tempfile.TemporaryDirectory() as folder:
        if not given.corpus:
            given.corpus = str(random_corpus(Path(folder) / "made.jsonl", given.documents))
        if given.targets:
            model = random_model(Path(folder), texts_of(given), 256, 8, 32_768, "float32")
            save(given, model)
            return False
        if given.random:
            texts = texts_of(given)
            made = random_model(Path(folder) / "random-body-heavy", texts, *given.shape)
            given.model.append(str(made))
        for model in given.model:
            compare(given, model)
    return False


def texts_of(given: argparse.Namespace) -> list[str]:
    """The first documents of a JSONL file, which a tokenizer is made of."""
    with Path(given.corpus).open(encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in islice(lines, 500)]


def compare(given: argparse.Namespace, model: str) -> None:
    from processes import on_gpu

    found: dict[str, list[dict[str, float]]] = {name: [] for name in given.only}
    for _ in range(given.rounds):
        for name in given.only:
            words = [sys.executable, __file__, "--run", name, "--corpus", given.corpus]
            words += ["--model", model, "--documents", str(given.documents), "--k", str(given.k)]
            done = subprocess.run(words, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{name}: {done.stderr[-3000:]}")
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
    rates = {name: [run["tokens"] / run["seconds"] for run in runs] for name, runs in found.items()}
    print(f"\n{Path(model).name}, k = {given.k}, {given.rounds} rounds, {os.cpu_count()} cores")
    print(f"{'':<10}{'tokens':>9}{'tokens/s':>10}{'of floor 2':>12}{'front-end us/token':>20}")
    floor = rates.get("floor 2")
    for name, runs in found.items():
        ratio = ""
        if floor:
            ratios = sorted(a / b for a, b in zip(rates[name], floor, strict=True))
            ratio = f"{median(ratios):.2f}"
        cpu = median(1e6 * run["cpu"] / run["tokens"] for run in runs)
        shown = "" if name == "hf" else f"{cpu:.1f}"
        print(
            f"{name:<10}{runs[0]['tokens']:>9,.0f}{median(rates[name]):>10,.0f}{ratio:>12}"
            f"{shown:>20}"
        )
    if on_gpu():
        body, head = multiplied(model)
        print(
            f"{body / 1e9:.2f} billion weights in the body, {head / 1e9:.2f} in the head. TFLOP/s:"
        )
        for name, found_rates in rates.items():
            flop = 2 * (body + head * (name != "floor 1")) * median(found_rates)
            print(f"{name:<10}{flop / 1e12:>9.1f}")
        print(f"{'product':<10}{rate_of_a_product() / 1e12:>9.1f}")


if __name__ == "__main__":
    main()
