"""Mixture of Losses from a dump in plain torch: a starting point for your own trainer.

    python scripts/examples/plain_torch.py MODEL DUMP DOMAIN.jsonl OUTPUT [STEPS]

`storage` reads the dump, and `packed_rows` packs sequences into rows. `linear_sparse_divergence`
computes the loss from the decoder's hidden states and the head's weight. The rest is torch. A step
takes one domain and one general sequence. Of both, only the targets count, which are all tokens
where nothing else is said: `targets["rows"]` are the positions that predict them.
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.config import CorpusConfig
from pipeline.corpus import Corpus
from pipeline.data.packing import packed_rows
from pipeline.losses import linear_sparse_divergence
from pipeline.models.attention import enable_packing
from pipeline.models.head import hidden_states
from pipeline.token_sequences import TokenSequences
from storage import LogitDataset


def main(path: str, dump_path: str, domain_path: str, output: str, steps: str = "100") -> None:
    dump = LogitDataset(dump_path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).train()
    enable_packing(model)  # sequences that share a row do not see each other
    domain = TokenSequences(Corpus(CorpusConfig(domain_path), tokenizer, dump.plan["max_length"]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for step in range(int(steps)):
        (row,) = packed_rows([domain[step % len(domain)]], [dump[step % len(dump)]])
        targets = row.pop("targets")
        hidden = hidden_states(
            model, row["input_ids"], row["position_ids"], row["sequence_lengths"]
        )
        ce_rows, kl_rows = len(targets["labels"]), len(targets["tail_logprob"])
        mean = torch.cat([torch.full((n,), 1 / n) for n in (ce_rows, kl_rows)])
        loss, losses = linear_sparse_divergence(
            hidden[targets["rows"]],
            model.get_output_embeddings().weight,
            targets["ids"],
            targets["logprobs"],
            targets["tail_logprob"],
            "forward",
            labels=targets["labels"],
            row_weights=mean,  # mean CE of the domain rows + 1.0 · mean KL of the general rows
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        ce, kl = losses[:ce_rows].mean(), losses[ce_rows:].mean()
        print(f"step {step}: CE {ce:.4f}, KL {kl:.4f}")
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


if __name__ == "__main__":
    main(*sys.argv[1:])
