"""A smaller wire form: each route's experts as the rank of their set, and a prefix that traces share only once.

A route of 8 of 128 experts takes 41 bits instead of 64. The order of a route's ids is lost: they come back sorted.
S: tokens of a sample; M: MoE layers; K: experts a token; E: experts of a layer; N: traces; R: rows that are coded.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from r3_adapter import _core
from r3_adapter.errors import TraceError, show
from r3_adapter.frozen import freeze
from r3_adapter.trace import RoutingTrace, check_one_model, ids_dtype, model_metadata, read_model
from r3_adapter.wire import Data, parse_json, read_tensors, whole_number, write_tensors

FORMAT = "r3.routing_set/1"
MOST_GROWTH = 256
"""How many times the size of a message its traces may take, unless the reader says otherwise: a message of a few bytes
can ask for any amount. A group of 64 samples with a long prompt takes about 100 times as much."""
_FREE_BYTES = 1 << 20
"""What they may take in any case."""

_TOKEN_BYTES = 8
"""Of a token's id and version."""

_TENSORS = ("codes", "layer_ids", "num_shared", "num_tokens", "places", "token_ids", "version_ids")


def encode(trace: RoutingTrace) -> bytes:
    """Return the wire form of one trace; see `encode_all`."""
    return encode_all([trace])


def decode(data: Data, *, place: str = "trace", max_bytes: int | None = None) -> RoutingTrace:
    """Return the trace of a wire form that holds just one; see `decode_all`.

    Raises:
        TraceError: bytes that are no wire form, or of another number of traces.
    """
    traces = decode_all(data, place=place, max_bytes=max_bytes)
    if len(traces) != 1:
        raise TraceError(f"{place}: {len(traces)} traces != 1")
    return traces[0]


def encode_all(traces: Sequence[RoutingTrace]) -> bytes:
    """Return the wire form of traces of one model; prompts of a group and earlier turns are in it once.

    It is safetensors with num_experts, topk, model and each trace's weight_versions and digest as metadata. Traces lie
    in it in an order in which each shares as many first tokens with the one before it as with any: a token is shared if
    it, its version's name and its experts are the same, and so are those before it.

        codes: [bytes] uint8; the ranks of all layers of the captured tokens that are not shared, bit after bit.
        token_ids, version_ids: [R] int32; of the tokens that are not shared, as in the trace.
        num_tokens, num_shared, places: [N] int32; tokens of a trace, of which so many are shared with the one before;
            which of the traces it is.
        layer_ids: [M] int32.

    Raises:
        TraceError: no traces, traces of several models, K > 16 or E > 1024, or more traces, versions or tokens that are
            alike than `decode_all` takes from one message.
    """
    if not traces:
        raise TraceError("no traces to encode")
    first = traces[0]
    check_one_model(traces)
    places = sorted(range(len(traces)), key=lambda at: traces[at].token_ids.astype(">i4").tobytes())
    ordered = [_sorted_ids(traces[at]) for at in places]
    shared = [0, *(_num_shared(a, b) for a, b in pairwise(ordered))]
    rests = [(trace, slice(begin, None)) for trace, begin in zip(ordered, shared, strict=True)]
    topk_ids = np.concatenate([trace.topk_ids[rest] for trace, rest in rests])
    version_ids = np.concatenate([trace.version_ids[rest] for trace, rest in rests])
    codes = np.empty(_num_code_bytes(version_ids, topk_ids.shape[1], first.num_experts, first.topk), dtype=np.uint8)
    _core.encode_sets(topk_ids=topk_ids, version_ids=version_ids, num_experts=first.num_experts, codes=codes)
    tensors: dict[str, npt.NDArray[Any]] = {
        "codes": codes,
        "layer_ids": first.layer_ids,
        "num_shared": np.array(shared, dtype=np.int32),
        "num_tokens": np.array([trace.num_tokens for trace in ordered], dtype=np.int32),
        "places": np.array(places, dtype=np.int32),
        "token_ids": np.concatenate([trace.token_ids[rest] for trace, rest in rests]),
        "version_ids": version_ids,
    }
    metadata = {
        "format": FORMAT,
        "num_experts": str(first.num_experts),
        "topk": str(first.topk),
        "weight_versions": json.dumps([trace.weight_versions for trace in ordered]),
        "digests": json.dumps([trace.digest() for trace in ordered]),
        **model_metadata(first.model),
    }
    data = write_tensors(tensors, metadata)
    grown = _num_grown_bytes(sum(trace.num_tokens for trace in traces), len(version_ids), first.topk_ids)
    _check_growth(grown, len(data))
    return data


def decode_all(data: Data, *, place: str = "traces", max_bytes: int | None = None) -> list[RoutingTrace]:
    """Return the traces of a wire form in their order, with the ids of each route sorted.

    max_bytes: most memory that their ids may take; default: MOST_GROWTH times the message for ids and tokens.

    Raises:
        TraceError: bytes that are no wire form, traces whose digests differ or whose ids would take more than
            max_bytes; names `place`.
    """
    arrays, metadata = read_tensors(data, place, FORMAT, _TENSORS)
    try:
        return _Decoder(arrays, dict(metadata), memoryview(data).nbytes, max_bytes).traces()
    except KeyError as error:
        raise TraceError(f"{place}: no {error.args[0]} in the header") from error
    except ValueError as error:
        raise TraceError(f"{place}: {error}") from error


class _Decoder:
    """The checked parts of a wire form; anything wrong raises ValueError, an entry that is not there KeyError."""

    def __init__(
        self, arrays: dict[str, npt.NDArray[Any]], metadata: dict[str, str], size: int, max_bytes: int | None
    ) -> None:
        for name, array in arrays.items():
            want = np.dtype(np.uint8 if name == "codes" else np.int32)
            if array.ndim != 1 or array.dtype != want:
                raise TraceError(f"{name}: {array.dtype} of {array.ndim} dimensions != {want} of 1")
        self.arrays = {name: np.require(array, requirements=["C", "A"]) for name, array in arrays.items()}
        self.num_experts, self.topk = (whole_number(metadata[name], name) for name in ("num_experts", "topk"))
        self.bits = _core.set_bits(self.num_experts, self.topk)
        self.tables, self.digests = (parse_json(metadata[name], name) for name in ("weight_versions", "digests"))
        self.model = read_model(metadata)
        self.num_tokens, self.num_shared = self.arrays["num_tokens"].tolist(), self.arrays["num_shared"].tolist()
        self._check(size, max_bytes)

    def _check(self, message_size: int, max_bytes: int | None) -> None:
        count, rests = len(self.num_tokens), len(self.arrays["token_ids"])
        lengths = {name: len(self.arrays[name]) for name in ("num_shared", "places")}
        for name, parts in (("weight_versions", self.tables), ("digests", self.digests)):
            lengths[name] = len(parts) if isinstance(parts, list) else -1
        for name, length in lengths.items():
            if length != count:
                raise TraceError(f"{name}: length {length} != {count} of num_tokens")
        if sorted(self.arrays["places"].tolist()) != list(range(count)):
            raise TraceError(f"places {self.arrays['places'].tolist()[:16]} are not the numbers of {count} traces")
        for number, (have, total, before) in enumerate(
            zip(self.num_shared, self.num_tokens, [0, *self.num_tokens], strict=False)
        ):
            if not 0 <= have <= min(total, before):
                raise TraceError(f"num_shared ({have}) of {total} tokens outside 0 to {before} of the trace before")
            if not (isinstance(self.tables[number], list) and all(isinstance(v, str) for v in self.tables[number])):
                raise TraceError(f"weight_versions {show(self.tables[number])} are not a list of strings")
        if (found := sum(self.num_tokens) - sum(self.num_shared)) != rests or len(self.arrays["version_ids"]) != rests:
            raise TraceError(
                f"token_ids and version_ids: lengths {rests}, {len(self.arrays['version_ids'])} != {found}"
            )
        size = self.topk * len(self.arrays["layer_ids"]) * ids_dtype(self.num_experts).itemsize
        total = sum(self.num_tokens) + rests
        if max_bytes is None:
            _check_growth(total * (size + _TOKEN_BYTES), message_size)
        elif total * size > max_bytes:
            raise TraceError(f"{total * size} bytes of ids > max_bytes ({max_bytes})")

    def traces(self) -> list[RoutingTrace]:
        dtype, rests = ids_dtype(self.num_experts), len(self.arrays["token_ids"])
        topk_ids = np.empty((rests, len(self.arrays["layer_ids"]), self.topk), dtype=dtype)
        _core.decode_sets(
            codes=self.arrays["codes"],
            version_ids=self.arrays["version_ids"],
            num_experts=self.num_experts,
            topk_ids=topk_ids,
        )
        topk_ids = freeze(topk_ids)
        traces: list[RoutingTrace] = []
        at = 0
        for number, (total, shared) in enumerate(zip(self.num_tokens, self.num_shared, strict=True)):
            rest = slice(at, at + total - shared)
            at += total - shared
            parts = topk_ids[rest], self.arrays["token_ids"][rest], self.arrays["version_ids"][rest]
            table = tuple(self.tables[number])
            if shared:
                parts = _joined(traces[-1], shared, table, parts)
            trace = RoutingTrace(*parts, self.arrays["layer_ids"], self.num_experts, table, self.model)
            if (found := trace.digest()) != self.digests[number]:
                raise TraceError(f"digest {found} of trace {number} != {show(self.digests[number])}")
            traces.append(trace)
        places = self.arrays["places"].tolist()
        return [trace for _, trace in sorted(zip(places, traces, strict=True), key=lambda pair: pair[0])]


Parts = tuple[npt.NDArray[Any], npt.NDArray[np.int32], npt.NDArray[np.int32]]
"""topk_ids, token_ids, version_ids."""


def _num_grown_bytes(num_tokens: int, num_rest: int, topk_ids: npt.NDArray[Any]) -> int:
    """Return what traces take while they are decoded: all tokens, and once more those that are not shared."""
    row = topk_ids.shape[1] * topk_ids.shape[2] * topk_ids.itemsize
    return int((num_tokens + num_rest) * (row + _TOKEN_BYTES))


def _check_growth(num_bytes: int, message_size: int) -> None:
    if num_bytes > (most := MOST_GROWTH * message_size + _FREE_BYTES):
        raise TraceError(
            f"ids and tokens of {num_bytes} bytes > {most}, which is {MOST_GROWTH} times a message of {message_size} "
            f"bytes and {_FREE_BYTES} more"
        )


def _joined(before: RoutingTrace, shared: int, table: tuple[str, ...], parts: Parts) -> Parts:
    """Return the first tokens of a trace, with versions of another table, and what follows them."""
    version_ids = _renamed(before, table)[:shared]
    if np.any((version_ids < 0) & before.captured[:shared]):
        raise TraceError(f"a shared token has a version that is none of {show(table)}")
    return (
        freeze(np.concatenate([before.topk_ids[:shared], parts[0]])),
        freeze(np.concatenate([before.token_ids[:shared], parts[1]])),
        freeze(np.concatenate([version_ids, parts[2]])),
    )


def _renamed(trace: RoutingTrace, table: tuple[str, ...]) -> npt.NDArray[np.int32]:
    """Return the trace's version_ids in another table; -1 where a version is not in it."""
    first = {version: place for place, version in reversed(list(enumerate(table)))}
    places = [first.get(version, -1) for version in trace.weight_versions]
    return np.array([*places, -1], dtype=np.int32)[trace.version_ids]


def _num_shared(before: RoutingTrace, trace: RoutingTrace) -> int:
    """Return how many first tokens of a trace are just those of the one before it, sorted ids and versions included."""
    length = min(before.num_tokens, trace.num_tokens)
    same = before.token_ids[:length] == trace.token_ids[:length]
    length = length if same.all() else int(same.argmin())
    same = _renamed(before, trace.weight_versions)[:length] == trace.version_ids[:length]
    same &= before.captured[:length] == trace.captured[:length]
    length = length if same.all() else int(same.argmin())
    same = (before.topk_ids[:length] == trace.topk_ids[:length]).all(axis=(1, 2))
    return length if same.all() else int(same.argmin())


def _sorted_ids(trace: RoutingTrace) -> RoutingTrace:
    """Return the trace as it comes back: with the ids of each route sorted."""
    return replace(trace, topk_ids=freeze(np.sort(trace.topk_ids, axis=2)))


def _num_code_bytes(version_ids: npt.NDArray[np.int32], num_layers: int, num_experts: int, topk: int) -> int:
    routes = int(np.count_nonzero(version_ids >= 0)) * num_layers
    try:
        return (routes * _core.set_bits(num_experts, topk) + 7) // 8
    except ValueError as error:
        raise TraceError(f"{error}") from error
