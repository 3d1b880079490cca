"""One micro-batch of a step: what `prepare_step` is given of it, and what a model chunk replays in it.

T: tokens of this rank; M: MoE layers of the chunk; K: experts a token; E: experts of a layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from r3_adapter.layout import Packing
from r3_adapter.megatron.backends import Channel
from r3_adapter.megatron.dispatch import COUNTS, UNPLANNED, Plan
from r3_adapter.repack import RankRoutes
from r3_adapter.trace import RoutingTrace


@dataclass(frozen=True)
class ReplayBatch:
    """What one rank's model chunk replays in one micro-batch.

    routed_experts: [M, T, K] int16 or uint16, on the chunk's device; int16 has -1 in a row that is routed live, uint16
        tells the routers that no row is and that they need no top-k. GPTModel.forward takes it under this name.
    routes: the same on the host, with the kind and the weight version of each row.
    num_stale: rows of `routes` that other weights computed, replayed or live as the policy says.
    plan: the tokens that each rank sends to each expert; GPTModel.forward takes its counts as `routed_expert_counts`,
        and its MoE layers then exchange none. If it is handed on, all ranks of an expert group must do so.
    backend: what they were checked for.
    """

    routed_experts: torch.Tensor
    routes: RankRoutes
    num_stale: int
    plan: Plan = UNPLANNED
    backend: Channel = "patch"

    @property
    def routed_expert_counts(self) -> torch.Tensor | None:
        """[M, G, E] int32 on the host, G ranks of the expert group; None without a plan, for reasons of `plan`."""
        return self.plan.counts

    @property
    def model_arguments(self) -> dict[str, torch.Tensor]:
        """Return the arguments of GPTModel.forward that replay adds.

        routed_experts, and with a plan routed_expert_counts: [M, T, K] and [M, G, E], as they are here.
        """
        arguments = {"routed_experts": self.routed_experts}
        return arguments if self.plan.counts is None else {**arguments, COUNTS: self.plan.counts}


@dataclass(frozen=True)
class StepInput:
    """One micro-batch for `prepare_step`: the arguments of `prepare` that differ between micro-batches.

    traces: one for each sample.
    tokens: [b, s] int64, or [1, t] if packed; as `prepare` takes them.
    packing: how the samples lie in the micro-batch; None for a padded batch.
    """

    traces: Sequence[RoutingTrace]
    tokens: torch.Tensor
    packing: Packing | None = None
