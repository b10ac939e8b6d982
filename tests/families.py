"""Configurations of small models, one for every family that is converted in the tests."""

from pathlib import Path

import tiny_model

EXPERTS = {"num_experts_per_tok": 2}
FAMILIES = {
    "Llama": {"attention_bias": True, "mlp_bias": True},
    "Mistral": {},
    "Qwen2": {},  # biases too
    "Qwen3": {"head_dim": 32, "tie_word_embeddings": False},
    "Gemma2": {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 32},
    "Gemma3Text": {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 32, "num_hidden_layers": 6},
    "SmolLM3": {"byte_level": True, "pad_token_id": 0, "num_hidden_layers": 4},  # the fourth has no positions
    "Phi3": {"tie_word_embeddings": False, "pad_token_id": 0},  # fused qkv
    "Olmo": {"byte_level": True, "clip_qkv": 4.0},
    "Olmo2": {"byte_level": True, "tie_word_embeddings": False},
    "Granite": {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    "Mixtral": {"num_local_experts": 4, **EXPERTS},
    "Qwen3Moe": {
        "byte_level": True,
        "num_experts": 8,
        "moe_intermediate_size": 64,
        "head_dim": 32,
        "norm_topk_prob": True,
        **EXPERTS,
    },
    "GraniteMoe": {"num_local_experts": 4, **EXPERTS},  # gate and up in one tensor
}


def make(folder: Path, family: str) -> Path:
    """Weights are large enough for logits and attention that are not all but flat."""
    return tiny_model.make(folder, family, vectors=0.1, initializer_range=0.06, **FAMILIES[family])
