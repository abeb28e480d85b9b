"""Runs of stage two on the device: a random model of a real shape, its dump, a domain."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from pipeline.config import CorpusConfig, DumpConfig, TrainConfig
from pipeline.dump import dump
from tests.gpu.device import DEVICE, REHEARSED
from tests.helpers.models import tiny_tokenizer
from tests.helpers.runs import script, settings, yaml_of

SMALL = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
"""The shape in a rehearsal, whatever is asked for."""


def random_model(path: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A Qwen3 with grouped queries and a tied head. Returns `path`."""
    torch.manual_seed(0)
    tiny_tokenizer(path)
    shape = {
        "vocab_size": 4096,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "eos_token_id": 0,
        "bos_token_id": None,
        "initializer_range": 0.08,
        **changes,
        **(SMALL if REHEARSED else {}),
    }
    Qwen3ForCausalLM(Qwen3Config(**shape)).to(dtype).save_pretrained(path)
    return path


def random_corpus(path: Path, lengths: list[int], seed: int, vocabulary: int = 512) -> CorpusConfig:
    """Documents of random token ids, which the tokenizer has."""
    rng = np.random.default_rng(seed)
    rows = [rng.integers(1, vocabulary, length).astype(np.int32) for length in lengths]
    pq.write_table(pa.table({"input_ids": [row.tolist() for row in rows]}), path)
    return CorpusConfig(str(path), tokens_column="input_ids")


def dumped(model: Path, corpus: CorpusConfig, output: Path, **changes: Any) -> Path:
    """A finished dump by transformers, on the device."""
    given: dict[str, Any] = {"k": 32, "max_length": 2048, "engine": "transformers", **changes}
    dump.run(DumpConfig(model=str(model), corpus=corpus, output=str(output), **given))
    return output


class Job:
    """A model, its dump and a domain in a folder."""

    def __init__(
        self, folder: Path, lengths: list[int], dtype: str = "float32", **shape: Any
    ) -> None:
        self.folder, self.longest = folder, max(lengths)
        self.model = random_model(folder / "base", **shape)
        self.domain = random_corpus(folder / "domain.parquet", lengths, 1)
        general = random_corpus(folder / "general.parquet", lengths, 2)
        self.dump = dumped(self.model, general, folder / "dump", dtype=dtype)

    def run(self, name: str, **changes: Any) -> TrainConfig:
        """Settings of a run; on the CPU where the checks run there."""
        training = {"use_cpu": DEVICE == "cpu", **changes.pop("training", {})}
        given = {"output": str(self.folder / name), "max_length": self.longest, **changes}
        config = settings(
            self.folder, self.model, self.dump, self.folder, training=training, **given
        )
        config.domain = self.domain
        return config


def run_script(config: TrainConfig, ranks: int = 1) -> str:
    """What the real script says; AssertionError with its last line where it fails."""
    done = script(yaml_of(Path(f"{config.output}.yaml"), config), ranks=ranks, env=seeing(ranks))
    last = done.stderr.strip().splitlines()[-1:]
    assert done.returncode == 0, f"exit code {done.returncode}: {last}"
    return done.stderr


def seeing(devices: int) -> dict[str, str]:
    """The environment of a process that sees this many of the GPUs that are visible here."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(devices)))
    return {**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(seen.split(",")[:devices])}
