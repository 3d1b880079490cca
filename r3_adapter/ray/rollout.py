"""A rollout engine as a Ray actor: conversations of a task in, references to samples out."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import ray

from r3_adapter.errors import R3Error
from r3_adapter.ray.store import Placed, SampleRef, put_group
from r3_adapter.rl.tasks import Task, task_named
from r3_adapter.rollout import Sample
from r3_adapter.sglang.conversation import Conversation
from r3_adapter.sglang.engine import Engine
from r3_adapter.sglang.settings import EngineSettings


@dataclass(frozen=True)
class Group:
    """A prompt to roll out `num_samples` times; number: its place in the batch."""

    number: int
    prompt: Sequence[int]
    num_samples: int


@dataclass
class Rollout:
    """What became of a group.

    rewards: of each conversation.
    lost: what an engine said that could not be used; the group is to be rolled out again then.
    seconds: "capture", reading routes and binding them to tokens; "transport", cutting and storing them.
    resident_bytes: of the engine's processes.
    """

    number: int
    samples: list[SampleRef] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    lost: str = ""
    seconds: dict[str, float] = field(default_factory=lambda: {"capture": 0.0, "transport": 0.0})
    resident_bytes: int = 0


@ray.remote
class RolloutActor:
    """SGLang in an actor's process. If its scheduler dies, the process and with it the actor dies too.

    stages: the global MoE layers of each pipeline stage of the trainer.
    """

    def __init__(
        self, settings: str, task: str, sampling_params: Mapping[str, Any], stages: Sequence[Sequence[int]]
    ) -> None:
        self._engine = Engine(EngineSettings.from_json(settings)).__enter__()
        self._task: Task = task_named(task)
        self._params, self._stages = sampling_params, stages

    async def ready(self) -> str:
        """Return the name of the weights, once the engine has started."""
        return self._engine.weight_version

    async def generate(self, group: Group) -> Rollout:
        """Roll out a group; its conversations run beside each other and beside those of other groups."""
        result = Rollout(group.number)
        try:
            talks = await asyncio.gather(*(self._converse(group, i, result) for i in range(group.num_samples)))
        except R3Error as error:
            result.lost = f"{type(error).__name__}: {error}"
            return result
        start = time.perf_counter()
        result.rewards = [reward for _, reward in talks]
        placed = [
            Placed(sample, index, part)
            for index, (samples, _) in enumerate(talks)
            for part, sample in enumerate(samples)
        ]
        result.samples = put_group(group.number, placed, self._stages)
        result.seconds["transport"] += time.perf_counter() - start
        if group.number == 0:
            own = psutil.Process()
            result.resident_bytes = sum(each.memory_info().rss for each in (own, *own.children(recursive=True)))
        return result

    async def update_weights(self, folder: str, version: str) -> None:
        """Load weights; groups under way go on across the update."""
        await self._engine.update_weights(Path(folder), version)

    async def _converse(self, group: Group, index: int, result: Rollout) -> tuple[list[Sample], float]:
        task, prompt = self._task, group.prompt
        talk = Conversation(prompt, self._engine.facts, place=f"prompt {group.number}, sample {index}")
        for turn in range(task.max_turns):
            before, version = len(talk.tokens), self._engine.weight_version
            try:
                self._take(talk, await self._ask(talk), result)
            except R3Error:
                if not talk.start:
                    raise
                # The cache has lost the turns before, or the weights have changed: compute them again with this one.
                talk.start = 0
                self._take(talk, await self._ask(talk), result)
            said = talk.tokens[before:]
            answer = task.reply(prompt, said, turn)
            if answer is None or turn + 1 == task.max_turns:
                break
            talk.add(answer)
            if version != self._engine.weight_version:
                talk.start = 0
        return talk.samples(), task.reward(prompt, said)

    async def _ask(self, talk: Conversation) -> Any:
        return await self._engine.reply(talk.tokens, self._params, start=talk.start)

    @staticmethod
    def _take(talk: Conversation, reply: Any, result: Rollout) -> None:
        start = time.perf_counter()
        try:
            talk.take(reply)
        finally:
            result.seconds["capture"] += time.perf_counter() - start
