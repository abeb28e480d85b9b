"""Check whether vLLM has loaded this project's plug-in, and which models it can wrap."""

import os
from importlib.metadata import entry_points

from pipeline.errors import ConfigError

GROUP, NAME = "vllm.general_plugins", "mol_topk"
TARGET = "pipeline.teacher.topk_model:register"


def can_wrap(architectures: list[str]) -> bool:
    """Whether the plug-in has registered a top-k model for one of these architectures.

    Raises ConfigError if vLLM did not load the plug-in. vLLM itself only logs this, and every dump
    would use the slower path.
    """
    from vllm.model_executor.models import ModelRegistry
    from vllm.plugins import load_general_plugins

    from pipeline.teacher import topk_model

    load_general_plugins()
    if not topk_model.registered:
        raise ConfigError(f"vLLM did not load the top-k plug-in {NAME}: {why_not_loaded()}")
    known = ModelRegistry.get_supported_archs()
    return any(topk_model.PREFIX + name in known for name in architectures)


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
