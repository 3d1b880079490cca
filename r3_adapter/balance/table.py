"""A placement of experts as a file beside a checkpoint, and as what weights and routes are permuted by.

L: MoE layers; E: experts of a layer. A slot is a place among a layer's experts in the trainer; slots of an expert
parallel rank lie next to each other.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from r3_adapter.errors import LayoutError, R3Error, TraceError, check_whole
from r3_adapter.frozen import freeze
from r3_adapter.trace import ModelId, model_metadata, read_model
from r3_adapter.wire import read_tensors, write_tensors

_FORMAT = "r3_placement/1"
FILE = "experts.placement"
"""Name of the file beside a checkpoint; its bytes are safetensors, which loaders of weights are not to look at."""
_MOST_EXPERTS = 1 << 16


@dataclass(frozen=True, eq=False)
class Table:
    """A placement of a model's experts.

    expert_at: [L, E] int32; the expert of each slot, a permutation in each layer.
    layer_ids: [L] int32; global decoder layer of each MoE layer, increasing.
    model: of which it is; None where that is not known.

    Raises:
        LayoutError: arrays of another dtype or shape, or a layer that is no permutation; names layer and slot.
    """

    expert_at: npt.NDArray[np.int32]
    layer_ids: npt.NDArray[np.int32]
    model: ModelId | None = None
    _slot_of: npt.NDArray[np.int32] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for name, dims in (("layer_ids", 1), ("expert_at", 2)):
            array = getattr(self, name)
            if not isinstance(array, np.ndarray) or array.dtype != np.int32 or array.ndim != dims:
                found = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
                raise LayoutError(f"{name}: {found} is no int32 array of {dims} dimensions")
            object.__setattr__(self, name, freeze(np.array(array, order="C")))
        layers, (num_layers, num_experts) = self.layer_ids, self.expert_at.shape
        if len(layers) != num_layers or not num_layers or not 1 <= num_experts <= _MOST_EXPERTS:
            raise LayoutError(f"{len(layers)} layer_ids and expert_at {self.expert_at.shape}: no table of a model")
        if layers[0] < 0 or np.any(layers[1:] <= layers[:-1]):
            raise LayoutError(f"layer_ids {layers.tolist()} are not increasing from 0")
        _check_permutations(layers, self.expert_at)
        object.__setattr__(self, "_slot_of", freeze(np.argsort(self.expert_at, axis=1).astype(np.int32)))

    @property
    def num_experts(self) -> int:
        """E, the experts of a layer."""
        return int(self.expert_at.shape[1])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Table) and all(
            np.array_equal(getattr(self, name), getattr(other, name)) for name in ("layer_ids", "expert_at")
        )

    def __hash__(self) -> int:
        return hash((self.layer_ids.tobytes(), self.expert_at.tobytes()))

    def row(self, layer: int) -> int:
        """Return the row of a global decoder layer.

        Raises:
            LayoutError: it is none of the placement's.
        """
        at = int(np.searchsorted(self.layer_ids, layer))
        if at == len(self.layer_ids) or self.layer_ids[at] != layer:
            raise LayoutError(f"layer {layer} is none of the MoE layers {self.layer_ids.tolist()} of the placement")
        return at

    def rows(self, layer_ids: Sequence[int]) -> npt.NDArray[np.int32]:
        """Return [len(layer_ids), E] int32 the expert of each slot."""
        return np.ascontiguousarray(self.expert_at[[self.row(layer) for layer in layer_ids]])

    def slots(self, layer_ids: Sequence[int]) -> npt.NDArray[np.int32]:
        """Return [len(layer_ids), E] int32 the slot of each expert, as `repack` takes it."""
        return np.ascontiguousarray(self._slot_of[[self.row(layer) for layer in layer_ids]])

    def digest(self) -> str:
        """Return 16 hexadecimal digits that tell placements apart."""
        return hashlib.sha256(self.layer_ids.tobytes() + self.expert_at.tobytes()).hexdigest()[:16]

    def check_groups(self, num_groups: int) -> None:
        """Refuse a placement that parts a router's groups, which it knows by their place.

        Raises:
            LayoutError: names the layer and the group's slots.
        """
        num_groups = check_whole("num_groups", num_groups, 1, error=LayoutError)
        if self.num_experts % num_groups:
            raise LayoutError(f"num_groups ({num_groups}) does not divide the {self.num_experts} experts of a layer")
        size = self.num_experts // num_groups
        groups = (self.expert_at // size).reshape(len(self.layer_ids), num_groups, size)
        parted = np.argwhere((groups != groups[:, :, :1]).any(axis=2))
        if len(parted):
            row, block = parted[0].tolist()
            raise LayoutError(
                f"layer {self.layer_ids[row]}: slots {block * size} to {(block + 1) * size - 1} have experts of "
                f"several of the {num_groups} groups that its router is limited to"
            )

    def to_bytes(self) -> bytes:
        """Return the file's bytes: safetensors with a checksum."""
        arrays = {"layer_ids": self.layer_ids, "expert_at": self.expert_at}
        return write_tensors(arrays, {"format": _FORMAT, "checksum": "", **model_metadata(self.model)})

    @classmethod
    def from_bytes(cls, data: bytes, place: str = "placement") -> "Table":
        """Read a file's bytes, which may be hostile.

        Raises:
            TraceError: bytes that are no placement, or whose checksum differs or is missing; names `place`.
        """
        arrays, metadata = read_tensors(data, place, _FORMAT, ("layer_ids", "expert_at"))
        if "checksum" not in metadata:
            raise TraceError(f"{place}: no checksum in the header")
        try:
            return cls(arrays["expert_at"], arrays["layer_ids"], read_model(metadata))
        except (LayoutError, TraceError) as error:
            raise TraceError(f"{place}: {error}") from error

    def save(self, path: Path) -> Path:
        """Write the file, which is there whole or not at all; return its path.

        Raises:
            R3Error: it cannot be written.
        """
        part = path.with_name(f"{path.name}.part")
        try:
            part.write_bytes(self.to_bytes())
            return part.rename(path)
        except OSError as error:
            raise R3Error(f"{path}: cannot be written: {error.strerror}") from error

    @classmethod
    def load(cls, path: Path) -> "Table":
        """Read a file.

        Raises:
            TraceError: it cannot be read, or is no placement.
        """
        try:
            data = path.read_bytes()
        except OSError as error:
            raise TraceError(f"{path}: cannot be read: {error.strerror}") from error
        return cls.from_bytes(data, str(path))


def in_order(layer_ids: Sequence[int], num_experts: int) -> Table:
    """Return the placement of experts that lie as the checkpoint has them."""
    layers = np.array(layer_ids, np.int32)
    return Table(np.tile(np.arange(num_experts, dtype=np.int32), (len(layers), 1)), layers)


def by_chance(layer_ids: Sequence[int], num_experts: int, seed: int, num_groups: int = 1) -> Table:
    """Return a placement by chance: whole groups, and the experts in each, change places."""
    rng, layers = np.random.default_rng(seed), np.array(layer_ids, np.int32)
    blocks = np.arange(num_experts, dtype=np.int32).reshape(num_groups, -1)
    rows = [rng.permuted(rng.permutation(blocks), axis=1).ravel() for _ in layers]
    return Table(np.stack(rows).astype(np.int32), layers)


def _check_permutations(layers: npt.NDArray[np.int32], expert_at: npt.NDArray[np.int32]) -> None:
    num_experts = expert_at.shape[1]
    for layer, experts in zip(layers.tolist(), expert_at, strict=True):
        outside = np.flatnonzero((experts < 0) | (experts >= num_experts))
        counts = np.bincount(np.delete(experts, outside), minlength=num_experts)
        if not len(outside) and counts.max() == 1:
            continue
        why = (
            f"({experts[outside[0]]}) lies at slot {outside[0]}"
            if len(outside)
            else f"{counts.argmax()} lies at {counts.max()} slots"
        )
        raise LayoutError(f"expert_at of layer {layer} is no permutation of {num_experts} experts: expert {why}")
