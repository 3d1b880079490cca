"""RoutingTrace: the experts that a rollout used for one sample, bound to its tokens; the one type that crosses modules.

S: tokens of the sample; M: its MoE layers; K: experts a token; E: experts of a layer.
"""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from r3_adapter import _core
from r3_adapter.compiled import check_core
from r3_adapter.errors import TraceError, check_whole, show
from r3_adapter.frozen import freeze, is_frozen
from r3_adapter.wire import Data, parse_json, read_tensors, whole_number, write_tensors

check_core(_core)

FORMAT = "r3.routing_trace/1"
NOT_CAPTURED = -1
_RANKS = {"topk_ids": 3, "token_ids": 1, "version_ids": 1, "layer_ids": 1}
_PER_TOKEN = ("topk_ids", "token_ids", "version_ids")


def ids_dtype(num_experts: int) -> np.dtype[Any]:
    """Return the dtype of expert ids: uint8 for E <= 256, else uint16.

    Raises:
        TraceError: num_experts outside 1 to 65536.
    """
    if not 1 <= num_experts <= 1 << 16:
        raise TraceError(f"num_experts ({num_experts}) outside 1 to {1 << 16}")
    return np.dtype(np.uint8 if num_experts <= 256 else np.uint16)


class ModelId(NamedTuple):
    """Sizes that tell a checkpoint's model from others: decoder layers (without MTP), hidden size, vocabulary."""

    num_layers: int
    hidden_size: int
    vocab_size: int


@dataclass(frozen=True, eq=False)
class RoutingTrace:
    """The routes of one sample. Arrays are C-contiguous and checked when the trace is made, and never change again.

    topk_ids: [S, M, K] uint8 (E <= 256) or uint16; distinct ids in each route, 0 in a row that was not captured.
    token_ids: [S] int32; the tokens that were fed to the engine at these rows.
    version_ids: [S] int32; index into weight_versions of the weights that computed the row, -1 where it was not
        captured (the last sampled token was never fed forward, so it has no row).
    layer_ids: [M] int32; global decoder layer (from 0) of each MoE layer, increasing.
    num_experts: E.
    weight_versions: the engine's names of the weights that computed rows of this sample.
    model: the model that computed them, which has these layers and tokens; None where the engine does not say.

    Raises:
        TraceError: arrays that do not fit together, an id out of range or twice in a route; names place and operands.
    """

    topk_ids: npt.NDArray[Any]
    token_ids: npt.NDArray[np.int32]
    version_ids: npt.NDArray[np.int32]
    layer_ids: npt.NDArray[np.int32]
    num_experts: int
    weight_versions: tuple[str, ...]
    model: ModelId | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_experts", check_whole("num_experts", self.num_experts, error=TraceError))
        want: dict[str, np.dtype[Any]] = dict.fromkeys(_RANKS, np.dtype(np.int32))
        want["topk_ids"] = ids_dtype(self.num_experts)
        for name, dtype in want.items():
            object.__setattr__(self, name, _as_frozen(name, getattr(self, name), dtype))
        _check_shapes(self)
        _check_values(self)
        _check_model(self)

    @property
    def num_tokens(self) -> int:
        """S, the tokens that the trace has a row for."""
        return int(self.topk_ids.shape[0])

    @property
    def topk(self) -> int:
        """K, the experts of a token in a layer."""
        return int(self.topk_ids.shape[2])

    @property
    def captured(self) -> npt.NDArray[np.bool_]:
        """[S] bool; whether the row holds a route."""
        return self.version_ids >= 0

    def rows(self, start: int, stop: int) -> "RoutingTrace":
        """Return the trace of the tokens from start up to stop, as a view; with none it stands for a padding sequence.

        Raises:
            TraceError: tokens that the trace does not have.
        """
        start, stop = check_whole("start", start, error=TraceError), check_whole("stop", stop, error=TraceError)
        if not 0 <= start <= stop <= self.num_tokens:
            raise TraceError(f"rows {start} to {stop} outside 0 to {self.num_tokens}")
        if stop - start == self.num_tokens:
            return self
        # All rows are checked already, so a part of them needs no check.
        part = object.__new__(RoutingTrace)
        part.__dict__.update({name: value for name, value in self.__dict__.items() if name != "_digest"})
        part.__dict__.update({name: getattr(self, name)[start:stop] for name in _PER_TOKEN})
        return part

    def append_tokens(self, token_ids: Sequence[int] | npt.NDArray[np.integer]) -> "RoutingTrace":
        """Return the trace with tokens at its end that no engine computed, such as an end token of the client's.

        Their rows count as not captured, so the trainer's routers route them live.

        token_ids: [N] integers from 0 to 2**31 - 1.

        Raises:
            TraceError: what are no token ids.
        """
        try:
            tokens = np.asarray(token_ids)
        except ValueError:  # lists of several lengths
            tokens = np.asarray(None)
        if tokens.ndim == 1 and tokens.size == 0:
            return self
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu" or tokens.min() < 0 or tokens.max() >= 1 << 31:
            raise TraceError(f"token_ids {show(token_ids)} are not a list of whole numbers from 0 to {(1 << 31) - 1}")
        rest = replace(
            self,
            topk_ids=np.zeros((len(tokens), *self.topk_ids.shape[1:]), self.topk_ids.dtype),
            token_ids=tokens.astype(np.int32),
            version_ids=np.full(len(tokens), NOT_CAPTURED, np.int32),
        )
        return concatenate([self, rest])

    def at_layers(self, layer_ids: Collection[int]) -> "RoutingTrace":
        """Return the trace of some of its layers, such as those of a pipeline stage.

        Raises:
            TraceError: a layer that the trace does not have.
        """
        known = set(self.layer_ids.tolist())
        layers = sorted({check_whole("layer", layer, error=TraceError) for layer in layer_ids})
        for layer in layers:
            if layer not in known:
                raise TraceError(f"layer {show(layer)} is none of the trace's {self.layer_ids.tolist()}")
        wanted = np.array(layers, np.int32)
        if len(wanted) == len(self.layer_ids):
            return self
        chosen = freeze(np.take(self.topk_ids, np.searchsorted(self.layer_ids, wanted), axis=1))
        return replace(self, topk_ids=chosen, layer_ids=wanted)

    def __reduce__(self) -> tuple[Any, ...]:
        # What is unpickled is checked and frozen as any other, and knows no digest.
        return RoutingTrace, tuple(getattr(self, field.name) for field in fields(self))

    def __deepcopy__(self, memo: object) -> "RoutingTrace":
        return self

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RoutingTrace):
            return NotImplemented
        same = all(getattr(self, name) == getattr(other, name) for name in ("num_experts", "weight_versions", "model"))
        return same and all(np.array_equal(getattr(self, name), getattr(other, name)) for name in _RANKS)

    __hash__ = None  # type: ignore[assignment]

    def digest(self) -> str:
        """Return the sha256 over everything that the trace says; computed once."""
        if "_digest" in self.__dict__:
            return str(self.__dict__["_digest"])
        model = [] if self.model is None else [self.model]
        state = hashlib.sha256(json.dumps([FORMAT, self.num_experts, self.weight_versions, *model]).encode())
        for name in _RANKS:
            array = getattr(self, name)
            state.update(f"{name}{array.shape}{array.dtype.str}".encode())
            state.update(array)
        object.__setattr__(self, "_digest", state.hexdigest())
        return self.digest()

    def to_bytes(self) -> bytes:
        """Return the file and wire form: safetensors; its metadata are num_experts, weight_versions, model, digest.

        Raises:
            TraceError: more weight versions than a reader takes.
        """
        metadata = {
            "format": FORMAT,
            "num_experts": str(self.num_experts),
            "weight_versions": json.dumps(self.weight_versions),
            "digest": self.digest(),
            **model_metadata(self.model),
        }
        return write_tensors({name: getattr(self, name) for name in _RANKS}, metadata)

    @classmethod
    def from_bytes(cls, data: Data, *, place: str = "trace") -> "RoutingTrace":
        """Read the wire form; an engine writes a checksum, everybody else a digest.

        data: the arrays are views of it if nothing can change it, as bytes; what else can is copied.

        Raises:
            TraceError: bytes that are no trace, or whose digest or checksum differs or is missing; names `place`.
        """
        arrays, metadata = read_tensors(data, place, FORMAT, _RANKS)
        if not metadata.keys() & {"checksum", "digest"}:
            raise TraceError(f"{place}: neither a checksum nor a digest in the header")
        for name in ("num_experts", "weight_versions"):
            if name not in metadata:
                raise TraceError(f"{place}: no {name} in the header")
        try:
            versions = parse_json(metadata["weight_versions"], "weight_versions")
            if not (isinstance(versions, list) and all(isinstance(version, str) for version in versions)):
                raise TraceError(f"weight_versions {show(versions)} is not a list of strings")
            trace = cls(
                num_experts=whole_number(metadata["num_experts"], "num_experts"),
                weight_versions=tuple(versions),
                model=read_model(metadata),
                **arrays,
            )
        except TraceError as error:
            raise TraceError(f"{place}: {error}") from error
        if "digest" in metadata and metadata["digest"] != (found := trace.digest()):
            raise TraceError(f"{place}: digest {found} != {metadata['digest'][:64]} of its header")
        return trace


def concatenate(traces: Sequence[RoutingTrace]) -> RoutingTrace:
    """Return the rows of traces of one model, one after the other; `rows` gives each back.

    Raises:
        TraceError: no traces, or traces of several models.
    """
    if not traces:
        raise TraceError("no traces to concatenate")
    first = traces[0]
    if len(traces) == 1:
        return first
    check_one_model(traces)
    united = dict.fromkeys(name for trace in traces for name in trace.weight_versions)
    names = {name: number for number, name in enumerate(united)}
    return RoutingTrace(
        topk_ids=_joined([trace.topk_ids for trace in traces]),
        token_ids=_joined([trace.token_ids for trace in traces]),
        version_ids=_joined([_renamed(trace, names) for trace in traces]),
        layer_ids=first.layer_ids,
        num_experts=first.num_experts,
        weight_versions=tuple(names),
        model=first.model,
    )


def check_one_model(traces: Sequence[RoutingTrace]) -> None:
    """Refuse traces of several models.

    Raises:
        TraceError: Names the first that differs from trace 0.
    """
    shapes = [(trace.num_experts, trace.topk, trace.layer_ids.tolist()) for trace in traces]
    for number, shape in enumerate(shapes):
        if shape != shapes[0]:
            raise TraceError(f"num_experts, topk and layer_ids {shape} of trace {number} != {shapes[0]} of trace 0")
        if traces[number].model != traces[0].model:
            raise TraceError(f"model {traces[number].model} of trace {number} != {traces[0].model} of trace 0")


def model_metadata(model: ModelId | None) -> dict[str, str]:
    """Return the entry of a wire form's metadata that names the model; none where it is not known."""
    return {} if model is None else {"model": json.dumps(model._asdict())}


def read_model(metadata: Mapping[str, str]) -> ModelId | None:
    """Return the model that a wire form's metadata names; None where there is none.

    Raises:
        TraceError: an entry that is no model.
    """
    if "model" not in metadata:
        return None
    found = parse_json(metadata["model"], "model")
    if not isinstance(found, dict) or found.keys() != set(ModelId._fields):
        raise TraceError(f"model {show(found)} does not have just {', '.join(ModelId._fields)}")
    return ModelId(**found)


def _joined(arrays: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    return freeze(np.concatenate(arrays))


def _renamed(trace: RoutingTrace, names: Mapping[str, int]) -> npt.NDArray[np.int32]:
    """Return version_ids as indices into other names."""
    # Index -1, "not captured", stays: it picks the last entry.
    index = np.array([*(names[name] for name in trace.weight_versions), NOT_CAPTURED], np.int32)
    found: npt.NDArray[np.int32] = index[trace.version_ids]
    return found


def _as_frozen(name: str, array: Any, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    if not isinstance(array, np.ndarray) or array.dtype != dtype:
        raise TraceError(f"{name}: dtype {getattr(array, 'dtype', type(array).__name__)} != {dtype}")
    if array.ndim != _RANKS[name]:
        raise TraceError(f"{name}: shape {array.shape} has {array.ndim} dimensions != {_RANKS[name]}")
    if is_frozen(array) and array.flags.c_contiguous and array.flags.aligned:
        frozen: npt.NDArray[Any] = array
        return frozen
    return freeze(array.copy(order="C"))


def _check_shapes(trace: RoutingTrace) -> None:
    num_tokens, num_layers, topk = trace.topk_ids.shape
    for name, want in (("token_ids", num_tokens), ("version_ids", num_tokens), ("layer_ids", num_layers)):
        if len(getattr(trace, name)) != want:
            raise TraceError(f"{name}: length {len(getattr(trace, name))} != {want} of topk_ids {trace.topk_ids.shape}")
    if not 1 <= topk <= trace.num_experts:
        raise TraceError(f"topk ({topk}) outside 1 to num_experts ({trace.num_experts})")
    if num_layers < 1 or trace.layer_ids[0] < 0 or np.any(trace.layer_ids[1:] <= trace.layer_ids[:-1]):
        raise TraceError(f"layer_ids {trace.layer_ids.tolist()} are not increasing from 0")


def _check_model(trace: RoutingTrace) -> None:
    model = trace.model
    if model is None:
        return
    if not isinstance(model, ModelId):
        raise TraceError(f"model {model!r} is not a ModelId")
    for name, number in model._asdict().items():
        if type(number) is not int or not 1 <= number < 1 << 31:
            raise TraceError(f"model: {name} ({show(number)}) is not a whole number from 1 to {(1 << 31) - 1}")
    if trace.layer_ids[-1] >= model.num_layers:
        raise TraceError(f"layer {trace.layer_ids[-1]} is none of the {model.num_layers} layers of the model")
    bad = np.flatnonzero(trace.token_ids >= model.vocab_size)
    if len(bad):
        raise TraceError(f"token_ids[{bad[0]}] ({trace.token_ids[bad[0]]}) >= vocab_size ({model.vocab_size})")


def _check_values(trace: RoutingTrace) -> None:
    versions = trace.weight_versions
    if not isinstance(versions, tuple) or not all(isinstance(version, str) for version in versions):
        raise TraceError(f"weight_versions {versions!r} are not a tuple of strings")
    known = len(versions)
    bad = np.flatnonzero((trace.version_ids < NOT_CAPTURED) | (trace.version_ids >= known))
    if len(bad):
        raise TraceError(f"version_ids[{bad[0]}] ({trace.version_ids[bad[0]]}) is not one of {known} weight_versions")
    bad = np.flatnonzero(trace.token_ids < 0)
    if len(bad):
        raise TraceError(f"token_ids[{bad[0]}] ({trace.token_ids[bad[0]]}) < 0")
    where = _core.find_bad_route(trace.topk_ids, trace.version_ids, trace.num_experts)
    if where is None:
        return
    token, layer = where
    row = trace.topk_ids[token, layer].tolist()
    place = f"topk_ids at token {token}, layer {trace.layer_ids[layer]}: {row}"
    if trace.version_ids[token] < 0:
        raise TraceError(f"{place} is not 0, but the row was not captured")
    if max(row) >= trace.num_experts:
        raise TraceError(f"{place} has an id >= num_experts ({trace.num_experts})")
    raise TraceError(f"{place} has {len(set(row))} distinct ids != topk ({len(row)})")
