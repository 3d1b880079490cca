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
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from r3_adapter.errors import CaptureError, R3Error, check_choice
from r3_adapter.processes import run_together
from r3_adapter.rollout import Sample, load_samples
from r3_adapter.sglang.capture import (
    computations_from_reply,
    logprobs_of,
    payload_of,
    trace_from_native_reply,
)
from r3_adapter.sglang.cpu import cpu_environment, enable_cpu, has_gpu
from r3_adapter.sglang.facts import ModelFacts
from r3_adapter.sglang.perturb import VARIABLE
from r3_adapter.sglang.plugin import check_installed
from r3_adapter.sglang.sampling import check_engine, checked_all, checked_params, scored_temperature
from r3_adapter.sglang.server_arguments import check_server_arguments
from r3_adapter.sglang.settings import EngineSettings
from r3_adapter.sglang.shared import fetch_payload, payload_folder

Prompts = Sequence[Sequence[int]]
SamplingParams = Mapping[str, Any] | Sequence[Mapping[str, Any]]
Recomputed = Literal["raise", "split"]
Progress = Callable[[int, int], None]
"""Called with the samples that are done and the number of all."""


class Engine:
    """SGLang in this process; a context manager. Its schedulers are processes of their own.

    Raises:
        CaptureError: `model_path` has no configuration, SGLang does not start, or it is told to return
            log-probabilities that a trainer could not follow.
    """

    def __init__(self, settings: EngineSettings) -> None:
        self.settings = settings
        # The facts are read with transformers, which looks once for what is installed.
        enable_cpu()
        self.facts = ModelFacts.if_known(Path(settings.model_path))
        self.weight_version = settings.weight_version
        self._versions = {settings.weight_version}
        self._folder: Path | None = None

    def __enter__(self) -> "Engine":
        gpu = has_gpu()
        if self.settings.perturb is not None or not gpu:
            check_installed()
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        arguments = self.settings.engine_arguments(gpu=gpu)
        check_server_arguments(arguments)
        check_engine(arguments)
        variables = {} if self.settings.perturb is None else {VARIABLE: str(self.settings.perturb)}
        with ExitStack() as stack, _environment(variables):
            from sglang.srt.entrypoints.engine import Engine as SGLang

            if self.settings.shared_memory:
                self._folder = stack.enter_context(payload_folder())
                arguments["routed_experts_dir"] = str(self._folder)
            try:
                self._engine = SGLang(**arguments)
            except TypeError as error:
                raise CaptureError(f"SGLang does not start: {error}; is it patched (`r3 patch verify`)?") from error
            self._files = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._engine.shutdown()
        self._files.close()

    def replies(
        self,
        prompts: Prompts,
        sampling_params: SamplingParams,
        *,
        routes: bool = True,
        start: int = 0,
        batch_size: int = 16,
        progress: Progress = lambda done, total: None,
    ) -> list[dict[str, Any]]:
        """Generate, and return what SGLang says for each prompt.

        sampling_params: SGLang's, for all prompts or one for each.
        routes: ask for the routes.
        start: of the tokens from this position on.

        Raises:
            CaptureError: A sampling parameter that changes what tokens are scored in, see checked_params.
        """
        checked, replies = checked_all(sampling_params, len(prompts)), list[dict[str, Any]]()
        for first in range(0, len(prompts), batch_size):
            batch = slice(first, first + batch_size)
            params = checked if isinstance(checked, dict) else checked[batch]
            found = self._engine.generate(
                input_ids=[list(prompt) for prompt in prompts[batch]],
                sampling_params=params,
                return_logprob=True,
                return_routed_experts=routes,
                routed_experts_start_len=start,
            )
            if (folder := self._folder) is not None:
                found = [fetch_payload(reply, folder, f"request {first + at}") for at, reply in enumerate(found)]
            replies += found
            progress(len(replies), len(prompts))
        return replies

    async def reply(
        self, tokens: Sequence[int], sampling_params: Mapping[str, Any], *, start: int = 0, conversation: str = ""
    ) -> Any:
        """Generate for one prompt beside others; return what SGLang says, as `replies` does.

        conversation: if named, cached rows are those of this conversation alone. Samples of one prompt that run at once
            each compute it, and only one of them is cached for all: a later turn of the others would lose its rows.

        All coroutines of an engine must run in one event loop, and `replies` in none.

        Raises:
            CaptureError: As `replies`.
        """
        found = await self._engine.async_generate(
            input_ids=list(tokens),
            sampling_params=checked_params(sampling_params),
            return_logprob=True,
            return_routed_experts=True,
            routed_experts_start_len=start,
            cache_salt=f"{self.weight_version}/{conversation}",
        )
        return found if self._folder is None else fetch_payload(found, self._folder, "request")

    def rescore(self, samples: Sequence[Sample]) -> list[npt.NDArray[np.float32]]:
        """Return [R] float32 a sample: its response's log-probabilities as prefill computes them, all tokens at once.

        They differ from the sample's own by as much as the engine does from itself. NaN where the token is the last of
        the vocabulary, which SGLang takes for a placeholder and scores as token 0.

        Raises:
            CaptureError: The engine scored other tokens; or a sample of another temperature than 1, at which alone
                SGLang scores prompts.
        """
        for index, sample in enumerate(samples):
            if sample.temperature != 1:
                raise CaptureError(
                    f"sample {index}: temperature {sample.temperature} != 1, at which prompts are scored"
                )
        replies = self._engine.generate(
            input_ids=[sample.trace.token_ids.tolist() for sample in samples],
            sampling_params={"max_new_tokens": 0},
            return_logprob=True,
            logprob_start_len=0,
        )
        found = []
        for index, (reply, sample) in enumerate(zip(replies, samples, strict=True)):
            pairs = reply["meta_info"]["input_token_logprobs"][sample.num_prompt_tokens :]
            want, have = sample.trace.token_ids[sample.num_prompt_tokens :], np.array([pair[1] for pair in pairs])
            if have.shape != want.shape or np.any((have != want) & (have != 0)):
                raise CaptureError(f"sample {index}: the engine scored tokens {have.tolist()} != {want.tolist()}")
            found.append(np.where(have == want, np.array([pair[0] for pair in pairs], np.float32), np.nan))
        return found

    async def update_weights(self, folder: Path, version: str) -> None:
        """Load other weights, which rows computed from now on carry as `version`.

        Requests under way are paused and go on upon the rows that they have: their routes are of two versions. Requests
        that come later share no rows of before.

        Raises:
            CaptureError: Weights that this engine had are called `version`; or SGLang refuses, and then still has the
                weights of before, or none that can be used, under another name.

        Source: sglang@0.5.20: srt/managers/tokenizer_manager.py:update_weights_from_disk
        """
        from sglang.srt.managers import io_struct

        if version in self._versions:
            raise CaptureError(f"weights of {folder}: version {version!r} is the name of weights that the engine had")
        manager = self._engine.tokenizer_manager
        await manager.pause_generation(io_struct.PauseGenerationReqInput(mode="in_place"))
        try:
            update = io_struct.UpdateWeightFromDiskReqInput(
                model_path=str(folder), weight_version=version, flush_cache=False
            )
            done, message, _ = await manager.update_weights_from_disk(update, None)
        finally:
            await manager.continue_generation(io_struct.ContinueGenerationReqInput())
        if not done:
            raise CaptureError(f"weights {version!r} of {folder}: {message}")
        self.weight_version = version
        self._versions.add(version)

    def generate(
        self, prompts: Prompts, sampling_params: SamplingParams, *, recomputed: Recomputed = "raise", **options: Any
    ) -> list[Sample]:
        """Generate, and return a sample for each prompt; the options are those of `replies`, recomputed of samples_of.

        Raises:
            CaptureError: A reply without routes, or with those of other tokens or of another model.
            TraceError: Malformed routes.
        """
        check_choice("recomputed", recomputed, Recomputed, CaptureError)
        replies = self.replies(prompts, sampling_params, **options)
        native = self.settings.routed_experts_format == "flat"
        return samples_of(
            replies, prompts, self.facts, native=native, recomputed=recomputed, sampling_params=sampling_params
        )


def samples_of(
    replies: Sequence[Mapping[str, Any]],
    prompts: Prompts,
    facts: ModelFacts | None,
    *,
    native: bool = False,
    place: str = "request",
    recomputed: Recomputed = "raise",
    sampling_params: SamplingParams = MappingProxyType({}),
) -> list[Sample]:
    """Make samples of replies, in the order of their prompts.

    facts: the routers of the model, as ModelFacts.if_known reads them; None where they are not known: the routes' own
        layers and experts are then taken as they are.
    native: the routes are in SGLang's own form, which needs facts.
    sampling_params: that the replies were asked with, for all prompts or one for each; samples keep the temperature.
    recomputed: what a request becomes that was retracted, so that its later tokens were sampled under other routes
        than its earlier ones. "raise": an error. "split": a sample for each of its computations, one after the other;
        the prompt of a later one is all that was sampled before it.

    Raises:
        CaptureError: Another number of replies than of prompts, or one that does not belong to its prompt.
        TraceError: Malformed routes.
    """
    check_choice("recomputed", recomputed, Recomputed, CaptureError)
    checked = checked_all(sampling_params, len(prompts), place=f"{place}, sampling parameters")
    temperatures = [
        scored_temperature(checked if isinstance(checked, dict) else checked[at]) for at in range(len(prompts))
    ]
    if len(replies) != len(prompts):
        raise CaptureError(f"{place}: {len(replies)} replies != {len(prompts)} prompts")
    samples = []
    for index, (reply, prompt) in enumerate(zip(replies, prompts, strict=True)):
        where = f"{place} {index}"
        size, logprobs = len(payload_of(reply, where)), logprobs_of(reply, where)
        if native:
            if facts is None:
                raise CaptureError(f"{where}: routes in SGLang's own form, of a model whose layers are not known")
            trace = trace_from_native_reply(reply, prompt, facts, place=where)
            samples.append(Sample(trace, len(prompt), logprobs, size, temperature=temperatures[index]))
            continue
        found = computations_from_reply(reply, prompt, facts=facts, place=where)
        if recomputed == "raise" and len(found) > 1:
            raise CaptureError(f"{where}: computed {len(found)} times, since it was retracted; read it as 'split'")
        for computation in found:
            start = computation.sampled_start or len(prompt)
            part = logprobs[start - len(prompt) : computation.stop - len(prompt)]
            size = size if computation is found[0] else 0
            samples.append(Sample(computation.trace, start, part, size, temperature=temperatures[index]))
    return samples


def native_bytes(num_tokens: int, facts: ModelFacts) -> int:
    """Return the size of SGLang's own payload for a sample of so many tokens, before base64."""
    return 4 * (num_tokens - 1) * facts.num_layers * facts.topk


def rollout_in_subprocess(
    settings: EngineSettings,
    prompts: Prompts,
    sampling_params: SamplingParams,
    *,
    recomputed: Recomputed = "raise",
    batch_size: int = 16,
    follow_ups: Sequence[Prompts] = (),
    timeout: float = 600,
    progress: Progress = lambda done, total: None,
) -> list[Sample]:
    """Generate in a process of its own, which ends with the call; return a sample for each prompt.

    recomputed: as in samples_of, which with "split" returns more samples than prompts.
    follow_ups: for each prompt, what is said after each of its turns; then there is a sample for each turn, and the
        conversations run one after the other.
    batch_size: prompts that are given to the engine at once.
    timeout: seconds for start and generation together.
    progress: called several times a second with the samples that are done and the number of all.

    Raises:
        CaptureError: The engine failed or was late; the message has the end of its output.
    """
    check_choice("recomputed", recomputed, Recomputed, CaptureError)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        request = {"settings": settings.to_json(), "recomputed": recomputed, "batch_size": batch_size}
        request["follow_ups"] = [[list(turn) for turn in turns] for turns in follow_ups]
        request |= _for_json(prompts, sampling_params)
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
    facts: ModelFacts | None,
    *,
    native: bool = False,
    recomputed: Recomputed = "raise",
    timeout: float = 600,
    shared_memory: Path | None = None,
) -> list[Sample]:
    """Generate at a running server (one POST to /generate for all prompts); return a sample for each prompt.

    url: as in "http://127.0.0.1:30000".
    shared_memory: the --routed-experts-dir of a server on this host; None if the routes come with the replies.
    recomputed: as in samples_of.

    Raises:
        CaptureError: The server refuses or cannot be reached, or a reply cannot be used.
        TraceError: Malformed routes.
    """
    check_choice("recomputed", recomputed, Recomputed, CaptureError)
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
    place = f"{url} request"
    if shared_memory is not None:
        replies = [fetch_payload(reply, shared_memory, f"{place} {at}") for at, reply in enumerate(replies)]
    return samples_of(
        replies, prompts, facts, native=native, place=place, recomputed=recomputed, sampling_params=sampling_params
    )


def _for_json(prompts: Prompts, sampling_params: SamplingParams) -> dict[str, Any]:
    params = checked_all(sampling_params, len(prompts))
    return {"input_ids": [list(prompt) for prompt in prompts], "sampling_params": params}


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
