"""Tiny checkpoints of families of models, by transformers' own classes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from r3_adapter.proof.hf_rollout import load

COMMON: Mapping[str, Any] = dict(
    vocab_size=128,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    intermediate_size=48,
    moe_intermediate_size=16,
    num_experts=4,
    num_experts_per_tok=2,
    max_position_embeddings=256,
    tie_word_embeddings=False,
    initializer_range=0.2,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=2,
    dtype="float32",
)
_DEEPSEEK: dict[str, Any] = dict(
    num_key_value_heads=4,
    n_routed_experts=4,
    n_shared_experts=2,
    first_k_dense_replace=1,
    n_group=2,
    topk_group=1,
    kv_lora_rank=16,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    head_dim=8,
    v_head_dim=12,
    rope_parameters={
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
)
FAMILIES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "qwen3_moe": ("Qwen3Moe", dict(mlp_only_layers=[0], norm_topk_prob=True)),
    "qwen2_moe": ("Qwen2Moe", dict(mlp_only_layers=[0], shared_expert_intermediate_size=24, head_dim=8)),
    "olmoe": ("Olmoe", dict(num_key_value_heads=4, intermediate_size=16, head_dim=8)),
    "mixtral": ("Mixtral", dict(num_local_experts=4, tie_word_embeddings=True)),
    "glm4_moe": (
        "Glm4Moe",
        dict(n_routed_experts=4, n_shared_experts=1, first_k_dense_replace=1, use_qk_norm=True, norm_topk_prob=True),
    ),
    "deepseek_v3": ("DeepseekV3", dict(_DEEPSEEK, q_lora_rank=16, num_nextn_predict_layers=0)),
    "deepseek_v2": (
        "DeepseekV2",
        # transformers' own leaves out the scale that YaRN has in DeepSeek's attention.
        {
            **_DEEPSEEK,
            "rope_parameters": None,
            "q_lora_rank": None,
            "n_group": 1,
            "topk_method": "greedy",
            "routed_scaling_factor": 2.0,
        },
    ),
    "qwen3_next": (
        "Qwen3Next",
        dict(
            layer_types=["linear_attention", "full_attention"],
            shared_expert_intermediate_size=24,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
        ),
    ),
    "nemotron_h": (
        "NemotronH",
        dict(
            layers_block_type=["mamba", "moe", "attention", "moe"],
            mamba_num_heads=4,
            mamba_head_dim=8,
            ssm_state_size=8,
            n_groups=2,
            n_routed_experts=4,
            moe_latent_size=16,
            moe_shared_expert_intermediate_size=24,
        ),
    ),
    "minimax_m2": ("MiniMaxM2", dict(num_local_experts=4, intermediate_size=16)),
    "gpt_oss": ("GptOss", dict(num_local_experts=4, intermediate_size=24, sliding_window=8)),
}
"""By name: the beginning of transformers' classes, and what differs from what all have in common."""


def write(name: str, folder: Path, **changes: Any) -> None:
    """Write a checkpoint of a family; biases and the like, which transformers begins with zeros, are random too."""
    kind, own = FAMILIES[name]
    fields = {**COMMON, **own, **changes}
    config = getattr(transformers, kind + "Config")(**fields)
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(5)
    model = getattr(transformers, kind + "ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if key.endswith(("bias", "norm.weight", "sinks")) or "layernorm" in key:
                tensor.add_(torch.randn_like(tensor), alpha=0.1)
    model.save_pretrained(folder)


def add(folder: Path, name: str, tensor: torch.Tensor) -> None:
    """Add a tensor to a checkpoint of one file."""
    path = folder / "model.safetensors"
    save_file({**load_file(path), name: tensor}, path, {"format": "pt"})


def drop(folder: Path, name: str) -> None:
    """Take a tensor from a checkpoint of one file."""
    path = folder / "model.safetensors"
    save_file({key: tensor for key, tensor in load_file(path).items() if key != name}, path, {"format": "pt"})


def change(folder: Path, **fields: Any) -> None:
    """Change fields of a checkpoint's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}), encoding="utf-8")


def logits(folder: Path, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return Hugging Face's logits of tokens, [b, s], and of their weighted sum the gradient of a norm of queries."""
    model = load(folder)
    found: torch.Tensor = model(tokens).logits
    norms = [weight for name, weight in model.named_parameters() if name.endswith("q_norm.weight")]
    if norms:
        (found * weights_like(found)).sum().backward()
    return found.detach(), norms[-1].grad if norms else None


def weights_like(logits: torch.Tensor) -> torch.Tensor:
    """Return what a loss weighs logits with."""
    return torch.rand(logits.shape, generator=torch.Generator().manual_seed(3)) / logits.numel()
