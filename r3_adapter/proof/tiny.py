"""A tiny Qwen3-MoE checkpoint with random weights, for the self-test and the quickstart."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from r3_adapter.errors import check_choice

DType = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class TinyModel:
    """The shape of the checkpoint. initializer_range 0.2 spreads the routers' logits as training does.

    expert_size: inner size of an expert; None for half of the hidden size.
    """

    num_layers: int = 8
    num_experts: int = 32
    topk: int = 4
    hidden_size: int = 64
    vocab_size: int = 512
    max_length: int = 2048
    initializer_range: float = 0.2
    expert_size: int | None = None


ENGINE: Mapping[str, Any] = {"max_total_tokens": 8192, "max_running_requests": 16}
"""Sizes of a rollout engine for such a model: without them SGLang takes a share of the machine's memory."""


def write_checkpoint(folder: Path, *, dtype: DType, seed: int, shape: TinyModel | None = None) -> None:
    """Write config.json and model.safetensors as Hugging Face has them; no tokenizer, prompts are token ids.

    Raises:
        R3Error: a dtype that is not known.
    """
    check_choice("dtype", dtype, DType)
    import torch
    from transformers import Qwen3MoeForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    config = qwen3_moe_config(shape or TinyModel(), dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3MoeForCausalLM(config).to(getattr(torch, dtype))  # type: ignore[no-untyped-call]
    model.save_pretrained(folder)


def qwen3_moe_config(shape: TinyModel, dtype: DType) -> Any:
    """Return what transformers needs to know of such a model."""
    from transformers import Qwen3MoeConfig

    return Qwen3MoeConfig(  # type: ignore[call-arg]
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=2 * shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=shape.hidden_size // 4,
        num_experts=shape.num_experts,
        num_experts_per_tok=shape.topk,
        moe_intermediate_size=shape.expert_size or shape.hidden_size // 2,
        decoder_sparse_step=1,
        # With one expert a token a renormalised weight is always 1, which Megatron refuses.
        norm_topk_prob=shape.topk > 1,
        max_position_embeddings=shape.max_length,
        initializer_range=shape.initializer_range,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        dtype=dtype,
    )
