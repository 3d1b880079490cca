"""Attention of families whose own is not among Megatron's."""

from dataclasses import replace
from typing import Any

import torch
from megatron.core import parallel_state as ps
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_latent_attention import MLASelfAttention

from r3_adapter.errors import ReplayError


class PlainQueryAttention(MLASelfAttention):  # type: ignore[misc]
    """Multi-latent attention that norms keys and values alone, and projects queries at once.

    DeepSeek-V2-Lite and Moonlight have it.
    Megatron asks with one switch for the norms of both, and would norm the input of the queries' projection once more.

    Source: megatron/core/transformer/mla_qk_norm_config.py@0.19.2:QKNormConfigResolver.
    """

    def _resolve_qk_norm_config(self, submodules: Any) -> Any:
        plain = replace(submodules, q_layernorm=IdentityOp)
        return {**super()._resolve_qk_norm_config(plain), "linear_q_proj": submodules.linear_q_proj}


class _HeadsNorm(torch.nn.Module):
    """Root mean square norm over all heads together, of which a tensor-parallel rank has a part.

    OLMoE and MiniMax-M2 have it. Each rank has the whole weight and uses its heads' part: Megatron sums the gradients
    of weights of this name over tensor-parallel ranks, as is right for those of one head that all ranks use.

    Source: megatron/core/distributed/finalize_model_grads.py@0.19.2:_allreduce_non_tensor_model_parallel_grads.

    Raises:
        ReplayError: fewer heads than ranks.
    """

    def __init__(self, num_heads: int, head_dim: int, config: Any, eps: float) -> None:
        super().__init__()
        if num_heads % config.tensor_model_parallel_size:
            size = config.tensor_model_parallel_size
            raise ReplayError(f"{num_heads} heads that are normed together are not a multiple of tp ({size})")
        self.weight, self.eps = torch.nn.Parameter(torch.ones(num_heads * head_dim, dtype=config.params_dtype)), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Norm x, [s, b, heads of the rank, head_dim]."""
        size, rank = ps.get_tensor_model_parallel_world_size(), ps.get_tensor_model_parallel_rank()
        flat = x.flatten(2).float()
        total = flat.square().sum(-1, keepdim=True)
        if size > 1:
            # Summed forwards, and so is its gradient.
            total = copy_to_tensor_model_parallel_region(reduce_from_tensor_model_parallel_region(total))
        normed = (flat * torch.rsqrt(total / len(self.weight) + self.eps)).to(x.dtype)
        return torch.mul(normed, self.weight.chunk(size)[rank]).view_as(x)


class QueriesNorm(_HeadsNorm):
    """Of queries; takes the arguments of Megatron's norms, in which hidden_size is a head's width."""

    def __init__(self, hidden_size: int, config: Any, eps: float) -> None:
        super().__init__(config.num_attention_heads, hidden_size, config, eps)


class KeysNorm(_HeadsNorm):
    """Of keys; takes the arguments of Megatron's norms, in which hidden_size is a head's width."""

    def __init__(self, hidden_size: int, config: Any, eps: float) -> None:
        super().__init__(config.num_query_groups, hidden_size, config, eps)
