"""Whether vLLM has this project's plug-in, and which models the plug-in can wrap."""

import os
from importlib.metadata import entry_points

from pipeline.errors import ConfigError

GROUP, NAME = "vllm.general_plugins", "mol_topk"
TARGET = "pipeline.teacher.topk_model:register"


def can_wrap(architectures: list[str]) -> bool:
    """Whether the plug-in has registered a top-k model for one of these architectures.

    Raises ConfigError where vLLM did not load the plug-in. vLLM itself only logs that, and every
    dump would take the slower way.
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
    """The reason, and what to do."""
    again = "Install this project again into this environment: `make setup`, or `pip install .`"
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and NAME not in allowed.split(","):
        return f"VLLM_PLUGINS is {allowed!r}. Add {NAME} to it, or unset it"
    found = [point for point in entry_points(group=GROUP) if point.name == NAME]
    if not found:
        return f"no installed package has the entry point {GROUP} {NAME}. {again}"
    stale = [point.value for point in found if point.value != TARGET]
    if stale:
        return f"its entry point is {stale[0]}, expected {TARGET}: an older install. {again}"
    try:
        found[0].load()
    except Exception as error:  # whatever its imports raise
        return f"it does not import ({type(error).__name__}: {error}). {again}"
    return f"vLLM loaded its plug-ins before {TARGET} could be found. Start the script again"
