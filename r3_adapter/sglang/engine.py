"""Roll out prompts with SGLang: in this process, in one of its own, or at a running server; samples come back.

A scheduler that fails takes down the whole process tree, its caller included: where that matters, use
rollout_in_subprocess.
"""

import json
import os
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from r3_adapter.errors import CaptureError, R3Error
from r3_adapter.processes import run_together
from r3_adapter.rollout import Sample, load_samples
from r3_adapter.sglang.capture import check_finished, payload_of, trace_from_native_reply, trace_from_reply
from r3_adapter.sglang.cpu import cpu_environment, enable_cpu, has_gpu
from r3_adapter.sglang.facts import ModelFacts
from r3_adapter.sglang.perturb import VARIABLE
from r3_adapter.sglang.plugin import check_installed
from r3_adapter.sglang.settings import EngineSettings

Prompts = Sequence[Sequence[int]]
SamplingParams = Mapping[str, Any] | Sequence[Mapping[str, Any]]
Progress = Callable[[int, int], None]
"""Called with the samples that are done and the number of all."""


class Engine:
    """SGLang in this process; a context manager. Its schedulers are processes of their own.

    Raises:
        CaptureError: `model_path` has no configuration, or SGLang does not start.
    """

    def __init__(self, settings: EngineSettings) -> None:
        self.settings = settings
        self.facts = ModelFacts.from_checkpoint(Path(settings.model_path))

    def __enter__(self) -> "Engine":
        gpu = has_gpu()
        if self.settings.perturb is not None or not gpu:
            check_installed()
        enable_cpu()
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        with _environment({} if self.settings.perturb is None else {VARIABLE: str(self.settings.perturb)}):
            from sglang.srt.entrypoints.engine import Engine as SGLang

            try:
                self._engine = SGLang(**self.settings.engine_arguments(gpu=gpu))
            except TypeError as error:
                raise CaptureError(f"SGLang does not start: {error}; is it patched (`r3 patch verify`)?") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._engine.shutdown()

    def replies(
        self,
        prompts: Prompts,
        sampling_params: SamplingParams,
        *,
        batch_size: int = 16,
        progress: Progress = lambda done, total: None,
    ) -> list[dict[str, Any]]:
        """Generate, and return what SGLang says for each prompt.

        sampling_params: SGLang's, for all prompts or one for each.
        """
        replies: list[dict[str, Any]] = []
        for start in range(0, len(prompts), batch_size):
            batch = slice(start, start + batch_size)
            params = sampling_params if isinstance(sampling_params, Mapping) else list(sampling_params)[batch]
            replies += self._engine.generate(
                input_ids=[list(prompt) for prompt in prompts[batch]],
                sampling_params=params,
                return_logprob=True,
                return_routed_experts=True,
            )
            progress(len(replies), len(prompts))
        return replies

    def generate(self, prompts: Prompts, sampling_params: SamplingParams, **options: Any) -> list[Sample]:
        """Generate, and return a sample for each prompt; the options are those of `replies`.

        Raises:
            CaptureError: A reply without routes, or with those of other tokens or of another model.
            TraceError: Malformed routes.
        """
        replies = self.replies(prompts, sampling_params, **options)
        native = self.settings.routed_experts_format == "flat"
        return samples_of(replies, prompts, self.facts, native=native)


def samples_of(
    replies: Sequence[Mapping[str, Any]],
    prompts: Prompts,
    facts: ModelFacts,
    *,
    native: bool = False,
    place: str = "request",
) -> list[Sample]:
    """Make samples of replies, in the order of their prompts.

    native: the routes are in SGLang's own form.

    Raises:
        CaptureError: Another number of replies than of prompts, or one that does not belong to its prompt.
        TraceError: Malformed routes.
    """
    if len(replies) != len(prompts):
        raise CaptureError(f"{place}: {len(replies)} replies != {len(prompts)} prompts")
    samples = []
    for index, (reply, prompt) in enumerate(zip(replies, prompts, strict=True)):
        where = f"{place} {index}"
        if native:
            trace = trace_from_native_reply(reply, prompt, facts, place=where)
        else:
            trace = trace_from_reply(reply, prompt, facts=facts, place=where)
        size = len(payload_of(reply, where))
        samples.append(Sample(trace, len(prompt), _logprobs(reply, where), size))
    return samples


def native_bytes(num_tokens: int, facts: ModelFacts) -> int:
    """Return the size of SGLang's own payload for a sample of so many tokens, before base64."""
    return 4 * (num_tokens - 1) * facts.num_layers * facts.topk


def rollout_in_subprocess(
    settings: EngineSettings,
    prompts: Prompts,
    sampling_params: SamplingParams,
    *,
    timeout: float = 600,
    progress: Progress = lambda done, total: None,
) -> list[Sample]:
    """Generate in a process of its own, which ends with the call; return a sample for each prompt.

    timeout: seconds for start and generation together.
    progress: called several times a second with the samples that are done and the number of all.

    Raises:
        CaptureError: The engine failed or was late; the message has the end of its output.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        request = {"settings": settings.to_json(), **_for_json(prompts, sampling_params)}
        (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
        command = [sys.executable, "-m", "r3_adapter.sglang.worker", f"{folder}/request.json", f"{folder}/samples"]
        bar = folder / "samples.progress"

        def tick() -> None:
            if bar.exists():
                progress(bar.stat().st_size, len(prompts))

        try:
            run_together([command], env=[cpu_environment()], timeout=timeout, tick=tick)
        except R3Error as error:
            raise CaptureError(f"rollout engine: {error}") from error
        return load_samples(folder / "samples")


def generate_over_http(
    url: str,
    prompts: Prompts,
    sampling_params: SamplingParams,
    facts: ModelFacts,
    *,
    native: bool = False,
    timeout: float = 600,
) -> list[Sample]:
    """Generate at a running server (one POST to /generate for all prompts); return a sample for each prompt.

    url: as in "http://127.0.0.1:30000".

    Raises:
        CaptureError: The server refuses or cannot be reached, or a reply cannot be used.
        TraceError: Malformed routes.
    """
    body = {"return_logprob": True, "return_routed_experts": True, **_for_json(prompts, sampling_params)}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/generate", json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            replies = json.load(answer)
    except urllib.error.HTTPError as error:
        raise CaptureError(f"{url}: {error}: {error.read()[:500].decode(errors='replace')}") from error
    except (OSError, ValueError) as error:
        raise CaptureError(f"{url}: {error}") from error
    return samples_of(replies, prompts, facts, native=native, place=f"{url} request")


def _for_json(prompts: Prompts, sampling_params: SamplingParams) -> dict[str, Any]:
    params = sampling_params if isinstance(sampling_params, Mapping) else list(sampling_params)
    return {"input_ids": [list(prompt) for prompt in prompts], "sampling_params": params}


def _logprobs(reply: Mapping[str, Any], place: str) -> "np.ndarray[tuple[int], np.dtype[np.float32]]":
    check_finished(reply, place)
    pairs = reply["meta_info"].get("output_token_logprobs")
    if pairs is None:
        raise CaptureError(f"{place}: no output_token_logprobs in meta_info; ask with return_logprob")
    if [pair[1] for pair in pairs] != list(reply["output_ids"]):
        raise CaptureError(f"{place}: log-probabilities of {len(pairs)} tokens are not of the output_ids")
    return np.array([pair[0] for pair in pairs], np.float32)


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
