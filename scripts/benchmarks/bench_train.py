"""Time and memory of a training step: MoL from disk, plain cross-entropy, and a live teacher.

    python scripts/benchmarks/bench_train.py
    python scripts/benchmarks/bench_train.py --hidden 2048 --layers 16 --vocabulary 151936 \\
        --length 2048

Every case has the same sequences, half domain and half general, packed in one row:

    cross-entropy   on all sequences: the cost of training on both corpora
    mol from disk   cross-entropy on one half; on the other, KL to a dump that workers read
    live teacher    the same, with the base model in memory and the KL over the full vocabulary

A step is forward, backward and AdamW update of a random model, under autocast to --dtype. All cases
run in turn, on a CPU in several rounds of a process each. The table shows the median step of the
fastest round.
"""

import argparse
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from processes import Result, failure, hardware, in_turn, on_gpu, peak, reset_peak
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from pipeline.data.mixing import GeneralStream, MixedDataset
from pipeline.data.packing import collate
from pipeline.token_sequences import Tokens
from pipeline.training.forward import add_distill_forward
from storage import LogitDataset, Record, ShardWriter, TopK, create_dump
from storage.codec.codec import STEPS

CASES = ["cross-entropy", "mol from disk", "live teacher"]


class Domain:
    """Random token sequences of one length, with the interface of `TokenSequences`."""

    def __init__(self, number: int, length: int, vocabulary: int) -> None:
        self.ids = np.random.default_rng(0).integers(0, vocabulary, (number, length), np.int32)
        self.token_count = self.target_count = number * length

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Tokens:
        return Tokens(self.ids[index])


def make_dump(folder: Path, given: argparse.Namespace) -> None:
    """Write a dump whose distributions have the shape of a language model's, with random ids."""
    rng = np.random.default_rng(1)
    plan = {"vocab_size": given.vocabulary, "codec": "v3", "step": STEPS["v3"], "partitions": 1}
    dump = create_dump(folder, plan)
    writer = ShardWriter(dump.partition(0))
    shape = (given.length - 1, given.k)
    for number in range(given.rows):
        # Ids follow Zipf's law, so that they compress as in text; they differ within a position.
        start = rng.zipf(1.3, (shape[0], 1)).clip(0, given.vocabulary - 1)
        ids = (start + np.arange(given.k) * 37) % given.vocabulary
        gaps = rng.exponential(0.15, shape).cumsum(1) + 0.7
        logprobs = -gaps - np.log(np.exp(-gaps).sum(1, keepdims=True) / 0.9)
        topk = TopK.from_dense(ids, logprobs, np.full(shape[0], np.log(0.1)))
        input_ids = rng.integers(0, given.vocabulary, given.length, np.int32)
        writer.write(Record(str(number), 0, input_ids, topk))
    writer.commit(cursor={})
    dump.partition(0).finish({})
    dump.finish()


def make_model(given: argparse.Namespace, device: str) -> PreTrainedModel:
    """A random model, made on its device: a CPU would take longer than the benchmark."""
    torch.manual_seed(0)
    heads = max(1, given.hidden // 64)
    config = Qwen3Config(
        vocab_size=given.vocabulary,
        hidden_size=given.hidden,
        intermediate_size=3 * given.hidden,
        num_hidden_layers=given.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        head_dim=64,
        max_position_embeddings=given.length,
        tie_word_embeddings=True,
    )
    with torch.device(device):
        return Qwen3ForCausalLM(config)


def to_device(value: Any, device: str) -> Any:
    if isinstance(value, dict):
        return {key: to_device(inner, device) for key, inner in value.items()}
    return value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value


def loss_of(case: str, model: PreTrainedModel, teacher: Any, row: dict[str, Any]) -> torch.Tensor:
    targets = row["targets"]
    labels, tails = len(targets["labels"]), len(targets["tail_logprob"])
    if case == "live teacher":
        where = targets["rows"]
        arguments = {name: row[name] for name in ("input_ids", "position_ids", "sequence_lengths")}
        with torch.no_grad():
            base = teacher(**arguments, use_cache=False).logits[0, where[labels:]]
        logits = model(**arguments, use_cache=False).logits[0, where]
        ce = torch.nn.functional.cross_entropy(logits[:labels].float(), targets["labels"])
        log_q, log_p = logits[labels:].float().log_softmax(-1), base.float().log_softmax(-1)
        kl = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
        return ce + kl
    if case == "cross-entropy":
        following = row["input_ids"][0][targets["rows"] + 1]
        targets = {name: value[:0] for name, value in targets.items()}
        targets |= {"rows": row["targets"]["rows"], "labels": following}
        labels, tails = len(following), 0
    weights = torch.full((labels + tails,), 1 / (labels + tails), device=model.device)
    loss: torch.Tensor = model(**row | {"targets": {**targets, "row_weights": weights}})["loss"]
    return loss


def run_case(given: argparse.Namespace, dump: Path, case: str) -> Result:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, given.dtype)
    domain = Domain(given.rows, given.length, given.vocabulary)
    stream = GeneralStream([LogitDataset(dump)], [1], 0)
    data = MixedDataset(domain, stream, 1.0, 0, given.batch)  # type: ignore[arg-type]
    loader = DataLoader(
        data,
        batch_size=given.batch,
        sampler=range((given.steps + 2) * given.batch),
        collate_fn=collate,
        num_workers=given.workers,
        pin_memory=device == "cuda",
    )
    model = make_model(given, device).train()
    add_distill_forward(model, "forward")
    teacher = None
    if case == "live teacher":
        teacher = make_model(given, device).to(dtype).eval()
        add_distill_forward(teacher, "forward")  # for its packed attention
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    before = reset_peak(device)
    times, waits = [], []
    batches = iter(loader)
    for number in range(given.steps + 2):
        began = time.perf_counter()
        (row,) = next(batches)["packed"]
        waited = time.perf_counter() - began
        row = to_device(row, device)
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            loss = loss_of(case, model, teacher, row)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        if number >= 2:  # the first two start workers and allocate memory
            times.append(time.perf_counter() - began)
            waits.append(waited)
    return {
        "seconds": statistics.median(times),
        "wait_share": sum(waits) / sum(times),
        "bytes": peak(device) - before,
        "parameters": model.num_parameters(),
    }


def main(words: list[str] | None = None) -> bool:
    """Returns whether a case failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=256, help="width of the model")
    parser.add_argument("--layers", type=int, default=4, help="layers of the model")
    parser.add_argument("--vocabulary", type=int, default=32768, help="ids of the model")
    parser.add_argument("--length", type=int, default=256, help="tokens per sequence")
    parser.add_argument(
        "--batch", type=int, default=4, help="domain sequences per step, and as many general ones"
    )
    parser.add_argument("--k", type=int, default=64, help="entries of a distribution")
    parser.add_argument("--rows", type=int, default=64, help="sequences in the dump")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--workers", type=int, default=1, help="processes that read and decode")
    parser.add_argument("--steps", type=int, default=8, help="steps per process")
    parser.add_argument("--rounds", type=int, help="default: 3 on a CPU, 1 on a GPU")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="what is not done by then is left out"
    )
    parser.add_argument("--case", choices=CASES, action="append", help="run this case only")
    given = parser.parse_args(words)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        dump = Path(folder) / "dump"
        make_dump(dump, given)
        runs = in_turn(
            given.case or CASES,
            given.rounds or (1 if on_gpu() else 3),
            lambda case, _: run_case(given, dump, case),
            given.seconds - (time.monotonic() - began),
        )
    show(given, runs)
    return any(map(failure, runs.values()))


def show(given: argparse.Namespace, runs: dict[str, list[Result]]) -> None:
    tokens = 2 * given.batch * given.length
    sizes = {one["parameters"] for found in runs.values() for one in found if "parameters" in one}
    print(
        f"{given.layers} layers of width {given.hidden}, {' '.join(f'{n:,}' for n in sizes)} "
        f"parameters, {given.vocabulary:,} ids, k {given.k}, {given.dtype}; {tokens:,} tokens in a "
        f"step, in sequences of {given.length:,}; {hardware()}"
    )
    print(f"{'':<16}{'seconds':>9}{'time':>8}{'tokens/s':>10}{'MiB':>8}{'memory':>8}{'wait':>8}")
    base: Result | None = None
    for name, found in runs.items():
        if why := failure(found):
            print(f"{name:<16}  {why}")
            continue
        best = min(found, key=lambda one: one["seconds"])
        base = base or best
        print(
            f"{name:<16}{best['seconds']:>9.3f}{best['seconds'] / base['seconds']:>7.2f}×"
            f"{tokens / best['seconds']:>10,.0f}{best['bytes'] / 2**20:>8.0f}"
            f"{best['bytes'] / base['bytes']:>7.2f}×{best['wait_share']:>8.2%}"
        )


if __name__ == "__main__":
    sys.exit(main())
