"""A rank's part of the optimizer, in a file beside the weights: moments, and parameters in float32."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from r3_adapter.errors import ReplayError


def save_moments(optimizer: Any, path: Path, about: Mapping[str, str | None], counts: Mapping[str, int]) -> Path:
    """Write what a Megatron optimizer has on this rank; return the file's path.

    about: what it depends on, as texts. counts: what goes on from there.
    """
    parts = [(inner.state_dict(), _main_parameters(inner)) for inner in _inner_optimizers(optimizer)]
    torch.save({"parts": parts, "counts": dict(counts), "about": dict(about)}, path)
    return path


def load_moments(
    optimizer: Any, path: Path, about: Mapping[str, str | None], device: torch.device
) -> Mapping[str, int]:
    """Read back what `save_moments` wrote; return its counts.

    Raises:
        ReplayError: it was written with something else than `about`.
    """
    state = torch.load(path, map_location=device, weights_only=True)
    for name, want in about.items():
        if (found := state.get("about", {}).get(name)) != want:
            raise ReplayError(
                f"{path}: optimizer of {name} {found} != {want} of the model: weights can be cut and placed anew, "
                "their moments cannot"
            )
    for inner, (moments, main) in zip(_inner_optimizers(optimizer), state["parts"], strict=True):
        inner.load_state_dict(moments)
        with torch.no_grad():
            for parameter, values in zip(_main_parameters(inner), main, strict=True):
                parameter.copy_(values)
    counts: Mapping[str, int] = state["counts"]
    return counts


def _inner_optimizers(optimizer: Any) -> list[Any]:
    """Return torch's optimizers in Megatron's, each with what this rank updates: a share of it, if distributed."""
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    return [each.optimizer for each in chained if each.optimizer is not None]


def _main_parameters(optimizer: Any) -> list[torch.Tensor]:
    """Return what an optimizer updates: in float32, where the model's parameters have fewer bits."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
