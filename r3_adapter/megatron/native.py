"""Replay by Megatron's own RouterReplay, for a Megatron-core without our patches, from 0.16 on.

A router asks its `router_replay` which experts to use in place of the top-k. Ours, which `attach` puts there, is told
by hooks on the GPTModel: before a forward pass, the experts of its micro-batch; when gradients come back to the output
of that pass, the same once more, for what is recomputed now. So there is no queue of micro-batches that could run out
of step with the schedule, and nothing is left when `replaying` ends.

T: tokens of this rank; M: MoE layers of the chunk; K: experts a token.

Source: megatron/core/transformer/moe/router_replay.py@0.16.1:RouterReplay.get_replay_topk;
    megatron/core/transformer/moe/moe_utils.py@0.16.1:topk_routing_with_score_function.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from r3_adapter.errors import ReplayError
from r3_adapter.megatron.config_fields import NATIVE_REFUSED, refusals
from r3_adapter.megatron.feeding import AuxLosses, Feed, Outside
from r3_adapter.megatron.replay_batch import ReplayBatch

try:
    from megatron.core.transformer.moe.router_replay import RouterReplay
except ImportError as error:
    raise ReplayError(
        f"backend 'native': this Megatron-core has no RouterReplay, as 0.16 and newer have: {error}"
    ) from error


class Target(RouterReplay):  # type: ignore[misc]
    """What one router replays: the rows of the micro-batch that it works on.

    target_topk_idx: [T, K] uint16, or int16 with -1 in a row that is routed live; None outside of passes with routes.
    asked: how often the router has asked since it was set.
    """

    def __init__(self, layer_id: int, feed: "NativeFeed | None") -> None:
        super().__init__()
        # It is no part of what sets all routers of a process at once, in the order in which they were made.
        instances = RouterReplay.global_router_replay_instances
        instances[:] = [each for each in instances if each is not self]
        self.layer_id, self.asked, self._feed = layer_id, 0, feed

    def aim(self, experts: torch.Tensor | None) -> None:
        """Set the rows that the router uses next; None to let it select."""
        self.target_topk_idx, self.asked = experts, 0

    def get_replay_topk(
        self,
        scores: torch.Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Any = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the scores and the ids of the experts to use, [T, K], by descending score as top-k gives them.

        Raises:
            ReplayError: rows of another number of tokens; or none, in the midst of a pass that has routes.
        """
        experts = self.target_topk_idx
        if experts is None:
            if self._feed is not None and self._feed.full:
                raise ReplayError(
                    f"{self._feed.place()}: layer {self.layer_id}: its router works outside of the model's forward "
                    "pass, and on gradients that did not come through the model's output"
                )
            scores, ids = default_compute_topk(scores, topk, num_groups, group_topk)
            return scores, ids
        if tuple(experts.shape) != (len(scores), topk):
            raise ReplayError(
                f"layer {self.layer_id}: routes of (tokens, top-k) {tuple(experts.shape)} != {(len(scores), topk)}"
            )
        self.asked += 1
        ids = experts.to(device=scores.device, dtype=torch.int64)
        if experts.dtype.is_signed:
            own = default_compute_topk(scores, topk, num_groups, group_topk)[1]
            ids = torch.where(ids[:, :1] < 0, own, ids)
        order = scores.detach().gather(1, ids).argsort(dim=1, descending=True, stable=True)
        ids = ids.gather(1, order)
        return scores.gather(1, ids), ids


class NativeFeed(Feed):
    """The routes of a chunk whose routers ask Megatron's RouterReplay."""

    def __init__(
        self, index: int, chunk: torch.nn.Module, outside: Outside, routers: Mapping[int, Any], aux_losses: AuxLosses
    ) -> None:
        super().__init__(index, chunk, "native", outside)
        self._aux_losses = aux_losses
        self._routers = dict(routers)
        for layer_id, router in routers.items():
            self._check_router(layer_id, router)
        self._own = {layer_id: router.router_replay for layer_id, router in routers.items()}
        self._targets = {layer_id: Target(layer_id, self) for layer_id in routers}
        self._pass: object = None
        self._check_idle()

    def check(self, routers: Mapping[int, Any]) -> None:
        """Refuse routers that Megatron's own replay gets wrong, or whose RouterReplay is not ours any more."""
        for layer_id, router in routers.items():
            self._check_router(layer_id, router)
            if router.router_replay is not self._targets.get(layer_id):
                raise ReplayError(f"layer {layer_id}: its router_replay was replaced since the model was attached")

    def fill(self, batches: list[ReplayBatch]) -> None:
        self._check_idle()
        super().fill(batches)
        self._pass = object()

    def left(self) -> str:
        foreign = {layer_id: len(each.replay_backward_list) for layer_id, each in self._targets.items()}
        wrong = [f"layer {layer_id}: {number}" for layer_id, number in foreign.items() if number]
        of_others = f"{self.place(1)}: targets that another replay has left: {', '.join(wrong)}" if wrong else ""
        return super().left() or of_others

    def clear(self) -> None:
        super().clear()
        self._pass = None
        for target in self._targets.values():
            target.clear_indices()
            target.aim(None)

    def engage(self) -> None:
        """Let the routers ask our objects."""
        for layer_id, router in self._routers.items():
            router.router_replay = self._targets[layer_id]

    def release(self) -> None:
        """Give the routers back what they had."""
        for layer_id, router in self._routers.items():
            router.router_replay = self._own[layer_id]

    def before(self, batch: ReplayBatch | None) -> None:
        """Give the routers the experts of a micro-batch, before its forward pass."""
        for index, target in enumerate(self._targets.values()):
            target.aim(None if batch is None else batch.routed_experts[index])

    def after(self, batch: ReplayBatch, output: Any) -> None:
        """Check that all routers have asked, and keep the same experts for when they recompute."""
        for layer_id, target in self._targets.items():
            if not target.asked:
                raise ReplayError(f"{self.place(1)}: layer {layer_id}: its router did not ask RouterReplay for experts")
        self.before(None)
        for each in tree_leaves(output):
            if isinstance(each, torch.Tensor) and each.requires_grad:
                each.register_hook(partial(self._back, batch, self._pass))  # type: ignore[no-untyped-call]

    def _back(self, batch: ReplayBatch, of_pass: object, _: torch.Tensor) -> None:
        recomputes = any(router.config.recompute_granularity for router in self._routers.values())
        if of_pass is self._pass:
            self.before(batch)
        elif recomputes:
            raise ReplayError(
                f"{self.place()}: a backward pass with recomputation, outside of the `replaying` that its forward "
                "pass was in: with backend 'native' both must be inside"
            )

    def _check_idle(self) -> None:
        for layer_id, own in self._own.items():
            for each in (own, self._targets[layer_id]):
                if each is not None and (each.router_replay_action or each.replay_backward_list):
                    raise ReplayError(
                        f"{self.place()}: layer {layer_id}: another replay is active: its RouterReplay has action "
                        f"{each.router_replay_action} and {len(each.replay_backward_list)} targets; turn off the "
                        "training framework's own"
                    )

    def _check_router(self, layer_id: int, router: Any) -> None:
        for name, found, wanted, why in refusals(NATIVE_REFUSED, vars(router.config)):
            raise ReplayError(f"layer {layer_id}: backend 'native': {name} ({found!r}) != {wanted}: {why}")
        asked = "live" in (self._aux_losses, getattr(router.config, "moe_router_replay_aux_loss", None))
        if not asked and _has_aux_loss(router):
            raise ReplayError(
                f"layer {layer_id}: backend 'native': load balancing {router.routing_type!r} counts the experts that "
                "the router would select, not those that are replayed; if that is meant, attach with aux_losses='live'"
            )


def hook(model: Any, feed: NativeFeed, refuse: Callable[[Mapping[str, Any]], None]) -> list[Callable[[], object]]:
    """Tell the routers of a model what to replay, before all other hooks; return what takes that back.

    refuse: raises if the arguments of a pass have routes.
    """
    latest: list[ReplayBatch | None] = [None]

    def before(_: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
        refuse(kwargs)
        feed.before(None)
        latest[0] = feed.take(args[0] if args else kwargs.get("input_ids"))
        feed.before(latest[0])

    def after(_: Any, args: Any, output: Any) -> None:
        batch, latest[0] = latest[0], None
        if batch is not None:
            feed.after(batch, output)

    feed.engage()
    return [
        feed.release,
        model.register_forward_pre_hook(before, prepend=True, with_kwargs=True).remove,
        model.register_forward_hook(after).remove,
    ]


def _has_aux_loss(router: Any) -> bool:
    kinds = [router.routing_type] if isinstance(router.routing_type, str) else router.routing_type
    coefficients = router.config.moe_aux_loss_coeff
    if not isinstance(coefficients, list | tuple):
        coefficients = [coefficients] * len(kinds)
    return any(kind.endswith("aux_loss") and number for kind, number in zip(kinds, coefficients, strict=False))
