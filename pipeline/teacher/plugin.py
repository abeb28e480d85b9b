"""Check whether vLLM has loaded this project's plug-in, and for which models it has classes."""

import os
from importlib.metadata import entry_points

from pipeline.errors import ConfigError

GROUP, NAME = "vllm.general_plugins", "mol_topk"
TARGET = "pipeline.teacher.topk_model:register"


def class_overrides(architectures: list[str]) -> dict[str, str]:
    """The plug-in's classes for a model of these architectures, for vLLM's `model_class_overrides`;
    empty if it cannot wrap any.

    Raises ConfigError if vLLM did not load the plug-in. vLLM itself only logs this, and every dump
    would use the slower path.
    """
    from vllm.plugins import load_general_plugins

    from pipeline.teacher import topk_model

    load_general_plugins()
    if not topk_model.registered:
        raise ConfigError(f"vLLM did not load the top-k plug-in {NAME}: {why_not_loaded()}")
    return topk_model.class_overrides(architectures)


def why_not_loaded() -> str:
    """Why vLLM did not load the plug-in, and what to do."""
    again = "Reinstall this project in this environment: `make setup`, or `pip install .`"
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and NAME not in allowed.split(","):
        return f"VLLM_PLUGINS is {allowed!r}. Add {NAME} to it, or unset it"
    found = [point for point in entry_points(group=GROUP) if point.name == NAME]
    if not found:
        return f"no installed package has the entry point {GROUP} {NAME}. {again}"
    stale = [point.value for point in found if point.value != TARGET]
    if stale:
        return f"its entry point is {stale[0]} of an older install, expected {TARGET}. {again}"
    try:
        found[0].load()
    except Exception as error:  # whatever its imports raise
        return f"it cannot be imported ({type(error).__name__}: {error}). {again}"
    return f"vLLM loaded its plug-ins before {TARGET} could be found. Run the script again"
