"""Weights for the engines that are not quite the trainer's: rounded as a rollout in FP8 would have them.

For experiments on what such rollouts do to training. The engine computes in its own dtype all the same.
"""

import shutil
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file

RolloutWeights = Literal["as-trained", "fp8-rounded"]
BLOCK = 128
"""Rows and columns that share a scale."""
_LARGEST = torch.finfo(torch.float8_e4m3fn).max
_KEPT = ("embed_tokens.", "lm_head.", "mlp.gate.", "router.")
"""Parts of the names of matrices that checkpoints in FP8 leave as they are."""
_TOGETHER = 64
"""Matrices that are rounded at once."""


def fp8_rounded(weight: torch.Tensor, block: int = BLOCK) -> torch.Tensor:
    """Return matrices rounded to e4m3 in blocks, each with a scale of its own, in bfloat16.

    weight: [..., rows, columns], of any floating dtype; blocks at the lower and right edge may be smaller.

    Source: arXiv 2412.19437 (DeepSeek-V3), section 3.3.2, weights; as checkpoints with weight_block_size [128, 128].
    """
    *more, rows, columns = weight.shape
    high, wide = min(rows, block), min(columns, block)
    whole = torch.nn.functional.pad(weight.float(), (0, -columns % wide, 0, -rows % high))
    blocks = whole.reshape(*more, whole.shape[-2] // high, high, whole.shape[-1] // wide, wide)
    scales = blocks.abs().amax(dim=(-3, -1), keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / _LARGEST
    rounded = (blocks / scales).to(torch.float8_e4m3fn).float() * scales
    return rounded.reshape(whole.shape)[..., :rows, :columns].to(torch.bfloat16)


def write_rounded(checkpoint: Path, folder: Path) -> Path:
    """Write a checkpoint with its linear weights rounded, all but the routers'; return its folder.

    A folder that is there is replaced. Tensors keep their names, files theirs.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for path in checkpoint.iterdir():
        if path.suffix == ".safetensors":
            save_file(_rounded(load_file(path)), folder / path.name, {"format": "pt"})
        elif path.suffix in (".json", ".txt", ".model", ".jinja"):
            shutil.copyfile(path, folder / path.name)
    return folder


def _rounded(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors with the linear weights rounded, those of one shape together: there are many experts."""
    alike: dict[tuple[torch.Size, torch.dtype], list[str]] = {}
    for name, tensor in tensors.items():
        if tensor.dim() == 2 and not any(part in name for part in _KEPT):
            alike.setdefault((tensor.shape, tensor.dtype), []).append(name)
    found = dict(tensors)
    for (_, dtype), names in alike.items():
        for first in range(0, len(names), _TOGETHER):
            some = names[first : first + _TOGETHER]
            found.update(zip(some, fp8_rounded(torch.stack([tensors[name] for name in some])).to(dtype), strict=True))
    return found
