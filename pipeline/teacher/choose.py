"""Choose the teacher that the settings name."""

from pipeline.config import DumpConfig
from pipeline.models.directory import ModelFolder
from pipeline.progress import say
from pipeline.teacher.sampling import Sampling
from pipeline.teacher.teacher import Teacher, TransformersTeacher
from pipeline.teacher.vllm_teacher import VllmTeacher


def make_teacher(config: DumpConfig, model: ModelFolder) -> Teacher:
    """Start the engine that the config names; `config.dtype` must not be "auto"."""
    sampling = Sampling(config.samples, config.sample_seed)
    if config.engine == "transformers":
        if config.engine_args:
            say("engine_args: they are vLLM's, and engine: transformers does not read them")
        return TransformersTeacher(model, config.k, config.dtype, sampling)
    return VllmTeacher(
        model, config.k, config.max_length, config.dtype, config.in_flight, config.engine_args,
        sampling,
    )  # fmt: skip
