"""Tiny models of many architectures: random, but with nothing at a value that would hide a mistake.

Widths differ wherever the architecture lets them, so that a transposed or misplaced matrix does not fit;
every inner width is a multiple of 32, so that groups of 32 do.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY = 96
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

# The names that most configs share. Heads are wider than hidden / heads: q_proj is not square.
_COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 64,
} | _SPECIAL  # fmt: skip
_GPT2_NAMES = {"vocab_size": VOCABULARY, "n_layer": 2, "n_head": 4} | _SPECIAL

TINY: dict[str, dict[str, Any]] = {
    "llama": _COMMON,
    "qwen3": _COMMON | {"tie_word_embeddings": True},
    "gemma3_text": _COMMON
    | {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": _COMMON | {"head_dim": 16},
    "opt": _COMMON | {"ffn_dim": 160, "word_embed_proj_dim": 32},
    "gpt2": _GPT2_NAMES | {"n_embd": 64, "n_inner": 96, "n_positions": 64},
    "gpt_neox": _COMMON,
    "falcon": {key: value for key, value in _COMMON.items() if key != "head_dim"}
    | {"new_decoder_architecture": False, "multi_query": True, "ffn_hidden_size": 96},
    "bloom": _GPT2_NAMES | {"hidden_size": 64},
    "mixtral": _COMMON | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": _COMMON | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "deepseek_v3": _COMMON
    | {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "n_shared_experts": 1,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 32,
        "v_head_dim": 32,
        "num_key_value_heads": 4,
        "num_mtp_layers": 0,
    },
    "gpt_oss": _COMMON | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4},
}

_SQUARE = {key: value for key, value in _COMMON.items() if key != "head_dim"}  # heads: hidden / heads
_CHOICE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LATENT = {
    "kv_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32,
    "num_key_value_heads": 4,
}  # fmt: skip

# More architectures, for what asks every block what it is made of.
MORE: dict[str, dict[str, Any]] = {
    "mistral": _COMMON,
    "qwen2": _SQUARE,
    "gemma": _COMMON,
    "gemma2": _COMMON | {"sliding_window": 4},
    "phi": _SQUARE,
    "stablelm": _SQUARE,
    "starcoder2": _SQUARE,
    "olmo": _SQUARE | {"num_key_value_heads": 4},
    "olmo2": _SQUARE | {"num_key_value_heads": 4},
    "cohere": _COMMON,
    "cohere2": _COMMON | {"sliding_window": 4},
    "glm": _COMMON,
    "glm4": _COMMON,
    "granite": _SQUARE,
    "smollm3": _SQUARE,
    "gptj": _GPT2_NAMES | {"n_embd": 64, "n_inner": 96, "n_positions": 64, "rotary_dim": 8},
    "mpt": {"vocab_size": VOCABULARY, "d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}
    | _SPECIAL,
    "deepseek_v2": _COMMON
    | _ROUTED
    | _LATENT
    | {"q_lora_rank": None, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
    | {"first_k_dense_replace": 1},
    "qwen2_moe": _SQUARE | _CHOICE | {"shared_expert_intermediate_size": 96},
    "olmoe": _SQUARE | {"num_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": _SQUARE | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_next": _COMMON
    | _CHOICE
    | {"shared_expert_intermediate_size": 96, "layer_types": ["linear_attention", "full_attention"]}
    | {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    | {"linear_key_head_dim": 16, "linear_value_head_dim": 32},
    "glm4_moe": _COMMON | _ROUTED | {"first_k_dense_replace": 1, "n_shared_experts": 1},
    # Mamba and attention, a mixture and none, in every combination but one.
    "jamba": _COMMON
    | {"num_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 3, "mamba_dt_rank": 32}
    | {"attn_layer_period": 3, "attn_layer_offset": 2, "mamba_d_state": 32},
}
ALL = TINY | MORE


def tiny_model(model_type: str, **changes: Any) -> nn.Module:
    """A random model in bfloat16; `changes` go into its config."""
    config = AutoConfig.for_model(model_type, **ALL[model_type] | changes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(0)
    tensors = [*model.parameters(), *(b for n, b in model.named_buffers() if n.endswith("_bias"))]
    with torch.no_grad():
        for tensor in tensors:
            # Matrices as after training, around 1 / sqrt(columns); norms leave 1, and biases 0.
            size = 0.2 if tensor.ndim < 2 else tensor.shape[-1] ** -0.5
            noise = torch.randn(tensor.shape, generator=generator) * size
            tensor.copy_(noise + tensor if tensor.ndim < 2 else noise)
    for parameter in model.parameters():  # not the buffers: rotary frequencies are float32 everywhere
        parameter.data = parameter.data.to(torch.bfloat16)
    return model


def tiny_checkpoint(
    folder: Path, model_type: str = "llama", max_shard_size: str = "1GB", **changes: Any
) -> Path:
    """`tiny_model` saved by transformers."""
    tiny_model(model_type, **changes).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder
