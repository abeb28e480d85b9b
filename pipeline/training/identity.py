"""The identity of a run: what must match for it to resume."""

import json
from dataclasses import asdict

from transformers import TrainingArguments

from pipeline.training.arguments import items_per_step
from pipeline.training.inputs import Inputs
from pipeline.types import Json
from storage.plan import look_up

# Training arguments that do not change what is learnt: a run may resume with others.
FREE = (
    "logging_",
    "log_",
    "save_",
    "eval_",
    "report_to",
    "dataloader_",
    "disable_tqdm",
    "run_name",
)
BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")
TEMPLATE = "domain_rendering.chat_template"
LATER = ("model_config", "domain_rendering")  # what runs of earlier releases did not record


def make_identity(inputs: Inputs, args: TrainingArguments) -> Json:
    """Settings and inputs that must match for a run to resume, as plain JSON."""
    config = inputs.config
    loss = {**asdict(config.loss), "temperature": 1.0}  # a setting of earlier releases
    if config.loss.targets == "auto":  # as in runs made before this setting existed
        del loss["targets"]
    identity = {
        "model": inputs.model.weights_fingerprint,
        "model_config": inputs.model.stated,
        "dump": ", ".join(f"{d.fingerprint} × {weight:g}" for d, weight in inputs.dumps.items()),
        "domain": inputs.corpus.fingerprint(),
        "domain_rendering": inputs.corpus.rendering(),
        **({"domain_special_tokens": "split"} if inputs.corpus.splits_special else {}),
        **({"domain_targets": targets} if (targets := inputs.corpus.targets_identity()) else {}),
        "mix": config.mix,
        "mix_by": config.mix_by,
        "max_length": inputs.max_length,
        "loss": loss,
        "lora": config.lora,
        "dtype": config.dtype,
        "sequences_per_step": items_per_step(args),
        "training": {
            name: value
            for name, value in config.training.items()
            if not name.startswith(FREE) and name not in BATCH
        },
    }
    if config.quantization is not None:  # runs without it have no such key
        identity["quantization"] = config.quantization
    plain: Json = json.loads(json.dumps(identity, default=str))
    return plain


def completed(there: Json, here: Json) -> Json:
    """The identity of a run, with what an earlier release did not record taken to be the same."""
    found = {**{name: here[name] for name in LATER if name in here}, **there}
    mine, ours = (look_up(each, TEMPLATE)[0] for each in (found, here))
    if "model_config" not in there and mine is not None and "with_tools" in (ours or {}):
        template = {"with_tools": ours["with_tools"], **mine}
        found["domain_rendering"] = {**found["domain_rendering"], "chat_template": template}
    return found
