"""Model chunks that get their routes from hooks, and the routes for their next forward pass.

Apart from `attach`, since two other modules need it: `reach`, which looks at what the routers of such a chunk were
given, and `replay`, which prepares routes for it.
"""

import weakref
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch

from r3_adapter.errors import ReplayError, check_choice
from r3_adapter.megatron.agreement import own_rank
from r3_adapter.megatron.backends import Channel
from r3_adapter.megatron.inputs import check_order
from r3_adapter.megatron.replay_batch import ReplayBatch

Outside = Literal["live", "refuse"]
"""What a forward pass outside of `replaying` does: its routers select, or it raises."""
AuxLosses = Literal["replayed", "live"]
"""Which experts auxiliary losses count: those that are replayed, or those that the routers would select."""


class Feed:
    """The routes that hooks hand to one model chunk, micro-batch by micro-batch.

    channel: how they get to the routers.
    given: the experts that the present pass was handed, [M, T, K]; None if none.
    live: how many `routed_live` contexts are open.
    """

    def __init__(self, index: int, chunk: torch.nn.Module, channel: Channel, outside: Outside) -> None:
        check_choice("channel", channel, Channel, ReplayError)
        self.channel, self.live = channel, 0
        self.given: torch.Tensor | None = None
        self._chunk = weakref.ref(chunk)
        self._index, self._outside = index, outside
        self._batches: list[ReplayBatch] | None = None
        self._taken = 0

    def feeds(self, chunk: torch.nn.Module) -> bool:
        """Tell whether a chunk, wrapped as it was when it was attached, is the one."""
        return self._chunk() is chunk

    @property
    def full(self) -> bool:
        """Whether it is inside of `replaying`."""
        return self._batches is not None

    def check(self, routers: Mapping[int, Any]) -> None:
        """Refuse routers to which the experts would not get in the feed's own way; by global layer."""

    def fill(self, batches: list[ReplayBatch]) -> None:
        """Take the micro-batches of a pass."""
        self._batches, self._taken = batches, 0

    def take(self, input_ids: object) -> ReplayBatch | None:
        """Return the next micro-batch; None outside of `replaying`.

        input_ids: what the model is given.

        Raises:
            ReplayError: None is left, or its rows are in another order than the model's; or there are none, and passes
                outside of `replaying` are refused.
        """
        self.given = None
        if self._batches is None:
            if self._outside == "refuse" and not self.live:
                raise ReplayError(
                    f"{self.place()}: a forward pass outside of `replaying`, with outside 'refuse'; "
                    "if it is to be routed live, say so with routed_live"
                )
            return None
        if self._taken == len(self._batches):
            raise ReplayError(f"{self.place()}: no routes: the pass was given {self._taken} micro-batches")
        place, batch = self.place(), self._batches[self._taken]
        self._taken += 1
        self.given = batch.routed_experts
        check_order(place, input_ids, batch.routes)
        return batch

    def left(self) -> str:
        """Say which micro-batches were not used; empty if all were."""
        number = len(self._batches or ())
        if self._taken == number:
            return ""
        return (
            f"{self.place()}: routes left over: {self._taken} forward passes were made of the "
            f"{number} micro-batches that the pass was given"
        )

    def clear(self) -> None:
        """Forget the micro-batches."""
        self._batches, self.given = None, None

    def place(self, back: int = 0) -> str:
        """Name the rank and the chunk, and the micro-batch that is next, or was so much before, if the feed is full."""
        of_it = f", micro-batch {self._taken - back}" if self._batches is not None else ""
        return f"rank {own_rank()}: chunk {self._index}{of_it}"


FEEDS: "weakref.WeakKeyDictionary[Any, Feed]" = weakref.WeakKeyDictionary()
"""By GPTModel. A feed must not keep its model alive."""


def feeds_of(chunks: Iterable[torch.nn.Module]) -> list[Feed]:
    """Return the feeds of chunks, as they were attached or bare; those without one are left out."""
    return [feed for chunk in chunks for model, feed in FEEDS.items() if model is chunk or feed.feeds(chunk)]
