"""Samples: what a rollout hands to the trainer, and their form in a folder.

R: response tokens of a sample.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from r3_adapter.codec import decode, encode
from r3_adapter.errors import TraceError
from r3_adapter.trace import NOT_CAPTURED, RoutingTrace

_REST = "logprobs.safetensors"
"""The file of a folder with all that is not in the traces."""


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
        TraceError: lengths that do not fit together, or a temperature that is not positive and finite.
    """

    trace: RoutingTrace
    num_prompt_tokens: int
    logprobs: npt.NDArray[np.float32]
    payload_bytes: int = 0
    sampled: npt.NDArray[np.bool_] = None  # type: ignore[assignment]
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.sampled is None:
            object.__setattr__(self, "sampled", np.ones(len(self.logprobs), np.bool_))
        if self.sampled.shape != self.logprobs.shape:
            raise TraceError(f"sampled of shape {self.sampled.shape} != {self.logprobs.shape} of logprobs")
        total = self.num_prompt_tokens + len(self.logprobs)
        if self.num_prompt_tokens < 1 or total != self.trace.num_tokens:
            raise TraceError(
                f"prompt ({self.num_prompt_tokens}) + response ({len(self.logprobs)}) tokens != {self.trace.num_tokens}"
            )
        if type(self.temperature) not in (int, float) or not 0 < self.temperature < math.inf:
            raise TraceError(f"temperature {self.temperature!r} is not a positive, finite number")

    @property
    def num_response_tokens(self) -> int:
        return len(self.logprobs)


def unrouted(tokens: Sequence[int], sampled: Sequence[bool]) -> Sample:
    """Return a sample without routes and log-probabilities, for supervised training.

    sampled: for each token, whether it is to be learnt; the first such ends the prompt.
    """
    learnt = np.asarray(sampled, np.bool_)
    num_prompt_tokens = int(learnt.argmax())
    trace = RoutingTrace(
        topk_ids=np.zeros((len(tokens), 1, 1), np.uint8),
        token_ids=np.asarray(tokens, np.int32),
        version_ids=np.full(len(tokens), NOT_CAPTURED, np.int32),
        layer_ids=np.zeros(1, np.int32),
        num_experts=1,
        weight_versions=(),
    )
    response = learnt[num_prompt_tokens:]
    return Sample(trace, num_prompt_tokens, np.zeros(len(response), np.float32), 0, response)


def save_samples(folder: Path, samples: Sequence[Sample], *, coded: bool = False) -> None:
    """Write samples to a folder: a trace file for each, and one file with the rest, which comes last.

    coded: write routes as sets of experts, in the smaller form of r3_adapter.codec: for samples that are kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for index, sample in enumerate(samples):
        _trace_path(folder, index).write_bytes(encode(sample.trace) if coded else sample.trace.to_bytes())
    logprobs = np.concatenate([np.zeros(0, np.float32), *(sample.logprobs for sample in samples)])
    sampled = np.concatenate([np.zeros(0, np.bool_), *(sample.sampled for sample in samples)])
    numbers = [[sample.num_prompt_tokens, sample.num_response_tokens, sample.payload_bytes] for sample in samples]
    temperatures = [sample.temperature for sample in samples]
    metadata = {
        "samples": json.dumps(numbers),
        "coded": json.dumps(coded),
        "temperatures": json.dumps(temperatures),
    }
    save_file({"logprobs": logprobs, "sampled": sampled}, folder / _REST, metadata)


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
        from safetensors import safe_open

        self.folder = folder
        path = folder / _REST
        try:
            self._arrays = load_file(path)
            with safe_open(path, framework="np") as file:
                self._numbers: list[list[int]] = json.loads(file.metadata()["samples"])
                self._coded = bool(json.loads(file.metadata().get("coded", "false")))
                # Folders of before it was kept are of temperature 1, the only one that was scored rightly.
                self._temperatures: list[float] = json.loads(
                    file.metadata().get("temperatures", json.dumps([1.0] * len(self._numbers)))
                )
            total = len(self._arrays["logprobs"])
            self._starts = np.cumsum([0, *(num_response_tokens for _, num_response_tokens, _ in self._numbers)])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise TraceError(f"{folder}: samples cannot be read: {error}") from error
        if self._starts[-1] != total or len(self._arrays["sampled"]) != total:
            raise TraceError(f"{path}: {total} log-probabilities != {self._starts[-1]} response tokens")
        if type(self._temperatures) is not list or len(self._temperatures) != len(self._numbers):
            raise TraceError(f"{path}: temperatures {self._temperatures!r} are not those of {len(self)} samples")

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        num_prompt_tokens, num_response_tokens, payload_bytes = self._numbers[index]
        place = _trace_path(self.folder, index % len(self))
        try:
            read = decode if self._coded else RoutingTrace.from_bytes
            trace = read(place.read_bytes(), place=str(place))
        except OSError as error:
            raise TraceError(f"{self.folder}: samples cannot be read: {error}") from error
        here = slice(self._starts[index % len(self)], self._starts[index % len(self)] + num_response_tokens)
        logprobs, sampled = self._arrays["logprobs"][here], self._arrays["sampled"][here]
        return Sample(trace, num_prompt_tokens, logprobs, payload_bytes, sampled, self._temperatures[index])


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
