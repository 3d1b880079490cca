"""Hooks on routers that compare the experts they used with the rollout's, counted by layer.

T: tokens of this rank; K: experts a token; E: experts of a layer.
"""

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from r3_adapter.errors import ReplayError
from r3_adapter.megatron.dispatch import Plan
from r3_adapter.megatron.layers import moe_layers, moe_routers
from r3_adapter.megatron.reach import experts_given
from r3_adapter.megatron.replay_batch import ReplayBatch


@contextmanager
def router_clock(chunks: Sequence[torch.nn.Module]) -> Iterator[list[float]]:
    """Time the MoE routers of the chunks, for as long as the context lasts; yield a list of one number, the seconds."""
    spent, started = [0.0], [0.0]

    def wait() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def before(*_: Any) -> None:
        started[0] = wait()

    def after(*_: Any) -> None:
        spent[0] += wait() - started[0]

    routers = [router for chunk in chunks for _, router in moe_routers(chunk)]
    hooks = [router.register_forward_pre_hook(before) for router in routers]
    hooks += [router.register_forward_hook(after) for router in routers]
    try:
        yield spent
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def expert_counter(chunks: Sequence[torch.nn.Module]) -> Iterator[dict[int, list[int]]]:
    """Yield, by layer, how many tokens this rank's experts are given in each call, for as long as the context lasts.

    A token counts once for each expert. They are counted where the dispatcher hands them over, so nothing waits for
    the device.
    """
    found: dict[int, list[int]] = {}

    def count(tokens: list[int], _: Any, args: Sequence[Any]) -> None:
        tokens.append(len(args[0]))

    layers = [(layer_id, layer.experts) for chunk in chunks for layer_id, layer in moe_layers(chunk)]
    hooks = [
        experts.register_forward_pre_hook(partial(count, found.setdefault(layer_id, [])))
        for layer_id, experts in layers
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@dataclass
class LayerCounts:
    """Routes and their experts: how many there were, and how many the router used; of a route all and no others."""

    routes: int = 0
    routes_equal: int = 0
    ids: int = 0
    ids_equal: int = 0


@dataclass
class RouterMonitor:
    """Watches the routers of a rank's model chunks, in forward passes and in recomputation.

    layers: counts by global decoder layer.
    tokens: [T] bool by micro-batch; which of the tokens that have a route use it in all layers so far.
    record: keep the experts that were used, for `recorded`.
    """

    layers: dict[int, LayerCounts] = field(default_factory=lambda: defaultdict(LayerCounts))
    tokens: dict[int, torch.Tensor] = field(default_factory=dict)
    record: bool = False
    _used: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)
    _latest: ReplayBatch | None = None
    _by_address: dict[int, ReplayBatch] = field(default_factory=dict)

    @contextmanager
    def watch(self, chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
        """Put a hook on each MoE router of the chunks, for as long as the context lasts."""
        hooks = [
            router.register_forward_hook(self._hook(index, layer_id), with_kwargs=True)
            for chunk in chunks
            for index, (layer_id, router) in enumerate(moe_routers(chunk))
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._by_address.clear()

    def expect(self, batch: ReplayBatch) -> None:
        """Say which micro-batch the model is called with next.

        A router that is given routes tells by their address which micro-batch it works on: recomputation comes later,
        after the passes of other micro-batches.
        """
        self._latest = batch
        self._by_address[batch.routed_experts.untyped_storage().data_ptr()] = batch

    def recorded(self, routes: Sequence[Sequence[ReplayBatch]]) -> list[list[ReplayBatch]]:
        """Return the same batches with the experts that the routers used in place of the routes.

        routes: by model chunk and micro-batch, all of which have been through.
        """
        # Other experts than those that were counted.
        unplanned = Plan(None, "routes recorded in the trainer")
        return [
            [replace(each, routed_experts=self._stacked(each), plan=unplanned) for each in chunk] for chunk in routes
        ]

    def _stacked(self, batch: ReplayBatch) -> torch.Tensor:
        if not len(batch.routed_experts):
            return batch.routed_experts
        used = [self._used[id(batch), index] for index in range(len(batch.routed_experts))]
        return torch.stack(used).to(batch.routed_experts.dtype)

    def _hook(self, index: int, layer_id: int) -> Any:
        def count(
            router: torch.nn.Module, args: Any, kwargs: Mapping[str, Any], output: tuple[torch.Tensor, torch.Tensor]
        ) -> None:
            batch = self._find(index, layer_id, experts_given(router, args, kwargs))
            routing_map = output[1]
            if self.record:
                topk = batch.routed_experts.shape[-1]
                self._used[id(batch), index] = routing_map.to(torch.uint8).topk(topk, dim=-1).indices
            replayed = torch.from_numpy(batch.routes.row_versions >= 0).to(routing_map.device)
            want = batch.routed_experts[index].to(torch.int64)[replayed]
            hits = routing_map[replayed].gather(1, want).sum(1)
            alone = routing_map[replayed].sum(1) == want.shape[1]
            equal = (hits == want.shape[1]) & alone
            self.tokens[id(batch)] = self.tokens.get(id(batch), torch.ones_like(equal)) & equal
            counts = self.layers[layer_id]
            counts.routes += want.shape[0]
            counts.routes_equal += int(equal.sum())
            counts.ids += want.numel()
            counts.ids_equal += int(hits.sum())

        return count

    def _find(self, index: int, layer_id: int, given: torch.Tensor | None) -> ReplayBatch:
        """Return the micro-batch that a router works on; refuse routes that are another layer's."""
        if given is None:
            assert self._latest is not None
            return self._latest
        batch = self._by_address[given.untyped_storage().data_ptr()]
        if given.storage_offset() != (own := batch.routed_experts[index].storage_offset()):
            raise ReplayError(f"layer {layer_id}: its router was given rows at {given.storage_offset()} != {own}")
        return batch
