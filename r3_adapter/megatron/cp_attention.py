"""Context-parallel attention for machines without TransformerEngine, whose attention Megatron has for it otherwise.

Each rank has the chunks cp_rank and 2 * cp - 1 - cp_rank of every sequence. Keys and values are gathered (their
gradients are reduced and scattered back), put in order, and masked by position.
"""

import copy
from typing import Any

import torch
from megatron.core import parallel_state as ps
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.dot_product_attention import DotProductAttention


class ContextParallelAttention(DotProductAttention):  # type: ignore[misc]
    """Megatron's own local attention over all keys, for this rank's queries; padded batches only."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        alone = copy.copy(config)
        alone.context_parallel_size = 1
        super().__init__(alone, *args, **kwargs)

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Attend; query, key, value: [s / cp, b, heads, head_dim]. The mask is causal, whatever is given."""
        group = ps.get_context_parallel_group()
        cp_size, cp_rank = group.size(), group.rank()
        chunk = len(query) // 2
        positions = torch.arange(2 * cp_size * chunk, device=query.device)
        chunks = positions.view(2 * cp_size, chunk)
        own = torch.cat([chunks[cp_rank], chunks[2 * cp_size - 1 - cp_rank]])
        mask = (positions[None, :] > own[:, None]).view(1, 1, len(own), len(positions))
        out: torch.Tensor = super().forward(query, _in_order(key, group), _in_order(value, group), mask, **kwargs)
        return out


def _in_order(part: torch.Tensor, group: Any) -> torch.Tensor:
    """Gather [s / cp, ...] from all ranks to [s, ...], in the order of positions."""
    size = group.size()
    chunks = gather_from_sequence_parallel_region(part.contiguous(), group=group).chunk(2 * size)
    first = [chunks[2 * rank] for rank in range(size)]
    second = [chunks[2 * rank + 1] for rank in reversed(range(size))]
    return torch.cat(first + second)
