"""Engines that die and hang, real actors without an engine in them: what is asked again, and which prompt is blamed."""

import asyncio
import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from r3_adapter.errors import R3Error
from r3_adapter.ray.cluster import cluster
from r3_adapter.ray.faults import EngineLost
from r3_adapter.ray.pool import RolloutPool
from r3_adapter.ray.rollout import Group, Rollout
from r3_adapter.sglang.settings import EngineSettings

# Ray leaves its processes' handles open when it ends.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
GOOD, HANGS, DIES, LOST = 0, 1, 2, 3
Events = list[tuple[str, str]]


@ray.remote(num_cpus=0)
class Engine:
    """Does with a group what its prompt says; the first `short_lives` engines die by themselves."""

    def __init__(self, log: Path, life: int, short_lives: int) -> None:
        self._log, self._dies = log, life < short_lives

    async def ready(self) -> str:
        return "0"

    async def generate(self, group: Group) -> Rollout:
        with self._log.open("a") as log:
            print(group.number, file=log)
        await asyncio.sleep(0.2)
        kind = group.prompt[0]
        if kind == DIES or self._dies:
            os._exit(3)
        if kind == HANGS:
            time.sleep(600)
        if kind == LOST:
            raise EngineLost("process 7 of the engine has ended")
        await asyncio.sleep(0.2)
        return Rollout(group.number)


class Pool(RolloutPool):
    def __init__(self, folder: Path, num_engines: int, short_lives: int = 0, idle_timeout: float = 60) -> None:
        self.events: Events = []
        self.log, self._short_lives, self._started = folder / "asked", short_lives, 0
        settings = EngineSettings("none")
        super().__init__(
            settings, num_engines, "sort", {}, [[0]], timeout=60, idle_timeout=idle_timeout, on_event=self._note
        )

    def _note(self, kind: str, what: str) -> None:
        self.events.append((kind, what))

    def _new_engine(self) -> object:
        self._started += 1
        return Engine.remote(self.log, self._started - 1, self._short_lives)  # type: ignore[attr-defined]

    def asked(self) -> Counter[int]:
        return Counter(int(line) for line in self.log.read_text().split())


@pytest.fixture(scope="module", autouse=True)
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    # Inside, temporary files are Ray's, and go with it: pytest's own folder is made before.
    tmp_path_factory.getbasetemp()
    with cluster(num_cpus=8, object_store_bytes=80 << 20):
        yield


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (HANGS, "engine 0: nothing done in 6 s"),
        (DIES, r"engine 0: ActorDiedError: its worker process has died\..*"),
        (LOST, r"engine 0: process 7 of the engine has ended"),
    ],
)
def test_a_prompt_that_takes_down_its_engine_stops_the_run_and_no_other_is_blamed(
    kind: int, why: str, tmp_path: Path
) -> None:
    # Where no engine hangs, a busy machine must not look as if one did.
    pool = Pool(tmp_path, 2, idle_timeout=6 if kind == HANGS else 60)
    # The even ones are the first engine's.
    groups = [Group(number, [kind if number == 4 else GOOD], 1) for number in range(6)]
    pool.submit(0, groups)
    try:
        with pytest.raises(R3Error, match=f"^prompt 4 failed 4 times, the last time: {why}$"):
            pool.collect(0)
    finally:
        pool.close()
    restarted = [what for said, what in pool.events if said == "engine_restarted"]
    # With the others, perhaps with one other, and three times alone; the fourth is the end.
    assert len(restarted) in (4, 5) and len(restarted) == len(pool.events) and "engine 1" not in str(restarted)
    asked = pool.asked()
    assert asked[4] >= 5 and all(asked[number] == 1 for number in (1, 3, 5)) and asked[0] <= 3


def test_an_engine_that_dies_by_itself_blames_no_prompt(tmp_path: Path) -> None:
    pool = Pool(tmp_path, 1, short_lives=3)
    pool.submit(0, [Group(number, [GOOD], 1) for number in range(8)])
    pool.submit(1, [Group(number, [GOOD], 1) for number in range(2)])
    try:
        assert [rollout.number for rollout in pool.collect(0)] == list(range(8))
        # Given while the engine has parts to do later: behind these.
        assert [rollout.number for rollout in pool.collect(1)] == [0, 1]
    finally:
        pool.close()
    assert [kind for kind, _ in pool.events] == ["engine_restarted"] * 3
    assert "; prompts asked again: 10, one half after the other" in pool.events[0][1]
