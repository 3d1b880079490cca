"""Micro-batches of samples as a rank's model chunks get them: padded [b, s] or packed [1, t].

The last token of a sample is only a label, as in Megatron's own loops. It was never fed to the rollout's model either,
so it has no route.

b: samples; s: sequence length; t: tokens of a packed micro-batch. A context-parallel rank has a share of s or t.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from r3_adapter.errors import LayoutError, check_choice
from r3_adapter.layout import CpCut, Packing, ParallelLayout, QkvFormat, local_segments
from r3_adapter.megatron.inputs import own_cut
from r3_adapter.rollout import Sample
from r3_adapter.trace import RoutingTrace


@dataclass(frozen=True)
class MicroBatch:
    """The part of a micro-batch that one context-parallel rank has.

    traces: of the tokens that are fed, which are all but the last of each sample.
    tokens, labels, positions: [b, s / cp] or [1, t / cp] int64; labels are each position's next token.
    loss_mask: the same shape, float32; 1 where the label is a token that the policy sampled.
    temperatures: the same shape, float32; of the distribution that each token's label is scored in. None: all are 1.
    places: the same shape, two numbers in the last dimension: sample (of the whole batch) and position of each token.
    """

    traces: list[RoutingTrace]
    packing: Packing
    tokens: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    loss_mask: torch.Tensor
    temperatures: torch.Tensor | None
    places: np.ndarray[Any, Any]

    def packed_seq_params(self, *, with_padding: bool = False) -> Any:
        """Return what GPTModel.forward wants of packed sequences; None for a padded batch.

        with_padding: let a sample's padding be tokens of it, behind all others. Multi-token prediction needs that: it
            moves tokens inside of these bounds, and takes them for the tokens of the batch.
        """
        if self.packing.qkv_format == "sbhd":
            return None
        from megatron.core.packed_seq_params import PackedSeqParams

        padded = _cumulated(self.packing.padded_lengths, self.tokens.device)
        lengths = padded if with_padding else _cumulated([each.num_tokens for each in self.traces], padded.device)
        longest = max(self.packing.padded_lengths)
        # A mixer of Mamba starts anew with each sequence only if it is told how many tokens there are.
        total = {"total_tokens": sum(self.packing.padded_lengths)} if hasattr(PackedSeqParams, "total_tokens") else {}
        return PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=lengths,
            cu_seqlens_kv=lengths,
            cu_seqlens_q_padded=padded,
            cu_seqlens_kv_padded=padded,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            **total,
        )


def micro_batches(
    samples: Sequence[Sample],
    layout: ParallelLayout,
    rank: int,
    *,
    size: int,
    qkv_format: QkvFormat,
    device: torch.device,
    cp_cut: CpCut = "zigzag",
) -> list[MicroBatch]:
    """Share samples out over the data-parallel ranks, and build this rank's micro-batches of `size` samples each.

    Padded batches all have one sequence length; packed ones have as many tokens as their samples need.

    Raises:
        LayoutError: samples that cannot be shared out evenly, or a format or cut that is not known.
    """
    check_choice("qkv_format", qkv_format, QkvFormat, LayoutError)
    coords = layout.coords(rank)
    if len(samples) % (size * layout.dp):
        raise LayoutError(f"{len(samples)} samples are not a multiple of micro-batch ({size}) x dp ({layout.dp})")
    longest = max((padded_length_of(sample.trace.num_tokens, layout) for sample in samples), default=0)
    batches = []
    for start in range(coords.dp_rank * size, len(samples), size * layout.dp):
        chosen = range(start, start + size)
        if qkv_format == "thd":
            packing = _packed([samples[i] for i in chosen], layout, cp_cut)
        else:
            packing = Packing.padded(size, longest, cp_cut=cp_cut)
        places = places_as_cut(packing, layout.cp, coords.cp_rank)
        batches.append(_build(samples, chosen, packing, places, device))
    return batches


def places_as_cut(packing: Packing, cp: int, cp_rank: int) -> npt.NDArray[np.int64]:
    """Return [b, s / cp, 2] or [1, t / cp, 2] sample and position of each token of a context-parallel rank.

    The tokens themselves are cut, as Megatron cuts a batch. The segments of `layout`, by which routes are cut, have no
    part in it, so a proof that uses both shows when they are wrong.
    """
    longest = max(1, *packing.padded_lengths)
    tokens = [
        np.arange(padded_length) + sample * longest for sample, padded_length in enumerate(packing.padded_lengths)
    ]
    return np.stack(np.divmod(own_cut(tokens, packing, cp)(cp_rank), longest), axis=-1)


def packed_micro_batch(
    samples: Sequence[Sample],
    layout: ParallelLayout,
    rank: int,
    device: torch.device,
    *,
    seq_length: int | None = None,
    cp_cut: CpCut = "zigzag",
) -> MicroBatch:
    """Build a packed micro-batch of all the samples, as the rank's context-parallel share of it.

    seq_length: of the whole batch; what the samples leave is padding of the last one. Default: what they need.

    Raises:
        LayoutError: samples that need more.
    """
    packing = _packed(samples, layout, cp_cut, seq_length)
    places = packed_places(packing, layout.cp, layout.coords(rank).cp_rank)
    return _build(samples, range(len(samples)), packing, places, device)


def padded_length_of(num_tokens: int, layout: ParallelLayout) -> int:
    """Return what a sample takes of a packed micro-batch; its last token is not fed."""
    return _round_up(num_tokens - 1, 2 * layout.tp * layout.cp)


def _packed(samples: Sequence[Sample], layout: ParallelLayout, cp_cut: CpCut, seq_length: int | None = None) -> Packing:
    """Return the packing of samples whose last tokens are not fed; only a zigzag wants padding in each of them."""
    lengths = [sample.trace.num_tokens for sample in samples]
    if cp_cut == "zigzag":
        padded_lengths = [padded_length_of(length, layout) for length in lengths]
    else:
        padded_lengths = [length - 1 for length in lengths]
        padded_lengths[-1] += -sum(padded_lengths) % (layout.tp * layout.cp)
    if seq_length is not None:
        if (needed := sum(padded_lengths)) > seq_length:
            raise LayoutError(f"{len(samples)} samples, padded: {needed} tokens > sequence length ({seq_length})")
        padded_lengths[-1] += seq_length - needed
    return Packing.packed(np.cumsum([0, *padded_lengths]), cp_cut=cp_cut)


def packed_places(packing: Packing, cp: int, cp_rank: int) -> npt.NDArray[np.int64]:
    """Return [1, t / cp, 2] sample and position of each token of a packed micro-batch on a context-parallel rank."""
    alone = ParallelLayout(cp=cp)
    sample, start, length, row, _ = local_segments(packing, alone, alone.coords(cp_rank)).T
    step = np.arange(length.sum()) - np.repeat(row, length)
    return np.stack([np.repeat(sample, length), np.repeat(start, length) + step], axis=-1)[None]


def padded_micro_batch(
    samples: Sequence[Sample], seq_length: int, layout: ParallelLayout, rank: int, device: torch.device
) -> MicroBatch:
    """Build a micro-batch of all the samples, padded to a length, as the rank's context-parallel share of it.

    Raises:
        LayoutError: a sample that is longer.
    """
    for index, sample in enumerate(samples):
        if sample.trace.num_tokens - 1 > seq_length:
            raise LayoutError(f"sample {index}: {sample.trace.num_tokens} tokens > sequence length ({seq_length}) + 1")
    packing = Packing.padded(len(samples), seq_length)
    # The same places, sample by sample.
    in_a_row = Packing.packed(range(0, (len(samples) + 1) * seq_length, seq_length))
    places = packed_places(in_a_row, layout.cp, layout.coords(rank).cp_rank).reshape(len(samples), -1, 2)
    return _build(samples, range(len(samples)), packing, places, device)


def _build(
    samples: Sequence[Sample],
    chosen: range,
    packing: Packing,
    places: npt.NDArray[np.int64],
    device: torch.device,
) -> MicroBatch:
    mine = [samples[i] for i in chosen]
    # All samples one after the other, each with one more than its padded length, for the last position's label.
    starts = np.cumsum([0, *(padded_length + 1 for padded_length in packing.padded_lengths)])
    ids, trained = np.zeros(starts[-1], np.int64), np.zeros(starts[-1], np.bool_)
    for start, sample in zip(starts[:-1], mine, strict=True):
        stop = start + sample.trace.num_tokens
        ids[start:stop] = sample.trace.token_ids
        trained[start + sample.num_prompt_tokens : stop] = sample.sampled
    at = starts[places[..., 0]] + places[..., 1]
    fed = places[..., 1] < np.array([sample.trace.num_tokens - 1 for sample in mine])[places[..., 0]]
    temperatures = np.array([sample.temperature for sample in mine], np.float32)
    tempered = torch.from_numpy(temperatures[places[..., 0]]).to(device) if np.any(temperatures != 1) else None
    places = places + np.array([chosen.start, 0])
    return MicroBatch(
        traces=[sample.trace.rows(0, sample.trace.num_tokens - 1) for sample in mine],
        packing=packing,
        tokens=torch.from_numpy(np.where(fed, ids[at], 0)).to(device),
        labels=torch.from_numpy(ids[at + 1]).to(device),
        positions=torch.from_numpy(places[..., 1].copy()).to(device),
        loss_mask=torch.from_numpy(trained[at + 1].astype(np.float32)).to(device),
        temperatures=tempered,
        places=places,
    )


def _cumulated(lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step
