"""Tiny models of the families that are trained: what transformers' configurations are told of each."""

from collections.abc import Mapping
from typing import Any

DEFAULT = "qwen3_moe"
"""The family whose tiny model the quickstart has too."""

COMMON: Mapping[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GQA: Mapping[str, Any] = {"num_key_value_heads": 2, "head_dim": 16}
_MLA: Mapping[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
_EXPERTS: Mapping[str, Any] = {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 32}
_SHARED: Mapping[str, Any] = {
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
}
_DELTA_NETS: Mapping[str, Any] = {
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "shared_expert_intermediate_size": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}

FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "qwen2_moe": {
        **_EXPERTS,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "shared_expert_intermediate_size": 32,
        "norm_topk_prob": False,
    },
    "olmoe": {
        "num_hidden_layers": 2,
        "num_key_value_heads": 4,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "intermediate_size": 32,
        "norm_topk_prob": False,
    },
    "mixtral": {
        **_GQA,
        "num_hidden_layers": 2,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "sliding_window": None,
    },
    # A dense first layer, a shared expert, sigmoid scores with a bias, half of the head rotated.
    "glm4_moe": {**_GQA, **_SHARED, "num_hidden_layers": 3, "n_group": 1, "topk_group": 1, "use_qk_norm": True},
    # Softmax scores that are not renormalised; the published Lite has no groups.
    "deepseek_v2": {
        **_MLA,
        **_SHARED,
        "num_hidden_layers": 3,
        "n_shared_experts": 2,
        "norm_topk_prob": False,
        "topk_method": "greedy",
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.0,
    },
    # As Moonlight: no compressed queries. The groups are DeepSeek-V3's.
    "deepseek_v3": {**_MLA, **_SHARED, "num_hidden_layers": 3, "n_group": 4, "topk_group": 2},
    # Biases everywhere, attention sinks, a window in every other layer.
    "gpt_oss": {
        **_GQA,
        "num_hidden_layers": 2,
        # Not half of the hidden size: an expert's matrix would be square, and which way round it lies unknown.
        "intermediate_size": 48,
        "num_local_experts": 16,
        "num_experts_per_tok": 4,
        "sliding_window": 32,
        "max_position_embeddings": 131072,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    # Mamba, attention and experts in layers of their own; experts without gates, and narrower than the model.
    "nemotron_h": {
        **_GQA,
        "layers_block_type": ["mamba", "moe", "attention", "moe"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 16,
        "n_groups": 2,
        "n_routed_experts": 16,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 32,
        "moe_shared_expert_intermediate_size": 32,
        "moe_latent_size": 32,
        "n_group": 1,
        "topk_group": 1,
    },
    # Gated delta nets; every fourth layer of the published ones has attention.
    "qwen3_next": {**_GQA, **_EXPERTS, **_DELTA_NETS, "norm_topk_prob": True},
    "qwen3_5_moe_text": {**_GQA, **_EXPERTS, **_DELTA_NETS},
    # Norms of queries and keys over all heads together, sigmoid scores with a bias.
    "minimax_m2": {
        **_GQA,
        "num_hidden_layers": 2,
        "num_local_experts": 16,
        "num_experts_per_tok": 4,
        "intermediate_size": 32,
    },
    # GLM-4.7-Flash: latent attention with compressed queries.
    "glm4_moe_lite": {
        **_MLA,
        **_SHARED,
        "num_hidden_layers": 3,
        "q_lora_rank": 32,
        "n_group": 1,
        "topk_group": 1,
        # transformers norms what is compressed with this, whatever a configuration says.
        "rms_norm_eps": 1e-6,
    },
    # GLM-5: sparse attention chosen by an indexer; of all tokens here, which are fewer than it chooses.
    "glm_moe_dsa": {
        **_MLA,
        **_SHARED,
        "num_hidden_layers": 3,
        "q_lora_rank": 32,
        "index_head_dim": 16,
        "index_n_heads": 4,
        "indexer_rope_interleave": True,
        "n_group": 1,
        "topk_group": 1,
    },
    # Experts beside a dense network in each layer.
    "gemma4_text": {
        **_GQA,
        "num_hidden_layers": 2,
        "enable_moe_block": True,
        "num_experts": 16,
        "top_k_experts": 4,
        "moe_intermediate_size": 32,
        "global_head_dim": 16,
        "hidden_size_per_layer_input": 0,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}
"""What transformers' configurations are told, by model_type; DEFAULT is r3_adapter.proof.tiny's."""
NOT_ON_CPU: Mapping[str, str] = {
    "gemma4_text": "Megatron's layers of it need TransformerEngine",
    "glm_moe_dsa": "Megatron's sparse attention needs TransformerEngine",
}
"""Families that Megatron trains with a GPU only, and why."""
NOT_BUILT: Mapping[str, str] = {"kimi_k2": "transformers has no configuration of it; its layers are deepseek_v3's"}
"""Families that people train of which no model is built here, and why."""
KERNELS: Mapping[str, tuple[str, ...]] = {
    "nemotron_h": ("transformer_engine", "mamba_ssm", "causal_conv1d"),
    "qwen3_next": ("transformer_engine", "fla"),
    "qwen3_5_moe_text": ("transformer_engine", "fla"),
}
"""Families of whose layers other packages have kernels, which Megatron wants with a GPU; plain torch serves without."""
ENGINE_ON_CPU = (DEFAULT, "olmoe", "mixtral", "glm4_moe")
"""Families whose layers SGLang computes without a GPU; with one it computes all of them."""
