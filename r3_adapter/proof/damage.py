"""Routes that are well-formed and wrong, in ways that replay must show: of whole samples, or one alone.

M: MoE layers; K: experts a token.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from r3_adapter.errors import R3Error, check_choice
from r3_adapter.rollout import Sample
from r3_adapter.trace import RoutingTrace

Injection = Literal["shift-token", "swap-layers", "swap-samples"]


@dataclass(frozen=True)
class Misplaced:
    """A route that got the experts of another: positions in the sample, and indices of MoE layers, from 0."""

    position: int
    layer: int
    from_position: int
    from_layer: int


def misplace(samples: Sequence[Sample], seed: int) -> list[tuple[Sample, Misplaced]]:
    """Give one route of each sample the experts of the token before, of the token after, or of another MoE layer.

    Its token feeds a scored one. The other route is of the same sample, and of other experts: where none
    of 100 is, the sample is left out.

    Raises:
        R3Error: No sample has such routes.
    """
    rng, found = np.random.default_rng(seed), list[tuple[Sample, Misplaced]]()
    for sample in samples:
        if (where := _route_to_misplace(sample, rng)) is not None:
            topk_ids = sample.trace.topk_ids.copy()
            topk_ids[where.position, where.layer] = topk_ids[where.from_position, where.from_layer]
            found.append((replace(sample, trace=replace(sample.trace, topk_ids=topk_ids)), where))
    if not found:
        raise R3Error(f"no route of {len(samples)} samples can be misplaced: tokens and layers have the same experts")
    return found


def _route_to_misplace(sample: Sample, rng: np.random.Generator) -> Misplaced | None:
    ids, captured = sample.trace.topk_ids, sample.trace.captured
    scored = np.flatnonzero(sample.sampled) + sample.num_prompt_tokens - 1
    scored = scored[captured[scored]]
    for _ in range(100 if len(scored) else 0):
        position, layer = int(rng.choice(scored)), int(rng.integers(ids.shape[1]))
        other = int(rng.integers(ids.shape[1]))
        at, of = ((position - 1, layer), (position + 1, layer), (position, other))[rng.integers(3)]
        if 0 <= at < len(ids) and captured[at] and set(ids[at, of].tolist()) != set(ids[position, layer].tolist()):
            return Misplaced(position, layer, at, of)
    return None


def _shift_token(traces: Sequence[RoutingTrace]) -> list[RoutingTrace]:
    """Give each token the routes of the one before it."""
    return [_with_rows(trace, np.roll(_rows(trace), 1, axis=0)) for trace in traces]


def _swap_layers(traces: Sequence[RoutingTrace]) -> list[RoutingTrace]:
    """Exchange the first two MoE layers."""
    return [_with_rows(trace, _rows(trace)[:, [1, 0, *range(2, trace.topk_ids.shape[1])]]) for trace in traces]


def _swap_samples(traces: Sequence[RoutingTrace]) -> list[RoutingTrace]:
    """Exchange the routes of the first two samples, as far as the shorter one goes."""
    first, second = _rows(traces[0]).copy(), _rows(traces[1]).copy()
    both = min(len(first), len(second))
    first[:both], second[:both] = second[:both].copy(), first[:both].copy()
    return [_with_rows(traces[0], first), _with_rows(traces[1], second), *traces[2:]]


INJECTIONS: Mapping[Injection, Callable[[Sequence[RoutingTrace]], list[RoutingTrace]]] = {
    "shift-token": _shift_token,
    "swap-layers": _swap_layers,
    "swap-samples": _swap_samples,
}


def damage(samples: Sequence[Sample], injection: Injection) -> list[Sample]:
    """Return samples whose traces are well-formed and wrong, in a way of INJECTIONS; the self-test must notice."""
    check_choice("injection", injection, Injection)
    traces = INJECTIONS[injection]([sample.trace for sample in samples])
    return [replace(sample, trace=trace) for sample, trace in zip(samples, traces, strict=True)]


def _rows(trace: RoutingTrace) -> np.ndarray[Any, Any]:
    return trace.topk_ids[trace.captured]


def _with_rows(trace: RoutingTrace, rows: np.ndarray[Any, Any]) -> RoutingTrace:
    topk_ids = trace.topk_ids.copy()
    topk_ids[trace.captured] = rows
    return replace(trace, topk_ids=topk_ids)
