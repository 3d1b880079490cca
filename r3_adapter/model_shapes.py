"""Shapes of models for benchmarks, as a config.json of Hugging Face's Qwen3-MoE says them; the weights are random."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

_COMMON: Mapping[str, Any] = {
    "model_type": "qwen3_moe",
    "attention_bias": False,
    "use_sliding_window": False,
    "hidden_act": "silu",
    "mlp_only_layers": [],
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000},
    "max_position_embeddings": 65_536,
    "tie_word_embeddings": False,
}

SHAPES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        # A layer of Qwen/Qwen3-30B-A3B; the vocabulary is not what is measured.
        "qwen3-30b-a3b": {
            **_COMMON,
            "dtype": "bfloat16",
            "hidden_size": 2048,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "intermediate_size": 6144,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "vocab_size": 4096,
        },
        "tiny": {
            **_COMMON,
            "dtype": "float32",
            "hidden_size": 64,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "intermediate_size": 128,
            "num_experts": 16,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 32,
            "vocab_size": 128,
        },
    }
)
"""By name."""

PARTS = ("router", "layer", "step")
"""What is measured of a shape."""
