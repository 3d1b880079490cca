"""What verl's metrics say of replay: rows by kind, experts that live routers would have used too, and k3.

b: samples; N: response tokens of a pass; T: tokens of a rank; K: experts a token; E: experts of a layer.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from r3_adapter.megatron.replay import ReplayBatch, moe_routers
from r3_adapter.metrics import gap

_COUNTS = ("replayed_rows", "live_rows", "padding_rows", "ids", "equal")


class Report:
    """An engine's figures; verl drops those of a pass for log-probabilities, so they go with the next update's."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._held: dict[str, float] = {}

    @contextmanager
    def watched(
        self, chunks: Sequence[torch.nn.Module], steps: Sequence[Sequence[ReplayBatch]], forward_only: bool
    ) -> Iterator[None]:
        """Count the rows of a pass, and on the first micro-batch compare live and replayed experts.

        They are compared before an update only: in the pass for log-probabilities, or where there is none in its first.
        """
        compared = _Compared()
        with compared.watch(chunks, steps, on=forward_only or not self._held):
            yield
        self._counts = _summed({**_rows(steps[0]), **compared.counts()})

    def add(self, output: Any, data: Any, forward_only: bool) -> None:
        """Put a pass's figures into the metrics of its output, if it trains; each value is a list, as verl's are.

        output, data: of verl's forward_backward_batch; output is empty on all but the last pipeline stage.
        """
        counts = dict(self._counts)
        ids, equal = counts.pop("ids"), counts.pop("equal")
        found = {name: float(count) for name, count in counts.items()}
        if ids:
            found["live_agreement"] = equal / ids
        found |= _gap(output, data)
        if forward_only:
            self._held = {f"r3/old/{name}": value for name, value in found.items()}
        elif output:
            figures = {**self._held, **{f"r3/{name}": value for name, value in found.items()}}
            output["metrics"] |= {name: [value] for name, value in figures.items()}


def _rows(batches: Sequence[ReplayBatch]) -> dict[str, int]:
    """Count the rows of a rank; they are those of all pipeline stages, and counted on the first."""
    from megatron.core import parallel_state as ps

    routes = [batch.routes for batch in batches] if ps.is_pipeline_first_stage(ignore_virtual=True) else []
    return {
        "replayed_rows": sum(each.num_replayed for each in routes),
        "live_rows": sum(each.num_live for each in routes),
        "padding_rows": sum(each.num_padding for each in routes),
    }


def _summed(counts: dict[str, int]) -> dict[str, int]:
    """Return the sums over all ranks, each of which must call it."""
    device = "cpu" if torch.distributed.get_backend() == "gloo" else torch.cuda.current_device()
    numbers = torch.tensor([counts[name] for name in _COUNTS], dtype=torch.int64, device=device)
    torch.distributed.all_reduce(numbers)
    return dict(zip(_COUNTS, numbers.tolist(), strict=True))


def _gap(output: Any, data: Any) -> dict[str, float]:
    """Return how far this pass's log-probabilities are from the rollout's; nothing where one of them is not known."""
    from verl.workers.utils.padding import no_padding_2_padding

    own, theirs = (output or {}).get("model_output", {}).get("log_probs"), data.get("rollout_log_probs", None)
    if own is None or theirs is None:
        return {}
    mask = _padded(data["response_mask"]).bool()
    own, theirs = no_padding_2_padding(own, data), _padded(theirs)
    mask, own, theirs = (each.detach().cpu()[:, : mask.shape[1]] for each in (mask, own, theirs))
    both = _selected(own, mask), _selected(theirs, mask)
    if not both[0].size:
        return {}
    if not all(np.isfinite(each).all() for each in both):
        # An error of one pipeline stage alone would leave the others in a collective.
        return {"k3": math.nan}
    found = gap(*both)
    return {name: value for name, value in asdict(found).items() if name in ("k3", "mean_abs", "max_abs", "f_2")}


def _padded(values: torch.Tensor) -> torch.Tensor:
    return values.to_padded_tensor(0) if values.is_nested else values


def _selected(values: torch.Tensor, mask: torch.Tensor) -> npt.NDArray[np.floating[Any]]:
    found: npt.NDArray[np.floating[Any]] = values[mask].float().numpy()
    return found


class _Compared:
    """Of the first micro-batch's replayed rows: experts of their routes, and those that live routers select too."""

    def __init__(self) -> None:
        self._ids = 0
        self._equal: list[torch.Tensor] = []
        self._seen: set[int] = set()

    @contextmanager
    def watch(
        self, chunks: Sequence[torch.nn.Module], steps: Sequence[Sequence[ReplayBatch]], *, on: bool
    ) -> Iterator[None]:
        """Put a hook on each MoE router, for as long as the context lasts."""
        hooks = [
            router.register_forward_hook(self._hook(step[0], index))
            for chunk, step in zip(chunks, steps, strict=True)
            for index, (_, router) in enumerate(moe_routers(chunk))
            if on
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def counts(self) -> dict[str, int]:
        """Return the counts; this waits for the device."""
        return {"ids": self._ids, "equal": int(torch.stack(self._equal).sum()) if self._equal else 0}

    def _hook(self, batch: ReplayBatch, index: int) -> Any:
        replayed = torch.from_numpy(batch.routes.row_versions >= 0)
        want = torch.from_numpy(batch.routes.topk_ids[index].astype(np.int64))

        def compare(router: Any, args: Any, output: Any) -> None:
            if id(router) in self._seen:
                return
            self._seen.add(id(router))
            chosen = live_map(router, args[0])
            hits = chosen.gather(1, want.clamp_min(0).to(chosen.device)) & replayed[:, None].to(chosen.device)
            self._ids += batch.routes.num_replayed * want.shape[1]
            self._equal.append(hits.sum())

        return compare


@torch.no_grad()
def live_map(router: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Return [T, E] bool, the experts that a router would select by itself.

    Source: megatron/core/transformer/moe/router.py@0.16.1:TopKRouter.routing
    """
    from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function

    config = router.config
    _, chosen = topk_routing_with_score_function(
        router.gating(hidden).view(-1, config.num_moe_experts),
        router.topk,
        use_pre_softmax=config.moe_router_pre_softmax,
        num_groups=config.moe_router_num_groups,
        group_topk=config.moe_router_group_topk,
        scaling_factor=config.moe_router_topk_scaling_factor,
        score_function=router.score_function,
        expert_bias=router.expert_bias,
    )
    found: torch.Tensor = chosen.bool()
    return found
