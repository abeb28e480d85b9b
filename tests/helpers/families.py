"""A tiny model of every architecture that transformers and vLLM share; nothing is downloaded.

The settings of a family are the defaults of its own config class, made small by name. `SMALL` has
the names that most families use, `OWN` what a family needs besides.
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from tests.helpers.models import tiny_tokenizer

VOCAB, HIDDEN, WINDOW = 512, 64, 16
TOKENS = 480  # of the tokenizer; transformers gives some families a few more
GAIN = 1.6
"""Standard deviation of a product of a weight with a unit vector: attention is far from uniform."""

SMALL: dict[str, Any] = {
    # widths
    "vocab_size": VOCAB, "vocab_size_per_layer_input": VOCAB, "hidden_size": HIDDEN,
    "n_embd": HIDDEN, "d_model": HIDDEN, "word_embed_proj_dim": HIDDEN, "embed_dim": HIDDEN,
    "hidden_size_per_layer_input": 16, "intermediate_size": 128, "intermediate_size_mlp": 128,
    "n_inner": 128, "ffn_dim": 128, "ffn_hidden_size": 128, "expert_ffn_hidden_size": 64,
    "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64,
    "moe_shared_expert_intermediate_size": 64, "shared_intermediate_size": 64,
    # heads
    "num_attention_heads": 2, "n_head": 2, "n_heads": 2, "num_heads": 2, "head_dim": 32,
    "global_head_dim": 32, "swa_head_dim": 32, "swa_v_head_dim": 32,
    "num_key_value_heads": 1, "num_kv_heads": 1, "swa_num_attention_heads": 2,
    "swa_num_key_value_heads": 1, "rotary_dim": 16, "query_pre_attn_scalar": 32,
    "q_lora_rank": 32, "index_n_heads": 32, "index_topk": 16,
    # layers
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "depth": 2, "num_layers": 2,
    "max_window_layers": 0, "num_kv_shared_layers": 0, "num_nextn_predict_layers": 0,
    "num_mtp_layers": 0, "first_k_dense_replace": 1, "num_dense_layers": 1,
    # positions
    "max_position_embeddings": 512, "n_positions": 512, "max_seq_len": 512,
    "original_max_position_embeddings": 512, "sliding_window": WINDOW,
    "sliding_window_size": WINDOW, "attention_chunk_size": 128,
    # experts
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4,
    "num_experts_per_tok": 2, "moe_k": 2, "moe_topk": 2, "n_group": 1, "topk_group": 1,
    "zero_expert_num": 2, "n_shared_experts": 1, "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    # states
    "state_size": 16, "ssm_state_size": 16, "mamba_d_state": 16, "mamba_d_ssm": 128,
    "mamba_n_heads": 4, "mamba_num_heads": 4, "n_mamba_heads": 4, "mamba_d_head": 32,
    "mamba_head_dim": 32, "mamba_n_groups": 1, "mamba_ngroups": 1, "n_groups": 1,
    "chunk_size": WINDOW, "mamba_chunk_size": WINDOW, "mamba_dt_rank": 4, "time_step_rank": 4,
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 128,
    "linear_value_head_dim": 128, "linear_head_dim": 128, "linear_num_heads": 2, "adapter_rank": 8,
    # what is easily lost: caps and scales that matter at these sizes
    "attn_logit_softcapping": 3.0, "final_logit_softcapping": 10.0, "logit_scale": 0.5,
    "logits_scaling": 2.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.7,
    "dim_model_base": 32,
    # no dropout, and tokens of tiny_tokenizer
    "attention_dropout": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
    "summary_first_dropout": 0.0, "dropout": 0.0, "hidden_dropout": 0.0, "residual_dropout": 0.0,
    "classifier_dropout": 0.0, "layerdrop": 0.0, "initializer_range": 0.2,
    "eos_token_id": 0, "bos_token_id": None, "pad_token_id": None,
}  # fmt: skip

EVEN_IF_NONE = {
    "head_dim", "num_key_value_heads", "num_experts_per_tok", "n_group", "topk_group",
}  # fmt: skip
"""Names of SMALL that are set where the default is None, too."""
SPECIAL = {"bos_token_id": 0, "pad_token_id": 0}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
MROPE = {"rope_parameters": {**ROPE, "mrope_section": [4, 6, 6]}}
NOAUX = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}


def alternating(*kinds: str) -> dict[str, Any]:
    return {"num_hidden_layers": 4, "layer_types": [*kinds, *kinds]}


WINDOWS = alternating("sliding_attention", "full_attention")
OWN: dict[str, dict[str, Any]] = {
    # None is not allowed, or breaks the model
    "cwm": SPECIAL,
    "gemma4": SPECIAL,
    "gemma4_text": SPECIAL,
    "gemma4_unified_text": SPECIAL,
    "step3p5": {**SPECIAL, "sliding_window": WINDOW, **WINDOWS},
    # what vLLM reads and transformers does not write
    "afmoe": {"score_func": "sigmoid", "route_norm": True, "n_group": 1, "topk_group": 1},
    "deepseek_v3": NOAUX,
    "deepseek_v32": NOAUX,
    "glm4_moe": {"head_dim": 32},
    "glm4_moe_lite": {**NOAUX, "first_k_dense_replace": 1},
    "glm_moe_dsa": NOAUX,
    "hy_v3": {
        "first_k_dense_replace": 1,
        "expert_hidden_dim": 64,
        "route_norm": True,
        "qk_norm": True,
    },
    "longcat_flash": {
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
        "zero_expert_type": "identity",
    },
    "lfm2": {
        **alternating("conv", "full_attention"),
        "full_attn_idxs": [1, 3],
        "block_dim": HIDDEN,
        "block_ff_dim": 128,
        "block_auto_adjust_ff_dim": False,
        "conv_dim": HIDDEN,
    },
    "mimo_v2_flash": {
        "v_head_dim": 32,
        "hybrid_layer_pattern": [0, 1, 0, 1],
        "moe_layer_freq": [0, 1, 1, 1],
        "swa_num_attention_heads": 2,
        "swa_num_key_value_heads": 2,
        "add_swa_attention_sink_bias": True,
        "swa_head_dim": 32,
        "swa_v_head_dim": 32,
        "rope_theta": 5e6,
        "swa_rope_theta": 1e4,
        "partial_rotary_factor": 0.334,
        "layernorm_epsilon": 1e-5,
        "sliding_window_size": WINDOW,
        "scoring_func": "sigmoid",
    },
    "qwen3_vl_moe_text": {"norm_topk_prob": True},
    "minimax_m2": {"rotary_dim": 16, "scoring_func": "sigmoid", "use_routing_bias": True},
    # other layers than the first two or four of the default
    "granitemoehybrid": alternating("mamba", "attention"),
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
    "laguna": WINDOWS,
    "lfm2_moe": alternating("conv", "full_attention"),
    "mellum": WINDOWS,
    # sizes that must fit together
    "dbrx": {
        "attn_config": {"kv_n_heads": 1, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {
            "hidden_size": HIDDEN,
            "ffn_hidden_size": 128,
            "moe_num_experts": 4,
            "moe_top_k": 2,
        },
    },
    "falcon": {"ffn_hidden_size": 4 * HIDDEN},
    "glm4v_moe_text": {
        "head_dim": 32,
        "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5, "mrope_section": [2, 3, 3]},
    },
    "glm4v_text": MROPE,
    "glm5_next_text": {"num_key_value_heads": 2},
    "glm_ocr_text": MROPE,
    "llama4_text": {"num_experts_per_tok": 1},
    "mamba2": {"num_heads": 4},
    "zamba2": {"num_key_value_heads": 2},
    "muse_glimmer": {"out_hidden_size": 4 * HIDDEN},
    "paddleocr_vl_text": MROPE,
    "qwen2_5_vl_text": MROPE,
    "qwen2_vl_text": MROPE,
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 32,
        "indexer_budget": WINDOW,
        "indexer_compress_ratio": 2,
        "ngram_vocab_size_base": 512,
        "hc_lowrank": 8,
        "ple_embed_dim": 64,
        "split_ngram_parts": 2,
        "output_gate_type": "silu",
    },
}
"""Settings of one model_type, in place of those of SMALL."""
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth")
UNBUILT = "transformers' default settings of it do not make a small model"
LEFT_OUT = {
    **dict.fromkeys(
        (
            "CohereCompassForConditionalGeneration",
            "Emu3ForConditionalGeneration",
            "Ernie4_5_VLMoeForConditionalGeneration",
            "Granite4VisionForConditionalGeneration",
            "HunYuanVLForConditionalGeneration",
            "InklingForConditionalGeneration",
            "NemotronH_Omni_Reasoning_V3",
        ),
        UNBUILT,
    ),
    "Blip2ForConditionalGeneration": "it cannot read text without an image",
    "DiffusionGemmaForBlockDiffusion": "it does not predict the next token",
    "Gemma3nForConditionalGeneration": "it needs timm, which is not among the dependencies",
}
"""Shared architectures that are no language models of this kind, and why."""


SHARED = [
    "AXK1ForCausalLM", "AfmoeForCausalLM", "ApertusForCausalLM", "ArceeForCausalLM",
    "AriaForConditionalGeneration", "BloomForCausalLM", "Cohere2ForCausalLM",
    "Cohere2MoeForCausalLM", "Cohere2VisionForConditionalGeneration", "CohereForCausalLM",
    "Cosmos3EdgeForConditionalGeneration", "CwmForCausalLM", "DbrxForCausalLM",
    "DeepseekV2ForCausalLM", "DeepseekV32ForCausalLM", "DeepseekV3ForCausalLM",
    "DeepseekV4ForCausalLM", "Ernie4_5ForCausalLM", "Ernie4_5_MoeForCausalLM",
    "Exaone4ForCausalLM", "Exaone4_5_ForConditionalGeneration", "ExaoneMoeForCausalLM",
    "FalconForCausalLM", "FalconH1ForCausalLM", "FalconMambaForCausalLM",
    "FlexOlmoForCausalLM", "GPT2LMHeadModel", "GPTBigCodeForCausalLM", "GPTJForCausalLM",
    "GPTNeoXForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM",
    "Gemma3ForConditionalGeneration", "Gemma3nForCausalLM", "Gemma4ForCausalLM",
    "Gemma4ForConditionalGeneration", "Gemma4UnifiedForConditionalGeneration",
    "GemmaForCausalLM", "Glm4ForCausalLM", "Glm4MoeForCausalLM", "Glm4MoeLiteForCausalLM",
    "Glm4vForConditionalGeneration", "Glm4vMoeForConditionalGeneration",
    "Glm5NextForConditionalGeneration", "GlmForCausalLM", "GlmMoeDsaForCausalLM",
    "GlmOcrForConditionalGeneration", "GptOssForCausalLM", "GraniteForCausalLM",
    "GraniteMoeForCausalLM", "GraniteMoeHybridForCausalLM", "GraniteMoeSWAForCausalLM",
    "GraniteMoeSharedForCausalLM", "GraniteSWAForCausalLM", "HYV3ForCausalLM",
    "HYV4ForCausalLM", "HrmTextForCausalLM", "HunYuanDenseV1ForCausalLM",
    "HunYuanMoEV1ForCausalLM", "HyperCLOVAXForCausalLM", "Idefics3ForConditionalGeneration",
    "InklingForCausalLM", "InternVLForConditionalGeneration", "Jais2ForCausalLM",
    "JambaForCausalLM", "KimiLinearForCausalLM", "LagunaForCausalLM", "Lfm2ForCausalLM",
    "Lfm2MoeForCausalLM", "Lfm2VlForConditionalGeneration", "Llama4ForCausalLM",
    "Llama4ForConditionalGeneration", "LlamaForCausalLM", "LlavaForConditionalGeneration",
    "LlavaNextForConditionalGeneration", "LlavaNextVideoForConditionalGeneration",
    "LlavaOnevisionForConditionalGeneration", "LongcatFlashForCausalLM", "Mamba2ForCausalLM",
    "MambaForCausalLM", "MellumForCausalLM", "MiMoV2FlashForCausalLM", "MiniCPM3ForCausalLM",
    "MiniCPMV4_6ForConditionalGeneration", "MiniCPMV4_7ForConditionalGeneration",
    "MiniMaxM2ForCausalLM", "MiniMaxM3SparseForConditionalGeneration", "Ministral3ForCausalLM",
    "Mistral3ForConditionalGeneration", "MistralForCausalLM", "MixtralForCausalLM",
    "MuseGlimmerForConditionalGeneration", "NemotronForCausalLM", "NemotronHForCausalLM",
    "OPTForCausalLM", "Olmo2ForCausalLM", "Olmo3ForCausalLM", "OlmoForCausalLM",
    "OlmoHybridForCausalLM", "OlmoeForCausalLM", "PaddleOCRVLForConditionalGeneration",
    "PaliGemmaForConditionalGeneration", "Phi3ForCausalLM", "PhiForCausalLM",
    "QianfanOCRForConditionalGeneration", "Qwen2ForCausalLM", "Qwen2MoeForCausalLM",
    "Qwen2VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration",
    "Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "Qwen3NextForCausalLM",
    "Qwen3VLForConditionalGeneration", "Qwen3VLMoeForConditionalGeneration",
    "Qwen3_5ForCausalLM", "Qwen3_5ForConditionalGeneration", "Qwen3_5MoeForCausalLM",
    "Qwen3_5MoeForConditionalGeneration", "Qwen4ExpForCausalLM",
    "Qwen4ExpForConditionalGeneration", "SeedOssForCausalLM", "SmolLM3ForCausalLM",
    "SmolVLMForConditionalGeneration", "StableLmForCausalLM", "Starcoder2ForCausalLM",
    "Step3p7ForConditionalGeneration", "VaultGemmaForCausalLM", "Zamba2ForCausalLM",
]  # fmt: skip
"""The architectures that transformers and vLLM share, without those left out."""


def model_types() -> dict[str, str]:
    """model_type of each architecture of transformers that reads text and writes text."""
    found = {}
    for names in (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        for model_type, architectures in names.items():
            for name in [architectures] if isinstance(architectures, str) else architectures:
                found[name] = model_type
    return found


def small_values(default: PreTrainedConfig) -> dict[str, Any]:
    """Arguments of the class of `default` for a tiny model."""
    # vars: some settings may differ between layers, and their attributes refuse to be read.
    given = {field.name: vars(default).get(field.name) for field in dataclasses.fields(default)}
    own = OWN.get(default.model_type, {})
    values: dict[str, Any] = {
        name: SMALL[name]
        for name in given.keys() & SMALL.keys()
        if (given[name] is not None or name in EVEN_IF_NONE)
        and not isinstance(given[name], list | dict)
    }
    if "qk_rope_head_dim" in given:  # latent attention: its sizes stay, vLLM has kernels for these
        values |= {"head_dim": given["qk_rope_head_dim"], "num_key_value_heads": 2}
        values = {name: value for name, value in values.items() if name in given}
    values |= layers(given, own) | rope(given, values) | special_tokens(given) | own
    for name, kind in default.sub_configs.items():
        inner = given.get(name)
        if inner is None and name == "vision_config":  # Gemma 4 can be without
            inner = kind()
        if isinstance(inner, PreTrainedConfig):
            values[name] = {"model_type": inner.model_type, **small_values(inner)}
            values[name] |= own.get(name, {})
    return values


def layers(given: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Two layers, or four that take turns in what the family's layers differ in."""
    depth = next((name for name in LAYERS if isinstance(given.get(name), int)), None)
    per_layer = {
        name: [kind for at, kind in enumerate(kinds) if kind not in kinds[:at]]
        for name, kinds in given.items()
        if depth and isinstance(kinds, list) and len(kinds) == given[depth] > 1
    }
    mixed = any(len(kinds) > 1 for kinds in per_layer.values())
    count = own.get(depth, 4 if mixed else 2)
    # vLLM knows only how many of the first layers have a dense MLP.
    found = {
        name: [
            kinds[min(at, len(kinds) - 1) if name == "mlp_layer_types" else at % len(kinds)]
            for at in range(count)
        ]
        for name, kinds in per_layer.items()
    }
    return {**found, depth: count} if depth else {}


def rope(given: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Sections of rotary positions that fit the small heads."""
    asked = given.get("rope_parameters") or {}
    sections = asked.get("mrope_section")
    if not sections:
        return {}
    half = int(values["head_dim"] * asked.get("partial_rotary_factor", 1)) // 2
    others = [part * half // sum(sections) for part in sections[1:]]
    return {"rope_parameters": {**asked, "mrope_section": [half - sum(others), *others]}}


def special_tokens(given: dict[str, Any]) -> dict[str, int]:
    """Ids of images and the like: the last ones of the vocabulary."""
    names = [
        name
        for name, value in sorted(given.items())
        if name.endswith(("token_id", "token_index")) and isinstance(value, int) and value >= 0
    ]
    return {name: VOCAB - 1 - at for at, name in enumerate(names) if name not in SMALL}


def tiny_config(architecture: str) -> PreTrainedConfig:
    kind = CONFIG_MAPPING[model_types()[architecture]]
    return kind(**small_values(kind()), architectures=[architecture])


def tiny_family(path: Path, architecture: str, seed: int = 0) -> Path:
    """A model directory of this architecture in float32, with tiny_tokenizer; returns `path`."""
    torch.manual_seed(seed)
    config = tiny_config(architecture)
    tiny_tokenizer(path, TOKENS)
    causal = architecture in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    auto = AutoModelForCausalLM if causal else AutoModelForImageTextToText
    model = auto.from_config(config, dtype=torch.float32)
    if type(model).__name__ != architecture:
        raise ValueError(f"{architecture}: transformers made a {type(model).__name__}")
    randomise(model)
    model.save_pretrained(path)
    return path


@torch.no_grad()
def randomise(model: PreTrainedModel) -> None:
    """Weights at which caps, windows and sinks matter, whatever the family's own initialisation.

    Vectors keep their start (decays, norms) and are moved a little, so that none is left out
    without a difference.
    """
    for name, weight in model.named_parameters():
        if weight.ndim < 2:
            weight += 0.1 * torch.randn_like(weight)
        elif "conv" not in name and min(weight.shape[-2:]) > 1:
            weight.normal_(std=GAIN / HIDDEN**0.5)
