"""Samples: what a rollout hands to the trainer, and their form in a folder.

R: response tokens of a sample.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from r3_adapter.errors import TraceError
from r3_adapter.trace import NOT_CAPTURED, RoutingTrace


@dataclass(frozen=True, eq=False)
class Sample:
    """One prompt and response.

    trace: the routes of prompt and response; its token_ids are both.
    num_prompt_tokens: how many of the tokens are the prompt's.
    logprobs: [R] float32; the rollout's log-probability of each response token; 0 where it was not sampled.
    sampled: [R] bool; whether the policy sampled the token. A tool's answer between two turns was not, and is not
        trained on. Default: all were.
    payload_bytes: size of the routes as they left the engine, before base64; 0 where not known.

    Raises:
        TraceError: lengths that do not fit together.
    """

    trace: RoutingTrace
    num_prompt_tokens: int
    logprobs: npt.NDArray[np.float32]
    payload_bytes: int = 0
    sampled: npt.NDArray[np.bool_] = None  # type: ignore[assignment]

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


def save_samples(folder: Path, samples: Sequence[Sample]) -> None:
    """Write samples to a folder: a trace file for each, and one file with the rest."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, sample in enumerate(samples):
        _trace_path(folder, index).write_bytes(sample.trace.to_bytes())
    logprobs = np.concatenate([np.zeros(0, np.float32), *(sample.logprobs for sample in samples)])
    sampled = np.concatenate([np.zeros(0, np.bool_), *(sample.sampled for sample in samples)])
    numbers = [[sample.num_prompt_tokens, sample.payload_bytes] for sample in samples]
    save_file(
        {"logprobs": logprobs, "sampled": sampled}, folder / "logprobs.safetensors", {"samples": json.dumps(numbers)}
    )


def load_samples(folder: Path) -> list[Sample]:
    """Read samples that save_samples wrote.

    Raises:
        TraceError: a file is missing or damaged.
    """
    from safetensors import safe_open

    path = folder / "logprobs.safetensors"
    try:
        arrays = load_file(path)
        logprobs, sampled = arrays["logprobs"], arrays["sampled"]
        with safe_open(path, framework="np") as file:
            numbers = json.loads(file.metadata()["samples"])
        samples, at = [], 0
        for index, (num_prompt_tokens, payload_bytes) in enumerate(numbers):
            place = _trace_path(folder, index)
            trace = RoutingTrace.from_bytes(place.read_bytes(), place=str(place))
            stop = at + trace.num_tokens - num_prompt_tokens
            samples.append(Sample(trace, num_prompt_tokens, logprobs[at:stop], payload_bytes, sampled[at:stop]))
            at = stop
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise TraceError(f"{folder}: samples cannot be read: {error}") from error
    if at != len(logprobs):
        raise TraceError(f"{path}: {len(logprobs)} log-probabilities != {at} response tokens")
    return samples


def _trace_path(folder: Path, index: int) -> Path:
    return folder / f"{index:06d}.trace.safetensors"
