"""Make a configuration of Hugging Face smaller: fewer layers, and narrow ones; what routers choose from stays."""

from collections.abc import Mapping
from typing import Any

from r3_adapter.errors import R3Error, check_whole

_WIDTHS: Mapping[str, int] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "ffn_hidden_size": 128,
    "expert_ffn_hidden_size": 32,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "moe_latent_size": 32,
    "head_dim": 16,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "mamba_head_dim": 16,
    "ssm_state_size": 16,
    "vocab_size": 512,
    "max_position_embeddings": 1024,
}
"""Largest width of a small model. A field that a family does not have, or has as None, stays out."""
_HEADS: Mapping[str, int] = {
    "num_attention_heads": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "mamba_num_heads": 4,
    "n_groups": 2,
}
_BY_LAYER = ("layers_block_type", "hybrid_override_pattern")
"""Fields with an entry for each layer, which are what families with hybrid layers have for a number of layers."""


def small(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration with narrow layers and few heads, a small vocabulary and wide-spread random weights.

    Layers, experts, groups of experts and experts a token are as they were.
    """
    without = {"quantization_config", "auto_map"}
    if "qk_rope_head_dim" in config:
        # Families with latent attention derive them.
        without |= {"head_dim", "qk_head_dim"}
    found = {name: value for name, value in config.items() if name not in without}
    for name, most in {**_WIDTHS, **_HEADS}.items():
        if isinstance(value := found.get(name), int):
            found[name] = min(value, most)
    if (heads := config.get("num_attention_heads")) and (groups := config.get("num_key_value_heads")):
        found["num_key_value_heads"] = found["num_attention_heads"] if groups == heads else min(groups, 2)
    for name, value in found.items():
        # Token ids of the published vocabulary; some families have a list of them.
        if name.endswith("_token_id") and value is not None and name not in ("bos_token_id", "pad_token_id"):
            found[name] = 2
    found |= {name: at for name, at in (("bos_token_id", 1), ("pad_token_id", 0)) if found.get(name) is not None}
    return {**found, "initializer_range": 0.2}


def cut(config: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
    """Return a configuration of the first layers; what it lists by layer is cut too.

    Raises:
        R3Error: More layers than it has.
    """
    check_whole("num_layers", num_layers, 1)
    total = count_layers(config)
    if num_layers > total:
        raise R3Error(f"num_layers ({num_layers}) > {total} of {config.get('model_type')}")
    found = dict(config)
    for name, value in config.items():
        listed = isinstance(value, list) and not name.endswith("_token_id")
        if (listed or name in _BY_LAYER) and value and len(value) == total:
            found[name] = value[:num_layers]
    if "num_hidden_layers" in config:
        found["num_hidden_layers"] = num_layers
    # Layers of multi-token prediction come behind the last one: they are no part of what is proved.
    found |= dict.fromkeys(config.keys() & {"num_nextn_predict_layers", "mtp_num_hidden_layers"}, 0)
    return found


def count_layers(config: Mapping[str, Any]) -> int:
    """Return how many layers a configuration says it has.

    Raises:
        R3Error: It does not say.
    """
    listed = [len(config[name]) for name in _BY_LAYER if config.get(name)]
    total = listed[0] if listed else config.get("num_hidden_layers")
    if not isinstance(total, int):
        raise R3Error(f"num_hidden_layers ({total!r}) of {config.get('model_type')!r} is no number of layers")
    return total
