"""Read a Hugging Face checkpoint: its config, and parts of its tensors without the rest."""

import json
from collections.abc import Mapping
from contextlib import ExitStack
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

    def read(self, name: str, *, dim: int = 0, part: int = 0, parts: int = 1) -> torch.Tensor:
        """Read the part-th of equal parts along a dimension, and only its bytes.

        Raises:
            ReplayError: no such tensor, or a size that the parts do not divide.
        """
        if name not in self._files:
            raise ReplayError(f"{self.folder}: has no tensor {name!r}")
        tensor = self._files[name].get_slice(name)
        shape = tensor.get_shape()
        if shape[dim] % parts:
            raise ReplayError(f"{name}: size {shape[dim]} of dimension {dim} is not a multiple of {parts} ranks")
        size = shape[dim] // parts
        cut = slice(part * size, (part + 1) * size)
        data: torch.Tensor = tensor[cut] if dim == 0 else tensor[:, cut]
        return data
