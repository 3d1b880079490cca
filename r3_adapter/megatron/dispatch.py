"""Dispatch planned from known routes: the token counts of all ranks, exchanged once a step.

Where all rows of a micro-batch have a route, the tokens that each rank sends to each expert are known on the host
before the step. With the counts of all ranks of an expert group, Megatron's dispatchers exchange none in their MoE
layers and wait for none. All ranks of a group take the sizes of their messages from the same counts, so that a wrong
plan sends tokens to wrong ranks but lets no rank wait forever; `check_dispatch` finds it after the pass.

B: micro-batches; M: MoE layers of a chunk; G: ranks of the expert group (expert-tensor times expert-model parallel);
E: experts.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from r3_adapter.errors import ReplayError
from r3_adapter.megatron.agreement import ANOTHER_RANK, NOT_ASKED
from r3_adapter.repack import RankRoutes

COUNTS = "routed_expert_counts"

MoELayers = Mapping[int, Any]
"""The MoE layers of a chunk by global decoder layer."""


class Plan(NamedTuple):
    """The token counts of a micro-batch in a chunk, known before its dispatch.

    counts: [M, G, E] int32 on the host; None where there is no plan.
    why_not: says why; empty where there is a plan.
    num_live: rows of the expert group that routers route themselves, which is then why.
    """

    counts: torch.Tensor | None
    why_not: str = ""
    num_live: int = 0

    @property
    def kind(self) -> str:
        """Return "planned", or one of a few words for why not, by which a step's micro-batches are counted."""
        if self.counts is not None:
            return "planned"
        if self.num_live:
            return "live_rows"
        return {NOT_ASKED: "not_asked_for", ANOTHER_RANK: "another_rank"}.get(self.why_not, "cannot_be")


UNPLANNED = Plan(None, NOT_ASKED)


def why_not_planned(model: Any, layers: MoELayers) -> str:
    """Say why the dispatchers of a chunk cannot take counts; an empty string if they can.

    model: the GPTModel of the chunk.
    """
    if COUNTS not in inspect.signature(model.forward).parameters:
        return f"{type(model).__name__}.forward takes no {COUNTS}"
    from megatron.core.transformer.moe.dispatch_plan import why_not_planned as why

    for layer_id, layer in layers.items():
        if (reason := why(layer.token_dispatcher)) is not None:
            return f"layer {layer_id}: {reason}"
    return ""


def plan_step(chunks: Sequence[MoELayers], steps: Sequence[Sequence[RankRoutes]]) -> list[list[Plan]]:
    """Return the plan of each chunk and micro-batch; every rank of an expert group must call it, once they have agreed.

    One all-gather over the expert group, and none where experts are not shared out. All ranks of a group have as many
    micro-batches, and chunks of the same MoE layers.

    chunks: the MoE layers of each chunk. steps: by chunk and micro-batch.
    """
    dispatchers = [layer.token_dispatcher for layers in chunks for layer in layers.values()]
    if not dispatchers:
        return [[Plan(None, "no MoE layers") for _ in step] for step in steps]
    live = np.array([[routes.num_live for routes in step] for step in steps])
    counts = [np.stack([routes.counts for routes in step]) for step in steps]
    own = np.concatenate([live.ravel(), *(each.ravel() for each in counts)]).astype(np.int32)
    everybody = _gathered(own, dispatchers[0].tp_ep_group)
    all_live = everybody[:, : live.size].reshape(len(everybody), *live.shape)
    plans, at = list[list[Plan]](), live.size
    for chunk, each in enumerate(counts):
        found = everybody[:, at : at + each.size].reshape(len(everybody), *each.shape)
        at += each.size
        plans.append([_plan(found[:, batch], all_live[:, chunk, batch]) for batch in range(len(each))])
    return plans


def _gathered(own: npt.NDArray[np.int32], group: Any) -> npt.NDArray[np.int32]:
    """Return [G, N] the arrays of [N] of all ranks of a group."""
    size = torch.distributed.get_world_size(group)
    if size == 1:
        return own[None]
    on_host = torch.distributed.get_backend(group) == "gloo"
    mine = torch.from_numpy(own).to("cpu" if on_host else torch.cuda.current_device())
    everybody = torch.empty(size * len(own), dtype=mine.dtype, device=mine.device)
    torch.distributed.all_gather_into_tensor(everybody, mine, group=group)
    return everybody.cpu().numpy().reshape(size, -1)


def _plan(counts: npt.NDArray[np.int32], live: npt.NDArray[np.int32]) -> Plan:
    """Return the plan of a micro-batch. counts: [G, M, E]; live: [G] rows that routers route themselves."""
    if live.any():
        ranks = np.flatnonzero(live).tolist()
        says = f"{live.sum()} rows are routed live, on ranks {ranks} of the {len(live)} of the expert group"
        return Plan(None, says, int(live.sum()))
    return Plan(torch.from_numpy(np.ascontiguousarray(counts.transpose(1, 0, 2))))


def astray(chunks: Sequence[MoELayers]) -> str:
    """Say in which layers this rank sent other tokens than were planned since it was last asked; empty if in none.

    It waits for the device once, and only if there were plans.
    """
    layers = list(_checked(chunks))
    if not layers:
        return ""
    from megatron.core.transformer.moe.dispatch_plan import PlanCheck

    wrong = PlanCheck.differences([check for _, check in layers])
    return "; ".join(
        f"layer {layer_id}: {len(experts)} experts were sent other numbers of tokens than planned, the first of them "
        f"expert {experts[0]}"
        for (layer_id, _), experts in zip(layers, wrong, strict=True)
        if experts
    )


def check_astray(chunks: Sequence[MoELayers]) -> None:
    """Raise what `astray` says.

    Raises:
        ReplayError: Names the layers.
    """
    if says := astray(chunks):
        raise ReplayError(f"rank {torch.distributed.get_rank()}: {says}: a plan of other routes than were replayed")


def _checked(chunks: Sequence[MoELayers]) -> Iterator[tuple[int, Any]]:
    for layers in chunks:
        for layer_id, layer in layers.items():
            if (check := getattr(layer.token_dispatcher, "plan_check", None)) is not None:
                yield layer_id, check
