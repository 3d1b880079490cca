"""Roll out prompts with SGLang, in this process or in one of its own; samples come back."""

import json
import os
import sys
import tempfile
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from r3_adapter.environment import environment
from r3_adapter.errors import CaptureError, R3Error, check_choice, check_whole, show
from r3_adapter.hash_layers import HashTables
from r3_adapter.processes import run_together
from r3_adapter.rollout import Sample, load_samples
from r3_adapter.sglang.cpu import cpu_environment, enable_cpu, has_gpu
from r3_adapter.sglang.guard import EngineProcesses
from r3_adapter.sglang.http import generate_over_http
from r3_adapter.sglang.meeting import FOLDER
from r3_adapter.sglang.moe_config import MoEConfig
from r3_adapter.sglang.perturb import SWITCH, VARIABLE
from r3_adapter.sglang.plugin import check_installed
from r3_adapter.sglang.samples import Prompts, Recomputed, checked_prompt, checked_prompts, native_bytes, samples_of
from r3_adapter.sglang.sampling import SamplingParams, check_engine, checked_all, checked_params
from r3_adapter.sglang.server_arguments import check_server_arguments
from r3_adapter.sglang.settings import EngineSettings
from r3_adapter.sglang.shared import fetch_payload, payload_folder

__all__ = [
    "Engine",
    "floor_and_rollout",
    "generate_over_http",
    "native_bytes",
    "rollout_in_subprocess",
    "samples_of",
]
Reply = TypeVar("Reply")
Progress = Callable[[int, int], None]
"""Called with the samples that are done and the number of all."""


class Engine:
    """SGLang in this process; a context manager. Its schedulers are processes of their own.

    Raises:
        CaptureError: `model_path` has no configuration, SGLang does not start, or it is told to return
            log-probabilities that a trainer could not follow.
    """

    def __init__(self, settings: EngineSettings) -> None:
        if not isinstance(settings, EngineSettings):
            raise CaptureError(f"settings {show(settings)} is not an EngineSettings")
        self.settings = settings
        if not Path(settings.model_path).is_dir():
            raise CaptureError(
                f"model_path {settings.model_path!r} is no folder; download a model of the hub first (`hf download`), "
                "and name its folder"
            )
        # The config is read with transformers, which looks once for what is installed.
        enable_cpu()
        self.moe = MoEConfig.if_known(Path(settings.model_path))
        self.tables: HashTables | None = None
        if self.moe is not None and self.moe.hash_layer_ids:
            self.tables = HashTables.from_checkpoint(Path(settings.model_path))
        self.weight_version = settings.weight_version
        self._versions = {settings.weight_version}
        self._folder: Path | None = None
        self._switch: Path | None = None

    def __enter__(self) -> "Engine":
        gpu = has_gpu()
        if self.settings.perturb is not None or not gpu:
            check_installed()
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        arguments = self.settings.engine_arguments(gpu=gpu)
        check_server_arguments(arguments)
        check_engine(arguments)
        with ExitStack() as stack, environment(self._perturbed(stack)):
            from sglang.srt.entrypoints.engine import Engine as SGLang

            if self.settings.uses_shared_memory:
                self._folder = stack.enter_context(payload_folder())
                arguments["routed_experts_dir"] = str(self._folder)
            self._processes = EngineProcesses()
            try:
                with self._processes.starting():
                    self._engine = SGLang(**arguments)
            except Exception as error:
                # Arguments are known by now, but to an SGLang without the patches.
                hint = "; is it patched (`r3 patch verify`)?" if isinstance(error, TypeError) else ""
                raise CaptureError(f"SGLang does not start: {type(error).__name__}: {error}{hint}") from error
            self._processes.watch(self._engine)
            self._files = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._processes.end(self._engine)
        finally:
            self._files.close()

    def _perturbed(self, stack: ExitStack) -> dict[str, str]:
        """Return the variables that perturb the engine, if it is to be; the stack keeps the folder of its switch."""
        if self.settings.perturb is None:
            return {}
        self._switch = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "perturb"
        self.perturb(True)
        return {VARIABLE: str(self.settings.perturb), SWITCH: str(self._switch)}

    def perturb(self, on: bool) -> None:
        """Let the next forward pass, and all after it, select perturbed experts or not; to be called between batches.

        Raises:
            CaptureError: The engine was not started to be perturbed.
        """
        if self._switch is None:
            raise CaptureError("the engine cannot be perturbed: it was started without `perturb` in its settings")
        self._switch.write_bytes(b"1" if on else b"0")

    @property
    def death(self) -> str | None:
        """How the engine died; None while it lives. A call to a dead engine raises CaptureError with it."""
        return self._processes.death()

    def replies(
        self,
        prompts: Prompts,
        sampling_params: SamplingParams,
        *,
        routes: bool = True,
        start: int = 0,
        batch_size: int | None = None,
        progress: Progress = lambda done, total: None,
    ) -> list[dict[str, Any]]:
        """Generate, and return what SGLang says for each prompt.

        sampling_params: SGLang's, for all prompts or one for each.
        routes: ask for the routes.
        start: of the tokens from this position on.
        batch_size: prompts that are given to the engine at once; None for all.

        Raises:
            CaptureError: A sampling parameter that changes what tokens are scored in, see checked_params; a prompt that
                is not of the vocabulary or too long; or the engine refuses, or dies.
        """
        tokens = checked_prompts(prompts, **self._limits())
        checked, replies = checked_all(sampling_params, len(tokens)), list[dict[str, Any]]()
        size = len(tokens) if batch_size is None else check_whole("batch_size", batch_size, 1, error=CaptureError)
        for first in range(0, len(tokens), max(1, size)):
            batch = slice(first, first + size)
            call = self._engine.async_generate(
                input_ids=tokens[batch],
                sampling_params=checked if isinstance(checked, dict) else checked[batch],
                return_logprob=True,
                return_routed_experts=routes,
                routed_experts_start_len=start,
            )
            found = self._wait(call)
            if (folder := self._folder) is not None:
                found = [fetch_payload(reply, folder, f"request {first + at}") for at, reply in enumerate(found)]
            replies += found
            progress(len(replies), len(tokens))
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
        from sglang.srt.managers.io_struct import GenerateReqInput

        request = GenerateReqInput(
            input_ids=checked_prompt(tokens, **self._limits()),
            sampling_params=checked_params(sampling_params),
            return_logprob=True,
            return_routed_experts=True,
            routed_experts_start_len=start,
            # Older releases have no salt, and Engine.async_generate no argument for this one.
            extra_key=f"{self.weight_version}/{conversation}",
        )
        found = await self._result_of(anext(self._engine.tokenizer_manager.generate_request(request, None)))
        return found if self._folder is None else fetch_payload(found, self._folder, "request")

    def _limits(self) -> Any:
        """What a prompt may be: of the vocabulary, and shorter than the context."""
        model = self._engine.tokenizer_manager.model_config
        return {"vocab_size": model.vocab_size, "context_length": model.context_len}

    def _wait(self, call: Awaitable[Reply]) -> Reply:
        done: Reply = self._engine.loop.run_until_complete(self._result_of(call))
        return done

    async def _result_of(self, call: Awaitable[Reply]) -> Reply:
        """Await a call to SGLang; what it raises becomes a CaptureError."""
        try:
            return await self._processes.result_of(call)
        except R3Error:
            raise
        except Exception as error:
            raise CaptureError(f"SGLang refuses: {type(error).__name__}: {error}") from error

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
        call = self._engine.async_generate(
            input_ids=[sample.trace.token_ids.tolist() for sample in samples],
            sampling_params={"max_new_tokens": 0},
            return_logprob=True,
            logprob_start_len=0,
        )
        replies = self._wait(call)
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

        Running requests are paused and go on with the rows that they have: their routes are of two versions. Requests
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
        native = self.settings.is_flat
        return samples_of(
            replies,
            prompts,
            self.moe,
            native=native,
            recomputed=recomputed,
            sampling_params=sampling_params,
            tables=self.tables,
        )


Requests = tuple[Prompts, SamplingParams]


def rollout_in_subprocess(
    settings: EngineSettings, prompts: Prompts, sampling_params: SamplingParams, **options: Any
) -> list[Sample]:
    """Generate in a process of its own, which ends with the call; return a sample for each prompt.

    options: those of floor_and_rollout.

    Raises:
        CaptureError: as floor_and_rollout.
    """
    return floor_and_rollout(settings, ([], {}), (prompts, sampling_params), **options)[1]


def floor_and_rollout(
    settings: EngineSettings,
    floor: Requests,
    requests: Requests,
    *,
    recomputed: Recomputed = "raise",
    batch_size: int | None = None,
    follow_ups: Sequence[Prompts] = (),
    timeout: float = 600,
    progress: Progress = lambda done, total: None,
) -> tuple[list[Sample], list[Sample]]:
    """Generate in a process of its own, first without the settings' perturbation; return both runs' samples.

    floor: what the engine is asked first, unperturbed, one turn each; no prompts for nothing.
    requests: what it is asked then.
    recomputed: as in samples_of, which with "split" returns more samples than prompts.
    follow_ups: for each prompt of `requests`, the follow-up after each of its turns; then there is a sample for each
        turn, and the conversations run one after the other.
    batch_size: prompts that are given to the engine at once; None for all.
    timeout: seconds for start and generation together.
    progress: called several times a second with the samples of `requests` that are done and the number of all.

    Raises:
        CaptureError: The engine failed or was late; the message says why.
    """
    check_choice("recomputed", recomputed, Recomputed, CaptureError)
    if not isinstance(settings, EngineSettings):
        raise CaptureError(f"settings {show(settings)} is not an EngineSettings")
    with tempfile.TemporaryDirectory() as name:
        folder, prompts = Path(name), requests[0]
        request: dict[str, Any] = {"settings": settings.to_json(), "recomputed": recomputed, "batch_size": batch_size}
        request["follow_ups"] = [[list(turn) for turn in turns] for turns in follow_ups]
        request["input_ids"] = checked_prompts(prompts)
        if follow_ups and len(follow_ups) != len(prompts):
            raise CaptureError(f"follow-ups of {len(follow_ups)} prompts != {len(prompts)} prompts")
        if batch_size is not None:
            check_whole("batch_size", batch_size, 1, error=CaptureError)
        request["sampling_params"] = checked_all(requests[1], len(prompts))
        if floor[0]:
            params = checked_all(floor[1], len(floor[0]))
            request["floor"] = {"input_ids": checked_prompts(floor[0]), "sampling_params": params}
        (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
        command = [sys.executable, "-m", "r3_adapter.sglang.worker", f"{folder}/request.json", f"{folder}/samples"]
        bar = folder / "samples.progress"

        def tick() -> None:
            if bar.exists():
                progress(bar.stat().st_size, len(prompts))

        try:
            # A port that SGLang finds free for its ranks may be another's before they listen at it.
            env = {**cpu_environment(), FOLDER: name}
            run_together([command], env=[env], timeout=timeout, tick=tick, what="rollout")
        except R3Error as error:
            raise CaptureError(str(error)) from error
        return load_samples(folder / "samples.floor") if floor[0] else [], load_samples(folder / "samples")
