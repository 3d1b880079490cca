"""Experts of a Megatron model in another order than the checkpoint's, by a placement, as weights are read and written.

Reading and writing use the checkpoint's own names, so they are the same for every family and every conversion: a reader
of "experts.3." gets the expert that lies at slot 3, and what a model returns as "experts.3." is written under that
expert's name. A router's rows and biases, one for each expert, are reordered likewise.

L: MoE layers; E: experts of a layer.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch

from r3_adapter.balance.table import Table
from r3_adapter.errors import LayoutError, ReplayError
from r3_adapter.megatron.layers import moe_layers, unwrapped
from r3_adapter.megatron.policy_trainer.checkpoint import Checkpoint

_PLACED: WeakKeyDictionary[torch.nn.Module, Table] = WeakKeyDictionary()
"""By GPTModel."""

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"(?<=\.experts\.)\d+(?=\.)")
_STACKED = re.compile(r"\.experts\.[a-z_]+$")
"""One tensor of all experts of a layer, along its first dimension."""
_ROUTER = re.compile(
    r"\.(?:gate|router)\.(?:weight|bias|e_score_correction_bias)$|\.moe_statics\.e_score_correction_bias$"
)
_OF_ALL = re.compile(r"\.(?:shared_experts?|shared_expert_gate|gate_proj|gate_up_proj|self_attn|linear_attn)\.")
"""Of a layer with experts, but none of theirs: what lies there stays."""
_SUSPECT = re.compile(r"expert|gate|router|moe")


class PlacedCheckpoint(Checkpoint):
    """A checkpoint whose experts are read in the order of a placement.

    Raises:
        ReplayError: as Checkpoint does; from `read`, a tensor of experts whose order is not known.
    """

    def __init__(self, folder: Path, placement: Table | None) -> None:
        super().__init__(folder)
        self._placement = placement

    def read(self, name: str, *, dim: int = 0, part: int = 0, parts: int = 1) -> torch.Tensor:
        """Read a part of a tensor, as Checkpoint.read does; by the name of a slot, the expert's that lies there."""
        found = self._placement and _order(name, self._placement)
        if not found:
            return super().read(name, dim=dim, part=part, parts=parts)
        row, inner = found
        order = self._placement.expert_at[row]  # type: ignore[union-attr]
        if (slot := _EXPERT.search(inner)) is not None:
            return super().read(_renamed(name, slot[0], order), dim=dim, part=part, parts=parts)
        if not _is_ordered(name, inner):
            return super().read(name, dim=dim, part=part, parts=parts)
        if parts != 1:
            raise ReplayError(f"{name}: part {part} of {parts} of a tensor whose experts are placed: read the whole")
        return _along(name, super().read(name), order)


def in_checkpoint_order(tensors: Mapping[str, torch.Tensor], placement: Table | None) -> dict[str, torch.Tensor]:
    """Return tensors under the names, and in the order, of the checkpoint: the inverse of reading them by a placement.

    tensors: of a model whose experts are placed, by the names that a model in the checkpoint's order would give them.

    Raises:
        ReplayError: a tensor of experts whose order is not known.
    """
    if placement is None:
        return dict(tensors)
    restored: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        found = _order(name, placement)
        if found is None:
            restored[name] = tensor
            continue
        row, inner = found
        if (slot := _EXPERT.search(inner)) is not None:
            restored[_renamed(name, slot[0], placement.expert_at[row])] = tensor
        elif _is_ordered(name, inner):
            restored[name] = _along(name, tensor, placement.slots([int(placement.layer_ids[row])])[0])
        else:
            restored[name] = tensor
    return restored


def set_placement(chunks: Sequence[Any], placement: Table | None) -> None:
    """Record where the experts of model chunks lie, after their weights are loaded; `prepare` and exports use it.

    chunks: this rank's model chunks, wrapped or not.

    Raises:
        LayoutError: a MoE layer that the placement has not, of other experts, or of groups that it parts.
    """
    if placement is None:
        return
    for chunk in chunks:
        for layer_id, layer in moe_layers(chunk):
            placement.row(layer_id)
            config = layer.config
            if config.num_moe_experts != placement.num_experts:
                raise LayoutError(
                    f"layer {layer_id}: {config.num_moe_experts} experts != {placement.num_experts} of the placement"
                )
            if groups := getattr(config, "moe_router_num_groups", None):
                placement.check_groups(groups)
        _PLACED[unwrapped(chunk)] = placement


def placement_of(model: torch.nn.Module) -> Table | None:
    """Return where the experts of a GPTModel lie; None where they lie in the checkpoint's order."""
    return _PLACED.get(model)


def read_placement(path: str | Path | None) -> Table | None:
    """Return the placement of a file; None without one.

    Raises:
        TraceError: it cannot be read, or is no placement.
    """
    return None if path is None else Table.load(Path(path))


def _order(name: str, placement: Table) -> tuple[int, str] | None:
    """Return a tensor's row of the placement and its name in its layer; None where it is of no layer with experts."""
    found = None if name.startswith("mtp.") else _LAYER.search(name)
    if found is None or int(found[1]) not in placement.layer_ids:
        return None
    return placement.row(int(found[1])), f".{found[2]}"


def _renamed(name: str, number: str, order: np.ndarray[Any, Any]) -> str:
    if int(number) >= len(order):
        raise ReplayError(f"{name}: expert {number} is none of the {len(order)} of the placement")
    return _EXPERT.sub(str(int(order[int(number)])), name)


def _is_ordered(name: str, inner: str) -> bool:
    """Tell whether a tensor has a row for each expert.

    Raises:
        ReplayError: it may have, and nobody knows in which order.
    """
    if _OF_ALL.search(inner):
        return False
    if _ROUTER.search(inner) or _STACKED.search(inner):
        return True
    if _SUSPECT.search(inner):
        raise ReplayError(f"{name}: whether this tensor has a row for each expert is not known: it cannot be placed")
    return False


def _along(name: str, tensor: torch.Tensor, order: np.ndarray[Any, Any]) -> torch.Tensor:
    """Return a tensor with its rows in an order; one of [1, E] has them in its last dimension."""
    dim = 1 if tensor.ndim == 2 and tensor.shape[0] == 1 else 0
    if tensor.shape[dim] != len(order):
        raise ReplayError(f"{name}: {tensor.shape[dim]} rows != {len(order)} experts of the placement")
    return tensor.index_select(dim, torch.from_numpy(order.astype(np.int64)).to(tensor.device))
