"""Metrics of replay for a framework's own log: rows, agreement of live and replayed experts, and k3.

N: samples; T: tokens of a rank; K: experts a token; E: experts of a layer.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields
from typing import Any

import torch

from r3_adapter.megatron.layers import moe_routers
from r3_adapter.megatron.replay_batch import ReplayBatch


@dataclass
class Counts:
    """A rank's counts of a step: rows by kind, and replayed experts that the live router would have taken too.

    ids: of the rows that were compared. ids_equal: those that are also among the live top-k.
    """

    replayed: int = 0
    live: int = 0
    padding: int = 0
    stale: int = 0
    ids: int = 0
    ids_equal: int = 0

    def add_rows(self, batches: Sequence[ReplayBatch]) -> None:
        """Count the rows of one chunk's micro-batches; all chunks of a pipeline have the same ones."""
        for batch in batches:
            self.replayed += batch.routes.num_replayed
            self.live += batch.routes.num_live
            self.padding += batch.routes.num_padding
            self.stale += batch.num_stale

    def summed(self) -> "Counts":
        """Return the sum over all ranks, each of which must call it: one all-reduce of a few numbers."""
        device = torch.device("cpu") if torch.distributed.get_backend() == "gloo" else torch.cuda.current_device()
        own = torch.tensor(astuple(self), dtype=torch.int64, device=device)
        torch.distributed.all_reduce(own)
        return Counts(*own.tolist())

    def report(self) -> dict[str, float]:
        """Return the metrics by name; no agreement where nothing was compared."""
        rows = {f"r3/{field.name}": float(getattr(self, field.name)) for field in fields(self)[:4]}
        return {**rows, **({"r3/agreement": self.ids_equal / self.ids} if self.ids else {})}


@contextmanager
def compare_live(
    chunks: Sequence[torch.nn.Module], steps: Sequence[Sequence[ReplayBatch]], counts: Counts
) -> Iterator[None]:
    """Compare the first micro-batch's routes with what the routers would select live, as long as the context lasts.

    It costs each router one more product with its weights and one top-k, for one micro-batch of a step.

    counts: gets ids and ids_equal.
    """
    found = list[tuple[int, torch.Tensor]]()
    hooks = [
        router.register_forward_hook(_comparison(steps[index][0], layer, found))
        for index, chunk in enumerate(chunks)
        for layer, (_, router) in enumerate(moe_routers(chunk))
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    # Read after the passes, so that none of them waits for the device.
    counts.ids += sum(ids for ids, _ in found)
    counts.ids_equal += int(torch.stack([equal for _, equal in found]).sum()) if found else 0


def _comparison(batch: ReplayBatch, layer: int, found: list[tuple[int, torch.Tensor]]) -> Any:
    done = [False]

    def compare(router: Any, args: tuple[Any, ...], output: Any) -> None:
        if done[0]:
            return
        done[0] = True
        routing_map = live_map(router, args[0])
        replayed = torch.from_numpy(batch.routes.row_versions >= 0).to(routing_map.device)
        want = torch.from_numpy(batch.routes.topk_ids[layer].astype("int64")).to(routing_map.device)
        equal = routing_map.gather(1, want.clamp_min(0)) & replayed[:, None]
        found.append((batch.routes.num_replayed * want.shape[1], equal.sum()))

    return compare


@torch.no_grad()
def live_map(router: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Return which experts a router would select by itself: [T, E] bool; without the noise of training.

    Source: megatron/core/transformer/moe/router.py@0.16.1:TopKRouter.routing
    """
    from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function

    config = router.config
    logits = router.gating(hidden)
    _, routing_map = topk_routing_with_score_function(
        logits.view(-1, config.num_moe_experts),
        router.topk,
        use_pre_softmax=config.moe_router_pre_softmax,
        num_groups=config.moe_router_num_groups,
        group_topk=config.moe_router_group_topk,
        scaling_factor=config.moe_router_topk_scaling_factor,
        score_function=router.score_function,
        expert_bias=router.expert_bias,
    )
    found: torch.Tensor = routing_map.bool()
    return found


def k3_of_samples(
    trainer: Sequence[torch.Tensor], rollout: Sequence[torch.Tensor], masks: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Return each sample's sum of r - 1 - log r over tokens with a mask, r = p_trainer / p_rollout: [N] float64.

    Its mean estimates KL(rollout || trainer); see r3_adapter.metrics.
    """
    found = []
    for own, theirs, mask in zip(trainer, rollout, masks, strict=True):
        diff = (own.detach().double() - theirs.to(own.device).double()) * mask.to(own.device)
        found.append((torch.expm1(diff) - diff).sum())
    return torch.stack(found)
