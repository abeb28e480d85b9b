"""SUPPORTED.md: the table of what was measured, and why two engines differ."""

import json
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
CAUSES = {
    "Cohere2ForCausalLM": WINDOW,
    "Cohere2MoeForCausalLM": WINDOW,
    "Cohere2VisionForConditionalGeneration": WINDOW,
    "DbrxForCausalLM": "vLLM 0.32 does not find its experts (blocks.0.ffn.experts.w13_weight)",
    "FalconMambaForCausalLM": SCAN,
    "Gemma3nForCausalLM": "the cause is not known",
    "JambaForCausalLM": SCAN,
    "LagunaForCausalLM": ROUTER,
    "LongcatFlashForCausalLM": "transformers saves weights for experts that compute nothing, and "
    "vLLM has no place for them",
    "MambaForCausalLM": SCAN,
    "MiniMaxM2ForCausalLM": ROUTER,
    "NemotronHForCausalLM": "vLLM's CPU build has no experts without a gate (is_act_and_mul)",
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
    result = result or {"way": "", "packing": "", "null_kl": None, "dtype": "", "steps": {}}
    kl = result["null_kl"]
    told = "" if kl is None else f"{kl:.1e}"
    if result["dtype"] == "bfloat16":
        told += " (bfloat16)"
    kind = outcome(result) if result["steps"] else "not measured"
    failed = next((step for step, code in result["steps"].items() if code), "")
    notes = {"whole": "", "stops": f"stops at: {failed}", "differs": "differs"}
    cause = CAUSES.get(name, "") if kind in ("stops", "differs") else ""
    note = ". ".join(part for part in (notes.get(kind, kind), cause) if part)
    return f"| {name} | {result['way']} | {result['packing']} | {told.strip()} | {note} |"


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
