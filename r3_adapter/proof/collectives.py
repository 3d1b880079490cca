"""How many collectives the MoE layers of a model enter."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from r3_adapter.megatron.layers import moe_layers

_GATHERS = ("c10d::allgather_", "c10d::_allgather_base_")
_COUNTS = (torch.int32, torch.int64)


@dataclass
class Collectives:
    """What was counted on a rank.

    layers: calls of MoE layers. in_layers: collectives in these calls, which are forward passes; what is recomputed
        inside of a layer is not among them.
    count_exchanges: all-gathers of whole numbers in all of the pass, recomputation included: token counts, for nothing
        else in a pass of Megatron's gathers such numbers.
    """

    layers: int = 0
    in_layers: int = 0
    count_exchanges: int = 0


class _Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, found: Collectives) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._found, self.in_layer = found, False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            self._found.in_layers += self.in_layer
            if function._schema.name in _GATHERS:
                tensor = next(each for each in tree_leaves(args) if isinstance(each, torch.Tensor))
                self._found.count_exchanges += tensor.dtype in _COUNTS
        return function(*args, **(kwargs or {}))


@contextmanager
def counted(chunks: Sequence[torch.nn.Module]) -> Iterator[Collectives]:
    """Count for as long as the context lasts."""
    found = Collectives()
    counting = _Counting(found)

    def enter(*_: Any) -> None:
        found.layers += 1
        counting.in_layer = True

    def leave(*_: Any) -> None:
        counting.in_layer = False

    layers = [layer for chunk in chunks for _, layer in moe_layers(chunk)]
    hooks = [layer.register_forward_pre_hook(enter) for layer in layers]
    hooks += [layer.register_forward_hook(leave) for layer in layers]
    try:
        with counting:
            yield found
    finally:
        for hook in hooks:
            hook.remove()
