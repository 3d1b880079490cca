"""Read a Hugging Face checkpoint: its config, and parts of its tensors without the rest."""

import json
import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import safe_open

from r3_adapter.errors import ReplayError

_SIDE_FILES = (".json", ".txt", ".model", ".jinja", ".tiktoken")


def side_files(folder: Path) -> dict[str, bytes]:
    """Return what lies beside a checkpoint's weights, by name: config.json, the tokenizer's and generation's files.

    Raises:
        ReplayError: there is no config.json, or a file cannot be read.
    """
    try:
        return {
            path.name: path.read_bytes()
            for path in sorted(folder.iterdir())
            if path.suffix in _SIDE_FILES and path.is_file() and not path.name.endswith(".index.json")
        } | {"config.json": (folder / "config.json").read_bytes()}
    except OSError as error:
        raise ReplayError(f"{folder}: its files cannot be read: {error}") from error


@dataclass(frozen=True)
class Template:
    """The form of an export: a checkpoint without its weights, kept in memory since the folder may be gone by then.

    files: what lies beside the weights, by name.
    tensors: each tensor of the checkpoint, by name, on torch's meta device, which has shape and dtype alone.
    kept: tensors that the model does not take, on the one rank that writes them as they were.
    """

    files: Mapping[str, bytes]
    tensors: Mapping[str, torch.Tensor]
    kept: Mapping[str, torch.Tensor]

    @property
    def config(self) -> Mapping[str, Any]:
        config: Mapping[str, Any] = json.loads(self.files["config.json"])
        return config


def template(folder: Path, *, rank: int = 0, num_ranks: int = 1) -> Template:
    """Read a checkpoint's template; of the tensors that models do not take, each rank keeps another part.

    Raises:
        ReplayError: there is no checkpoint, or it cannot be read.
    """
    with Checkpoint(folder) as checkpoint:
        names = sorted(checkpoint.names())
        left_out = [name for name in names if not_taken(name, checkpoint.config)]
        kept = {name: checkpoint.read(name) for name in left_out[rank::num_ranks]}
        return Template(side_files(folder), {name: checkpoint.meta(name) for name in names}, kept)


def not_taken(name: str, config: Mapping[str, Any]) -> str:
    """Return why models do not take a tensor of a checkpoint; empty for those that they must take."""
    layer, total = re.match(r"model\.layers\.(\d+)\.", name), config.get("num_hidden_layers")
    # Hybrid models list their layers in place of the number, and name those of multi-token prediction.
    if name.startswith("mtp.") or (layer and total is not None and int(layer[1]) >= total):
        return "of a layer of multi-token prediction, which is not trained"
    return "computed from config.json" if name.endswith(".rotary_emb.inv_freq") else ""


class Checkpoint:
    """A folder with config.json and safetensors files; a context manager that keeps the files open.

    Raises:
        ReplayError: the folder has no config or no tensors.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.config: Mapping[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ReplayError(f"{folder}: config.json cannot be read: {error}") from error
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}
        for path in sorted(folder.glob("*.safetensors")):
            file = self._stack.enter_context(safe_open(path, framework="pt"))
            self._files.update(dict.fromkeys(file.keys(), file))
        if not self._files:
            raise ReplayError(f"{folder}: no *.safetensors")

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def names(self) -> frozenset[str]:
        """Return the names of all tensors."""
        return frozenset(self._files)

    def meta(self, name: str) -> torch.Tensor:
        """Return a tensor's shape and dtype, as a tensor on torch's meta device; reads nothing else of it."""
        tensor = self._files[name].get_slice(name)
        shape = tensor.get_shape()
        dtype = (tensor[:0] if shape else self._files[name].get_tensor(name)).dtype
        return torch.empty(shape, dtype=dtype, device="meta")

    def read(self, name: str, *, dim: int = 0, part: int = 0, parts: int = 1) -> torch.Tensor:
        """Read the part-th of equal parts along a dimension, and only its bytes.

        Raises:
            ReplayError: no such tensor, or a size that the parts do not divide.
        """
        if name not in self._files:
            raise ReplayError(f"{self.folder}: has no tensor {name!r}")
        if parts == 1:
            whole: torch.Tensor = self._files[name].get_tensor(name)
            return whole
        tensor = self._files[name].get_slice(name)
        shape = tensor.get_shape()
        if shape[dim] % parts:
            raise ReplayError(f"{name}: size {shape[dim]} of dimension {dim} is not a multiple of {parts} ranks")
        size = shape[dim] // parts
        cut = slice(part * size, (part + 1) * size)
        data: torch.Tensor = tensor[cut] if dim == 0 else tensor[:, cut]
        return data
