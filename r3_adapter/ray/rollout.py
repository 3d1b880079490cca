"""A rollout engine as a Ray actor: conversations of a task in, references to samples out."""

import asyncio
import shutil
import time
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import psutil
import ray

from r3_adapter.errors import R3Error
from r3_adapter.ray.faults import EngineLost
from r3_adapter.ray.store import OBJECT_BYTES, Placed, SampleRef, put_samples
from r3_adapter.rl.tasks import Task, task_named, text_of
from r3_adapter.rollout import Sample, save_samples
from r3_adapter.runs.samples import GROUPS, SAMPLES, shown_sample
from r3_adapter.sglang.conversation import Conversation
from r3_adapter.sglang.engine import Engine
from r3_adapter.sglang.sampling import scored_temperature
from r3_adapter.sglang.settings import EngineSettings

_WATCH_SECONDS = 0.2
_LINGER = 0.05
"""Seconds for which a group waits for others to share an object with."""

T = TypeVar("T")


@dataclass(frozen=True)
class Group:
    """A prompt to roll out `num_samples` times; number: its place in the batch.

    record: a folder in which to keep the samples, as save_samples writes them.
    greedy: take the likeliest tokens, as for an evaluation, whose samples nobody trains on: only rewards come back.
    """

    number: int
    prompt: Sequence[int]
    num_samples: int
    record: Path | None = None
    greedy: bool = False


@dataclass
class Rollout:
    """What became of a group.

    rewards: of each conversation; response_tokens: sampled ones of all together.
    lost: what an engine said that could not be used; the group is to be rolled out again then.
    seconds: "capture", reading routes and binding them to tokens; "transport", cutting and storing them.
    resident_bytes: of the engine's processes.
    shown: texts of a few samples of the first groups.
    """

    number: int
    samples: list[SampleRef] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    response_tokens: int = 0
    lost: str = ""
    seconds: dict[str, float] = field(default_factory=lambda: {"capture": 0.0, "transport": 0.0})
    resident_bytes: int = 0
    shown: list[dict[str, Any]] = field(default_factory=list)


@ray.remote
class RolloutActor:
    """SGLang in an actor's process, which looks after the engine's own processes.

    stages: the global MoE layers of each pipeline stage of the trainer.
    counted: count the tokens of each expert.

    Raises:
        EngineLost: from every method, soon after one of the engine's processes has ended.
    """

    def __init__(
        self,
        settings: str,
        task: str,
        sampling_params: Mapping[str, Any],
        stages: Sequence[Sequence[int]],
        counted: bool = False,
    ) -> None:
        self._engine = Engine(EngineSettings.from_json(settings)).__enter__()
        found = psutil.Process().children(recursive=True)
        self._processes = {each: name for each in found if (name := each.name()).startswith("sglang::")}
        self._watcher: asyncio.Task[None] | None = None
        self._task: Task = task_named(task)
        self._params, self._stages, self._counted = sampling_params, stages, counted
        self._under_way = 0
        self._waiting: list[tuple[Sequence[Placed], asyncio.Future[list[SampleRef]]]] = []

    async def ready(self) -> str:
        """Return the name of the weights, once the engine has started."""
        self._check_alive()
        return self._engine.weight_version

    async def generate(self, group: Group) -> Rollout:
        """Roll out a group; its conversations run beside each other and beside those of other groups."""
        return await self._while_alive(self._generate(group))

    async def update_weights(self, folder: str, version: str) -> None:
        """Load weights; groups under way go on across the update."""
        await self._while_alive(self._engine.update_weights(Path(folder), version))

    async def _while_alive(self, work: Coroutine[Any, Any, T]) -> T:
        """Wait for the engine as long as it can answer: SGLang itself would wait for a killed scheduler without end."""
        if self._watcher is None:
            self._watcher = asyncio.ensure_future(self._watch())
        task = asyncio.ensure_future(work)
        await asyncio.wait([task, self._watcher], return_when=asyncio.FIRST_COMPLETED)
        if not task.done() or task.exception() is not None:
            task.cancel()
            self._check_alive()
        return task.result()

    async def _watch(self) -> None:
        """Return when a process of the engine has ended."""
        while all(map(_is_alive, self._processes)):
            await asyncio.sleep(_WATCH_SECONDS)

    def _check_alive(self) -> None:
        for process, name in self._processes.items():
            if not _is_alive(process):
                raise EngineLost(f"process {process.pid} of the engine ({name}) has ended")

    async def _generate(self, group: Group) -> Rollout:
        result = Rollout(group.number)
        self._under_way += 1
        try:
            talks = await asyncio.gather(*(self._converse(group, i, result) for i in range(group.num_samples)))
        except R3Error as error:
            self._check_alive()
            result.lost = f"{type(error).__name__}: {error}"
            return result
        finally:
            self._under_way -= 1
        result.rewards = [reward for _, reward in talks]
        result.response_tokens = sum(int(each.sampled.sum()) for samples, _ in talks for each in samples)
        if group.greedy:
            return result
        if group.number < GROUPS:
            result.shown = [self._shown(group.prompt, samples[-1], reward) for samples, reward in talks[:SAMPLES]]
        placed = [
            Placed(sample, group.number, index, part)
            for index, (samples, _) in enumerate(talks)
            for part, sample in enumerate(samples)
        ]
        result.samples = await self._store(placed, result)
        if group.record is not None:
            # A group that is rolled out again takes the place of the one that was lost.
            shutil.rmtree(group.record, ignore_errors=True)
            save_samples(group.record, [each.sample for each in placed], coded=True)
        if group.number == 0:
            own = psutil.Process()
            result.resident_bytes = sum(each.memory_info().rss for each in (own, *own.children(recursive=True)))
        return result

    def _shown(self, prompt: Sequence[int], sample: Sample, reward: float) -> dict[str, Any]:
        """Return the texts of a conversation. sample: its last one, whose tokens are all that was said."""
        said = sample.trace.token_ids[len(prompt) :].tolist()
        return shown_sample(text_of(self._task, prompt), text_of(self._task, said), reward)

    async def _store(self, placed: Sequence[Placed], result: Rollout) -> list[SampleRef]:
        """Put a group's samples into the object store; small ones share an object with groups that end soon after."""
        mine: asyncio.Future[list[SampleRef]] = asyncio.get_running_loop().create_future()
        self._waiting.append((placed, mine))
        size = sum(each.sample.trace.topk_ids.nbytes for group, _ in self._waiting for each in group)
        if self._under_way and size < OBJECT_BYTES:
            await asyncio.wait([mine], timeout=_LINGER)
        if not mine.done():
            start = time.perf_counter()
            self._store_waiting()
            result.seconds["transport"] += time.perf_counter() - start
        return mine.result()

    def _store_waiting(self) -> None:
        waiting, self._waiting = self._waiting, []
        try:
            everything = [each for group, _ in waiting for each in group]
            refs = iter(put_samples(everything, self._stages, counted=self._counted))
            for group, its_refs in waiting:
                its_refs.set_result([next(refs) for _ in group])
        except Exception as error:
            for _, its_refs in waiting:
                its_refs.set_exception(error)

    async def _converse(self, group: Group, index: int, result: Rollout) -> tuple[list[Sample], float]:
        task, prompt = self._task, group.prompt
        place = f"prompt {group.number}, sample {index}"
        params = {**self._params, "temperature": 0.0} if group.greedy else self._params
        talk = Conversation(prompt, self._engine.moe, place=place, temperature=scored_temperature(params))
        name = f"{group.number}.{index}" if task.max_turns > 1 else ""
        for turn in range(task.max_turns):
            before, version = len(talk.tokens), self._engine.weight_version
            try:
                self._take(talk, await self._ask(talk, params, name), result)
            except R3Error:
                if not talk.start:
                    raise
                # The cache has lost the turns before, or the weights have changed: compute them again with this one.
                talk.start = 0
                self._take(talk, await self._ask(talk, params, name), result)
            said = talk.tokens[before:]
            answer = task.reply(prompt, said, turn)
            if answer is None or turn + 1 == task.max_turns:
                break
            talk.add(answer)
            if version != self._engine.weight_version:
                talk.start = 0
        return talk.samples(), task.reward(prompt, said)

    async def _ask(self, talk: Conversation, params: Mapping[str, Any], name: str) -> Any:
        return await self._engine.reply(talk.tokens, params, start=talk.start, conversation=name)

    @staticmethod
    def _take(talk: Conversation, reply: Any, result: Rollout) -> None:
        start = time.perf_counter()
        try:
            talk.take(reply)
        finally:
            result.seconds["capture"] += time.perf_counter() - start


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
