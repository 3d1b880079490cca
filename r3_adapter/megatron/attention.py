"""Attention for context parallelism and packed sequences on machines without TransformerEngine, which has both.

Keys and values are gathered from the context-parallel ranks (their gradients are reduced and scattered back) and masked
by sequence and position; then Megatron's own local attention does the rest.

t: tokens of a rank, s / cp in a padded batch.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import parallel_state as ps
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.dot_product_attention import DotProductAttention

from r3_adapter.layout import CpCut


class LocalAttention(DotProductAttention):  # type: ignore[misc]
    """Causal attention of this rank's queries over the keys of all context-parallel ranks."""

    cp_cut: CpCut = "zigzag"

    def __init__(
        self, config: Any, *args: Any, k_channels: int | None = None, v_channels: int | None = None, **kwargs: Any
    ) -> None:
        """Be Megatron's own; k_channels, v_channels: widths of heads where they differ, which the tensors say too."""
        alone = copy.copy(config)
        alone.context_parallel_size = 1
        super().__init__(alone, *args, **kwargs)
        # Megatron's own mask of a window takes the keys for one sequence in order; ours is made of places instead.
        self.window, self.scale_mask_softmax.window_size = self.scale_mask_softmax.window_size, None

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any = None,
        packed_seq_params: Any = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Attend; query, key, value: [t, b, heads, head_dim], without b if packed. attention_mask is ignored."""
        group = ps.get_context_parallel_group()
        if packed_seq_params is None:
            padded_lengths = [len(query) * group.size()]
        else:
            # Without padding between the sequences Megatron leaves the padded bounds out.
            padded = packed_seq_params.cu_seqlens_q_padded
            padded_lengths = (packed_seq_params.cu_seqlens_q if padded is None else padded).diff().tolist()
            query, key, value = (tensor.unsqueeze(1) for tensor in (query, key, value))
        if packed_seq_params is not None and group.size() == 1 and len(padded_lengths) > 1:
            return self._by_sequence(query, key, value, padded_lengths, **kwargs)
        places = [
            _places(padded_lengths, group.size(), rank, self.cp_cut).to(query.device) for rank in range(group.size())
        ]
        query, key = self.positioned(query, key, places[group.rank()][:, 1], max(padded_lengths))
        own, everybody = places[group.rank()][:, None], torch.cat(places)[None]
        masked = (own[..., 0] != everybody[..., 0]) | (own[..., 1] < everybody[..., 1])
        if self.window is not None:
            masked |= own[..., 1] - everybody[..., 1] > self.window[0]
        key, value = (gather_from_sequence_parallel_region(part.contiguous(), group=group) for part in (key, value))
        self.hidden_size_per_partition = self.num_attention_heads_per_partition * value.shape[-1]
        out: torch.Tensor = super().forward(query, key, value, masked[None, None], **kwargs)
        return out if packed_seq_params is None else out.squeeze(1)

    def _by_sequence(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, padded_lengths: Sequence[int], **kwargs: Any
    ) -> torch.Tensor:
        """Attend in each packed sequence by itself: a mask over all of them would cost the square of their sum.

        query, key, value: [t, 1, heads, head_dim]; returns [t, heads * head_dim].
        """
        longest = max(padded_lengths)
        step, lengths = torch.arange(longest)[:, None], torch.tensor(padded_lengths)
        within = step < lengths
        # Places behind a sequence's end hold any token: no query of the sequence sees them.
        at = (torch.where(within, step, 0) + lengths.cumsum(0) - lengths).to(query.device)
        query, key, value = (part[at, 0] for part in (query, key, value))
        query, key = self.positioned(query, key, step[:, 0].to(query.device), longest)
        masked = step < step.T
        if self.window is not None:
            masked |= step - step.T > self.window[0]
        self.hidden_size_per_partition = self.num_attention_heads_per_partition * value.shape[-1]
        out: torch.Tensor = super().forward(query, key, value, masked[None, None].to(query.device), **kwargs)
        return out.transpose(0, 1)[within.T.to(out.device)]

    def positioned(
        self, query: torch.Tensor, key: torch.Tensor, positions: torch.Tensor, longest: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return queries and keys as they are, rotated already. positions: [t], below `longest`."""
        return query, key


def contiguous_attention(rotary_base: float) -> type[LocalAttention]:
    """Return the attention for a contiguous cut, which turns queries and keys itself, by their own positions.

    The model must have no position embedding: Megatron cuts its rotary one in zigzag.
    """

    class ContiguousAttention(LocalAttention):
        cp_cut = "contiguous"

        def positioned(
            self, query: torch.Tensor, key: torch.Tensor, positions: torch.Tensor, longest: int
        ) -> tuple[torch.Tensor, torch.Tensor]:
            """Return queries and keys turned by the angles of their positions."""
            rotary = RotaryEmbedding(query.shape[-1], rotary_percent=1.0, rotary_base=rotary_base)
            angles = rotary.get_emb(longest)[positions]
            return _apply_rotary_pos_emb_bshd(query, angles), _apply_rotary_pos_emb_bshd(key, angles)

    return ContiguousAttention


def _places(padded_lengths: Sequence[int], cp_size: int, cp_rank: int, cp_cut: CpCut) -> torch.Tensor:
    """Return [t, 2] the sequence and position of each token of a rank: two chunks of each sequence, one from each end.

    Of a contiguous cut, an interval of all sequences one after the other.

    Source: megatron/core/utils.py@0.16.1:get_batch_on_this_cp_rank
    """
    parts = []
    for sequence, padded_length in enumerate(padded_lengths):
        positions = torch.arange(padded_length)
        if cp_size > 1 and cp_cut == "zigzag":
            chunks = positions.chunk(2 * cp_size)
            positions = torch.cat([chunks[cp_rank], chunks[2 * cp_size - 1 - cp_rank]])
        parts.append(torch.stack([torch.full_like(positions, sequence), positions], dim=1))
    places = torch.cat(parts)
    return places.chunk(cp_size)[cp_rank] if cp_cut == "contiguous" else places
