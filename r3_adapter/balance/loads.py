"""How many tokens each expert, and each rank, gets: counted from routes, before anything is sent.

S: samples; B: micro-steps; L: MoE layers; E: experts of a layer; R: ranks that share them out.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from r3_adapter._core import count_experts
from r3_adapter.errors import LayoutError
from r3_adapter.trace import RoutingTrace

Counts = npt.NDArray[np.int32]
"""[S, L, E] or [B, L, E]: tokens at each expert."""
Placed = npt.NDArray[np.int32]
"""[L, E]: the expert that lies at each slot; the slots of a rank lie next to each other."""


@dataclass(frozen=True)
class Evenness:
    """How even the ranks' loads are over micro-steps and layers.

    ratio: the sum of the fullest ranks' loads over the sum of the mean loads: time in experts over the least there is.
    p50, p95, worst: of the fullest rank's load over the mean, by micro-step and layer.
    peak_tokens: the most tokens that a rank gets in a layer of a micro-step.
    """

    ratio: float
    p50: float
    p95: float
    worst: float
    peak_tokens: int


def count_trace(trace: RoutingTrace) -> Counts:
    """Return [L, E] the tokens at each expert; rows without a route are left out."""
    counts = np.empty((trace.topk_ids.shape[1], trace.num_experts), np.int64)
    by_layer = np.ascontiguousarray(trace.topk_ids.transpose(1, 0, 2))
    count_experts(topk_ids=by_layer, row_versions=trace.version_ids, counts=counts)
    return counts.astype(np.int32)


def count_traces(traces: Iterable[RoutingTrace]) -> Counts:
    """Return [S, L, E] the tokens at each expert, by sample.

    Raises:
        LayoutError: no traces, or traces of other layers or experts than the first.
    """
    counts = []
    first: RoutingTrace | None = None
    for sample, trace in enumerate(traces):
        first = first or trace
        if trace.num_experts != first.num_experts or not np.array_equal(trace.layer_ids, first.layer_ids):
            raise LayoutError(
                f"sample {sample}: {len(trace.layer_ids)} layers of {trace.num_experts} experts are not those of "
                f"sample 0, {len(first.layer_ids)} of {first.num_experts}"
            )
        counts.append(count_trace(trace))
    if not counts:
        raise LayoutError("no traces: there is nothing to count")
    return np.stack(counts)


def identity(num_layers: int, num_experts: int) -> Placed:
    """Return experts where the checkpoint has them."""
    return np.tile(np.arange(num_experts, dtype=np.int32), (num_layers, 1))


def summed(steps: Sequence[Sequence[int] | npt.NDArray[np.integer]], counts: Counts) -> Counts:
    """Return [B, L, E] the loads of micro-steps. steps: the samples of each."""
    return np.stack([counts[list(step)].sum(axis=0, dtype=np.int32) for step in steps])


def rank_loads(counts: Counts, placed: Placed, num_ranks: int) -> npt.NDArray[np.int32]:
    """Return [S or B, L, R] the tokens that each rank gets, of [S or B, L, E] at each expert."""
    order = np.broadcast_to(placed[None], counts.shape)
    by_slot = np.take_along_axis(counts, order, axis=2)
    loads: npt.NDArray[np.int32] = by_slot.reshape(*counts.shape[:2], num_ranks, -1).sum(axis=3, dtype=np.int32)
    return loads


def evenness(loads: npt.NDArray[np.integer] | npt.NDArray[np.floating]) -> Evenness:
    """Return the figures of [B, L, R] loads; a micro-step without a token in a layer counts as even."""
    return evenness_of(loads.max(axis=2).astype(np.float64), loads.mean(axis=2))


def evenness_of(fullest: npt.NDArray[np.float64], mean: npt.NDArray[np.float64]) -> Evenness:
    """Return the figures of [B, L] the fullest rank's loads and the mean ones."""
    over = over_mean(fullest, mean)
    total = mean.sum()
    ratio = float(fullest.sum() / total) if total else 1.0
    return Evenness(
        ratio,
        float(np.quantile(over, 0.5)),
        float(np.quantile(over, 0.95)),
        float(over.max()),
        round(float(fullest.max())),
    )


def over_mean(fullest: npt.NDArray[np.float64], mean: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return how many times the mean load the fullest is; 1 where there is none."""
    found: npt.NDArray[np.float64] = np.divide(fullest, mean, out=np.ones_like(mean), where=mean > 0)
    return found
