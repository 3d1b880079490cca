"""What the routers really used, beside what the rollout had: hooks on them, counted by layer.

T: tokens of this rank; K: experts a token; E: experts of a layer.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from r3_adapter.megatron.replay import ReplayBatch, moe_routers


@dataclass
class LayerCounts:
    """Of rows with a route: how many there were, in how many all experts are the route's, and how many experts are."""

    rows: int = 0
    rows_equal: int = 0
    ids: int = 0
    ids_equal: int = 0


@dataclass
class RouterMonitor:
    """Watches the routers of a rank's model chunks; `expect` says which micro-batch comes next.

    layers: counts by global decoder layer.
    """

    layers: dict[int, LayerCounts] = field(default_factory=lambda: defaultdict(LayerCounts))
    _batch: ReplayBatch | None = None

    @contextmanager
    def watch(self, chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
        """Put a hook on each MoE router of the chunks, for as long as the context lasts."""
        hooks = [
            router.register_forward_hook(self._hook(index, layer_id))
            for chunk in chunks
            for index, (layer_id, router) in enumerate(moe_routers(chunk))
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def expect(self, batch: ReplayBatch) -> None:
        """Compare the routers' next calls with this micro-batch."""
        self._batch = batch

    def _hook(self, index: int, layer_id: int) -> Any:
        def count(_: torch.nn.Module, __: Any, output: tuple[torch.Tensor, torch.Tensor]) -> None:
            assert self._batch is not None
            routing_map = output[1]
            replayed = torch.from_numpy(self._batch.routes.row_versions >= 0).to(routing_map.device)
            want = self._batch.routed_experts[index].to(torch.int64)[replayed]
            hits = routing_map[replayed].gather(1, want).sum(1)
            alone = routing_map[replayed].sum(1) == want.shape[1]
            counts = self.layers[layer_id]
            counts.rows += want.shape[0]
            counts.rows_equal += int(((hits == want.shape[1]) & alone).sum())
            counts.ids += want.numel()
            counts.ids_equal += int(hits.sum())

        return count
