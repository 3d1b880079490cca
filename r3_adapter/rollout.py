"""Samples: what a rollout hands to the trainer, and their form in a folder.

R: response tokens of a sample.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, overload
from zlib import crc32

import numpy as np
import numpy.typing as npt

from r3_adapter.codec import decode, encode
from r3_adapter.errors import TraceError, check_whole, show
from r3_adapter.frozen import freeze, is_frozen
from r3_adapter.trace import NOT_CAPTURED, RoutingTrace
from r3_adapter.wire import parse_json, read_tensors, write_tensors

_REST = "logprobs.safetensors"
"""The file of a folder with all that is not in the traces."""

_MAX_HEADER = 1 << 26
"""Bytes of that file's header, which has some numbers of each sample."""


@dataclass(frozen=True, eq=False)
class Sample:
    """One prompt and response.

    trace: the routes of prompt and response; its token_ids are both.
    num_prompt_tokens: how many of the tokens are the prompt's.
    logprobs: [R] float32; the rollout's log-probability of each response token; 0 where it was not sampled.
    sampled: [R] bool; whether the policy sampled the token. A tool's answer between two turns was not, and is not
        trained on. Default: all were.
    payload_bytes: size of the routes as they left the engine, before base64; 0 where not known.
    temperature: of the distribution that `logprobs` are of; the trainer scores the sample at it.

    Raises:
        TraceError: lengths that do not fit together, log-probabilities that are not finite or above 0, or a temperature
            that is not positive and finite.
    """

    trace: RoutingTrace
    num_prompt_tokens: int
    logprobs: npt.NDArray[np.float32]
    payload_bytes: int = 0
    sampled: npt.NDArray[np.bool_] = None  # type: ignore[assignment]
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.trace, RoutingTrace):
            raise TraceError(f"trace ({show(self.trace)}) is not a RoutingTrace")
        for name in ("num_prompt_tokens", "payload_bytes"):
            object.__setattr__(self, name, check_whole(name, getattr(self, name), 0, error=TraceError))
        object.__setattr__(self, "logprobs", _frozen_vector("logprobs", self.logprobs, np.float32))
        if self.sampled is None:
            object.__setattr__(self, "sampled", np.ones(len(self.logprobs), np.bool_))
        object.__setattr__(self, "sampled", _frozen_vector("sampled", self.sampled, np.bool_))
        if self.sampled.shape != self.logprobs.shape:
            raise TraceError(f"sampled of shape {self.sampled.shape} != {self.logprobs.shape} of logprobs")
        total = self.num_prompt_tokens + len(self.logprobs)
        if self.num_prompt_tokens < 1 or total != self.trace.num_tokens:
            raise TraceError(
                f"prompt ({self.num_prompt_tokens}) + response ({len(self.logprobs)}) tokens != {self.trace.num_tokens}"
            )
        if type(self.temperature) not in (int, float) or not 0 < self.temperature < math.inf:
            raise TraceError(f"temperature {show(self.temperature)} is not a positive, finite number")
        bad = np.flatnonzero(~(np.isfinite(self.logprobs) & (self.logprobs <= 0)))
        if len(bad):
            raise TraceError(
                f"logprobs[{bad[0]}] ({self.logprobs[bad[0]]}) of token {self.num_prompt_tokens + bad[0]} is no "
                "log-probability, finite and at most 0"
            )

    @property
    def num_response_tokens(self) -> int:
        """Number of tokens behind the prompt, those of later turns' prompts among them."""
        return len(self.logprobs)

    def append_tokens(self, token_ids: Sequence[int] | npt.NDArray[np.integer]) -> "Sample":
        """Return the sample with tokens behind it that the policy did not sample and no engine computed.

        token_ids: [N] integers from 0 to 2**31 - 1.

        Raises:
            TraceError: what are no token ids.
        """
        trace = self.trace.append_tokens(token_ids)
        count = trace.num_tokens - self.trace.num_tokens
        logprobs = np.append(self.logprobs, np.zeros(count, np.float32))
        return replace(self, trace=trace, logprobs=logprobs, sampled=np.append(self.sampled, np.zeros(count, np.bool_)))


def _frozen_vector(name: str, array: object, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Return a copy that stays as it is."""
    if not isinstance(array, np.ndarray) or array.dtype != dtype:
        raise TraceError(f"{name}: dtype {getattr(array, 'dtype', type(array).__name__)} != {np.dtype(dtype)}")
    if array.ndim != 1:
        raise TraceError(f"{name}: shape {array.shape} has {array.ndim} dimensions != 1")
    return array if is_frozen(array) else freeze(array.copy())


def unrouted(tokens: Sequence[int], sampled: Sequence[bool]) -> Sample:
    """Return a sample without routes and log-probabilities, for supervised training.

    sampled: for each token, whether it is trained on; the first such token ends the prompt.

    Raises:
        TraceError: tokens and marks differ in number, or no token is trained on.
    """
    trained = np.asarray(sampled, np.bool_)
    if len(trained) != len(tokens):
        raise TraceError(f"{len(tokens)} tokens != {len(trained)} marks in sampled")
    if not trained.any():
        raise TraceError(f"none of the {len(tokens)} tokens is trained on")
    num_prompt_tokens = int(trained.argmax())
    trace = RoutingTrace(
        topk_ids=np.zeros((len(tokens), 1, 1), np.uint8),
        token_ids=np.asarray(tokens, np.int32),
        version_ids=np.full(len(tokens), NOT_CAPTURED, np.int32),
        layer_ids=np.zeros(1, np.int32),
        num_experts=1,
        weight_versions=(),
    )
    response = trained[num_prompt_tokens:]
    return Sample(trace, num_prompt_tokens, np.zeros(len(response), np.float32), 0, response)


def save_samples(folder: Path, samples: Sequence[Sample], *, coded: bool = False) -> None:
    """Write samples to a folder: a trace file for each, and one file with the rest, which comes last.

    coded: write routes as sets of experts, in the smaller form of r3_adapter.codec: for samples that are kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Without it there is no folder of samples, should this end half-way.
    (folder / _REST).unlink(missing_ok=True)
    checksums = []
    for index, sample in enumerate(samples):
        data = encode(sample.trace) if coded else sample.trace.to_bytes()
        _trace_path(folder, index).write_bytes(data)
        checksums.append(crc32(data))
    tensors = {
        "logprobs": np.concatenate([np.zeros(0, np.float32), *(sample.logprobs for sample in samples)]),
        "sampled": np.concatenate([np.zeros(0, np.bool_), *(sample.sampled for sample in samples)]),
        "checksums": np.array(checksums, np.uint32),
    }
    numbers = [[sample.num_prompt_tokens, sample.num_response_tokens, sample.payload_bytes] for sample in samples]
    metadata = {
        "samples": json.dumps(numbers),
        "coded": json.dumps(coded),
        "temperatures": json.dumps([sample.temperature for sample in samples]),
        "checksum": "",
    }
    beside = folder / f".{_REST}.new"
    beside.write_bytes(write_tensors(tensors, metadata, max_header=_MAX_HEADER))
    beside.replace(folder / _REST)


def load_samples(folder: Path) -> list[Sample]:
    """Read all samples that save_samples wrote.

    Raises:
        TraceError: a file is missing or damaged.
    """
    return list(SampleFolder(folder))


class SampleFolder(Sequence[Sample]):
    """The samples that save_samples wrote to a folder; the routes of each are read when it is asked for.

    Raises:
        TraceError: a file is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder = Path(folder)
        path = folder / _REST
        try:
            data = path.read_bytes()
        except OSError as error:
            raise TraceError(f"{folder}: samples cannot be read: {error}") from error
        self._arrays, metadata = read_tensors(
            data, str(path), None, ("logprobs", "sampled"), optional=["checksums"], max_header=_MAX_HEADER
        )
        if "checksums" in self._arrays and "checksum" not in metadata:
            raise TraceError(f"{path}: no checksum in the header")
        self._numbers = _read_numbers(metadata, str(path))
        if type(coded := _read_entry(metadata, "coded", "false", str(path))) is not bool:
            raise TraceError(f"{path}: coded {show(coded)} is neither true nor false")
        self._coded = coded
        # Folders of before it was kept are of temperature 1, the only one that was scored rightly.
        self._temperatures = _read_entry(metadata, "temperatures", json.dumps([1.0] * len(self)), str(path))
        self._starts = list(accumulate((count for _, count, _ in self._numbers), initial=0))
        for name, want in {"logprobs": np.float32, "sampled": np.bool_, "checksums": np.uint32}.items():
            if name in self._arrays and (array := self._arrays[name]).dtype != want:
                raise TraceError(f"{path}: {name}: dtype {array.dtype} != {np.dtype(want)}")
        total, lengths = self._starts[-1], {name: array.shape for name, array in self._arrays.items()}
        if lengths["logprobs"] != (total,) or lengths["sampled"] != (total,):
            raise TraceError(f"{path}: {show(lengths['logprobs'])} log-probabilities != {total} response tokens")
        if lengths.get("checksums", (len(self),)) != (len(self),):
            raise TraceError(f"{path}: {show(lengths['checksums'])} checksums != {len(self)} samples")
        if type(self._temperatures) is not list or len(self._temperatures) != len(self):
            raise TraceError(f"{path}: temperatures {show(self._temperatures)} are not those of {len(self)} samples")

    def __len__(self) -> int:
        return len(self._numbers)

    def num_tokens(self, index: int) -> int:
        """Return the number of tokens of a sample, prompt and response, without reading it."""
        num_prompt_tokens, num_response_tokens, _ = self._numbers[index]
        return num_prompt_tokens + num_response_tokens

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        num_prompt_tokens, num_response_tokens, payload_bytes = self._numbers[index]
        number = index % len(self)
        place = _trace_path(self.folder, number)
        try:
            data = place.read_bytes()
        except OSError as error:
            raise TraceError(f"{self.folder}: samples cannot be read: {error}") from error
        if "checksums" in self._arrays and crc32(data) != (want := self._arrays["checksums"][number]):
            raise TraceError(f"{place}: checksum {crc32(data):08x} != {want:08x} of sample {number} in {_REST}")
        trace = (decode if self._coded else RoutingTrace.from_bytes)(data, place=str(place))
        here = slice(self._starts[number], self._starts[number] + num_response_tokens)
        logprobs, sampled = self._arrays["logprobs"][here], self._arrays["sampled"][here]
        try:
            return Sample(trace, num_prompt_tokens, logprobs, payload_bytes, sampled, self._temperatures[number])
        except TraceError as error:
            raise TraceError(f"{self.folder}: sample {number}: {error}") from error


def _read_entry(metadata: Mapping[str, str], name: str, default: str, place: str) -> Any:
    return parse_json(metadata.get(name, default), f"{place}: {name}")


def _read_numbers(metadata: Mapping[str, str], place: str) -> list[list[int]]:
    """Return prompt tokens, response tokens and payload bytes of each sample."""
    found = _read_entry(metadata, "samples", "null", place)
    if not isinstance(found, list):
        raise TraceError(f"{place}: samples {show(found)} are not a list")
    for number, counts in enumerate(found):
        good = isinstance(counts, list) and len(counts) == 3
        if not good or not all(type(count) is int and 0 <= count < 1 << 62 for count in counts):
            raise TraceError(f"{place}: sample {number}: {show(counts)} are not three whole numbers from 0")
    return found


def sample_folders(paths: Sequence[Path]) -> list[SampleFolder]:
    """Open folders of samples; a path may also be a folder of such folders, taken in the order of their names.

    Raises:
        TraceError: a path without samples, or a file that is missing or damaged.
    """
    found = []
    for path in paths:
        folders = [path] if (path / _REST).is_file() else sorted(file.parent for file in path.glob(f"*/{_REST}"))
        if not folders:
            raise TraceError(f"{path}: neither a folder of samples nor one of such folders")
        found += [SampleFolder(folder) for folder in folders]
    return found


def _trace_path(folder: Path, index: int) -> Path:
    return folder / f"{index:06d}.trace.safetensors"
