"""SUPPORTED.md: the table of what was measured, and why two engines differ."""

import json
import re
from pathlib import Path
from typing import Any

from pipeline.agreement import Answer
from tests.helpers.families import LEFT_OUT, SHARED
from tests.helpers.paths import ROOT

SUPPORTED = ROOT / "pipeline" / "models" / "SUPPORTED.md"
STEPS = ["build", "dump", "pack", "train", "evaluate", "reload in vLLM", "compare"]
WINDOW = "vLLM's sliding window is one token longer than the config's (commandr.py, cohere2_moe.py)"
SCAN = "vLLM's CPU build has no kernel for Mamba 1 (selective_scan_fwd)"
ROUTER = "vLLM's CPU build routes to experts by softmax or in groups alone (cpu_router.py)"
LATENT = (
    "latent attention on a CPU differs from the second token on, also with VLLM_MLA_DISABLE=1; "
    "the cause is not known"
)
SECOND = "it begins at the second token; the cause is not known"
FLIPS = (
    "rounding: some tokens take another expert. transformers in bfloat16 is 2e-2 from itself in "
    "float32"
)
CAUSES = {
    "AXK1ForCausalLM": "vLLM wants post_mlp_layernorm in dense layers, too",
    "DeepseekV4ForCausalLM": "vLLM does not read transformers' config.json (mlp_layer_types)",
    "HYV3ForCausalLM": ROUTER,
    "HrmTextForCausalLM": "the cause is not known",
    "InklingForCausalLM": "vLLM wants a tokenizer of it",
    "KimiLinearForCausalLM": "vLLM's linear attention of it needs CUTLASS",
    "Cohere2ForCausalLM": WINDOW,
    "Cohere2MoeForCausalLM": WINDOW,
    "Cohere2VisionForConditionalGeneration": "transformers' wrapper leaves out logit_scale",
    "DbrxForCausalLM": "vLLM 0.32 does not find its experts (blocks.0.ffn.experts.w13_weight)",
    "FalconMambaForCausalLM": SCAN,
    "DeepseekV2ForCausalLM": LATENT,
    "DeepseekV3ForCausalLM": LATENT,
    "DeepseekV32ForCausalLM": "vLLM has no sparse attention on a CPU",
    "Gemma3nForCausalLM": "the first token differs already; the cause is not known",
    "Glm4MoeLiteForCausalLM": LATENT,
    "GlmMoeDsaForCausalLM": "vLLM has no sparse attention on a CPU",
    "HYV4ForCausalLM": "vLLM has no sparse attention on a CPU",
    "JambaForCausalLM": SCAN,
    "LagunaForCausalLM": ROUTER,
    "LongcatFlashForCausalLM": "transformers saves weights for experts that compute nothing, and "
    "vLLM has no place for them",
    "Lfm2ForCausalLM": SECOND,
    "Lfm2MoeForCausalLM": SECOND,
    "Lfm2VlForConditionalGeneration": SECOND,
    "MambaForCausalLM": SCAN,
    "MiniMaxM2ForCausalLM": ROUTER,
    "NemotronHForCausalLM": "vLLM's CPU build has no experts without a gate (is_act_and_mul)",
    "Qwen3NextForCausalLM": FLIPS,
    "Qwen3_5MoeForCausalLM": FLIPS,
    "Qwen3_5MoeForConditionalGeneration": FLIPS,
    "OlmoHybridForCausalLM": "vLLM's linear attention of it needs Triton",
}
"""Why vLLM and transformers differ or stop, where that is known."""


def outcome(result: dict[str, Any] | None) -> str:
    """whole, differs, stops, or not measured."""
    if result is None:
        return "not measured"
    if result["answer"] not in ("", Answer.SAME):
        return "differs"
    done = list(result["steps"]) == STEPS and not any(result["steps"].values())
    return "whole" if done and result["answer"] == Answer.SAME else "stops"


def row(name: str, result: dict[str, Any] | None) -> str:
    """A line of the table."""
    if result is None:
        return f"| {name} | | | | not measured |"
    kl = "" if result["null_kl"] is None else f"{result['null_kl']:.1e}"
    if result["dtype"] == "bfloat16":
        kl += " (bfloat16)"
    note = ""
    if (kind := outcome(result)) != "whole":
        failed = next((step for step, code in result["steps"].items() if code), "")
        what = f"stops at: {failed}" if kind == "stops" else kind
        note = ". ".join(filter(None, (what, CAUSES.get(name) or told_by_vllm(result["error"]))))
    return f"| {name} | {result['way']} | {result['packing']} | {kl.strip()} | {note} |"


def told_by_vllm(error: str) -> str:
    """Its reason, without the place of the model, which is a temporary one."""
    found = re.search(r"vLLM cannot run [^:]+: (.*?) *\(its log", error)
    return f"vLLM: {found[1].rstrip(':')}"[:120].replace("|", "/") if found else ""


def rows_of(page: str) -> list[str]:
    """The architectures of the table, in its order."""
    cells = [line.split("|")[1].strip() for line in page.splitlines() if line.startswith("| ")]
    return [cell for cell in cells if cell in SHARED]


def write_table(results: Path, page: Path) -> None:
    """Replace the table of `page`, which stands between two comments, by one of these results."""
    found = {}
    for name in SHARED:
        file = results / f"{name}.json"
        found[name] = json.loads(file.read_text()) if file.exists() else None
    counts = dict.fromkeys(("whole", "differs", "stops", "not measured"), 0)
    for result in found.values():
        counts[outcome(result)] += 1
    told = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
    lines = [
        f"{len(SHARED)} architectures: {told}.",
        "",
        "| architecture | way | packing | null KL, nats | note |",
        "|---|---|---|---|---|",
        *(row(name, result) for name, result in found.items()),
        "",
        "Left out: "
        + "; ".join(f"{name} ({reason})" for name, reason in sorted(LEFT_OUT.items()))
        + ".",
    ]
    begin, end = "<!-- table -->\n", "<!-- end of the table -->"
    before, _, rest = page.read_text().partition(begin)
    _, _, after = rest.partition(end)
    page.write_text(before + begin + "\n" + "\n".join(lines) + "\n\n" + end + after)
