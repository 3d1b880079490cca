"""A run that meets one fault after the other; python loop_faults.py CHECKPOINT FOLDER.

The rollout's experts are perturbed and all is float32, so that a step which trained on a route that is not its token's
would show in the distance between the trainer's and the rollout's log-probabilities.
"""

import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray

from r3_adapter.balance.table import by_chance
from r3_adapter.layout import ParallelLayout
from r3_adapter.megatron.policy_trainer.learning_rate import LearningRate
from r3_adapter.megatron.policy_trainer.trainer import PolicyOptions
from r3_adapter.proof.tiny import ENGINE
from r3_adapter.ray.cluster import cluster
from r3_adapter.ray.console import begins, told
from r3_adapter.ray.loop import Loop
from r3_adapter.ray.options import LoopOptions
from r3_adapter.rl.tasks import END
from r3_adapter.sglang.perturb import Perturbation
from r3_adapter.sglang.settings import EngineSettings
from r3_adapter.signals import say

# The least that Ray takes.
STORE_BYTES = 80 << 20
# Of the run that meets the faults: what it is at a step must not depend on where the run was gone on with.
RATE = LearningRate(1e-5, 1e-6, "linear", warmup_iters=4, decay_iters=20)
FAULTS: dict[tuple[int, str], Callable[[Loop], None]] = {}


def fault(step: int, stage: str) -> Callable[[Callable[[Loop], None]], Callable[[Loop], None]]:
    """Let a function do its damage once, before a stage of a step."""

    def register(function: Callable[[Loop], None]) -> Callable[[Loop], None]:
        FAULTS[step, stage] = function
        return function

    return register


def on_next_load(loop: Loop, damage: Callable[[Any], None]) -> None:
    """Damage what the trainer is about to get."""
    trainers = loop.trainers
    assert trainers is not None
    load = trainers.load

    def damaged(plan: Any, **options: Any) -> Any:
        trainers.load = load  # type: ignore[method-assign]
        damage(plan)
        return load(plan, **options)

    trainers.load = damaged  # type: ignore[method-assign,assignment]


@fault(1, "rollout")
def engine_killed(loop: Loop) -> None:
    assert loop.pool is not None
    ray.kill(loop.pool.engines[0])


@fault(2, "load")
def trace_lost(loop: Loop) -> None:
    def lose(plan: Any) -> None:
        ray._private.internal_api.free([plan[0][0][0].ref.objects[0]])

    on_next_load(loop, lose)


@fault(3, "load")
def trace_damaged(loop: Loop) -> None:
    def flip(plan: Any) -> None:
        item = plan[0][0][0]
        found = ray.get(item.ref.objects[0])
        data = np.array(found["trace"])
        data[-1] ^= 1
        objects = (ray.put(found | {"trace": data}), *item.ref.objects[1:])
        plan[0][0][0] = replace(item, ref=replace(item.ref, objects=objects))

    on_next_load(loop, flip)


@fault(4, "load")
def traces_swapped(loop: Loop) -> None:
    def swap(plan: Any) -> None:
        one, other = plan[0][0][0], plan[0][0][1]
        for item, ref in ((one, other.ref), (other, one.ref)):
            at = plan[0][0].index(item)
            plan[0][0][at] = replace(item, ref=replace(item.ref, objects=ref.objects, start=ref.start))

    on_next_load(loop, swap)


@fault(5, "weights")
def weights_fail(loop: Loop) -> None:
    assert loop.pool is not None
    real = loop.pool.engines[0]

    class Elsewhere:
        """Sends the engine to a folder where there are no weights."""

        class update_weights:
            @staticmethod
            def remote(folder: str, version: str) -> Any:
                return real.update_weights.remote(f"{folder}-not-there", version)

        _actor_id = real._actor_id

    loop.pool.engines[0] = Elsewhere
    kill = ray.kill
    ray.kill = lambda actor: kill(real if actor is Elsewhere else actor)


@fault(5, "rollout")
def scheduler_killed_before_a_step(loop: Loop) -> None:
    kill_scheduler()


@fault(7, "train")
def scheduler_killed_while_it_has_nothing_to_do(loop: Loop) -> None:
    kill_scheduler()


def kill_scheduler(sign: signal.Signals = signal.SIGKILL) -> None:
    # Ray's processes, and with them the engines, are this one's children.
    for process in psutil.Process().children(recursive=True):
        if process.name().startswith("sglang::sched"):
            os.kill(process.pid, sign)


@fault(6, "rollout")
def engine_hangs(loop: Loop) -> None:
    assert loop.pool is not None
    loop.pool._idle_timeout = 15.0
    kill_scheduler(signal.SIGSTOP)


@fault(7, "load")
def store_spills(loop: Loop) -> None:
    loop.ballast = [ray.put(np.zeros(STORE_BYTES // 4, np.uint8)) for _ in range(8)]  # type: ignore[attr-defined]


@fault(8, "train")
def rank_killed(loop: Loop) -> None:
    assert loop.trainers is not None
    ray.kill(loop.trainers.ranks[1])


def observe(loop: Loop, step: int, stage: str) -> None:
    """Do what is due."""
    due = FAULTS.pop((step, stage), None)
    if due is not None:
        print(f"step {step}, {stage}: {due.__name__}", flush=True)
        due(loop)


def options_of(checkpoint: Path, folder: Path, **more: Any) -> LoopOptions:
    """Return a run of tiny steps on two ranks."""
    return LoopOptions(
        folder=folder,
        checkpoint=checkpoint,
        layout=ParallelLayout.smallest(ep=2),
        policy=PolicyOptions(replay="r3", lr=RATE),
        engine=EngineSettings(
            model_path=str(checkpoint),
            dtype="float32",
            radix_cache=True,
            perturb=Perturbation(seed=3, fraction=0.2),
            **ENGINE,
        ),
        task="sort",
        sampling_params={"temperature": 1.0, "max_new_tokens": 8, "stop_token_ids": [END]},
        batch_size=3,
        samples_per_prompt=3,
        save_interval=2,
        agreement_interval=4,
        timeout=240,
        config={"name": "faults", "flags": {}, "model": "tiny", "layout": {}, "seed": 0, "versions": {}},
        **more,
    )


def damage(checkpoint: Path) -> None:
    """Flip a bit of the optimizer's state."""
    path = checkpoint / "optimizer.1.pt"
    data = bytearray(path.read_bytes())
    data[-200] ^= 1
    path.write_bytes(data)


def run(loop: Loop) -> None:
    """Run it, and say on stderr what it does."""
    say(begins(loop))
    with told(loop, "loop"):
        loop.run()


def main(argv: Sequence[str]) -> None:
    checkpoint, folder = map(Path, argv)
    # What the store spills is 160 MB: how full the machine's disk is beside that says nothing of the loop.
    os.environ.setdefault("RAY_local_fs_capacity_threshold", "1")
    # Experts lie elsewhere in the trainer than in the checkpoints and the engines.
    placed = {"balance": "place", "placement": by_chance([0, 1], 8, seed=6).save(folder.with_name("placement"))}
    with cluster(object_store_bytes=STORE_BYTES):
        evaluated = {"eval_interval": 5, "eval_prompts": 4, **placed}
        run(Loop(options_of(checkpoint, folder, num_rollouts=10, **evaluated), observe))
        assert not FAULTS, FAULTS
        damage(folder / "checkpoints" / "00000010")
        (folder / "checkpoints" / "00000010.bak").mkdir()
        # Stopped, and gone on with, past the checkpoint that it began from.
        run(Loop(options_of(checkpoint, folder, num_rollouts=20, **evaluated), observe))
        # Two turns, several conversations from one prompt at once.
        params = {"temperature": 1.0, "max_new_tokens": 40, "stop_token_ids": [END]}
        packed = {"balance": "pack", "micro_batch_size": 2, "record": folder.with_name("kept")}
        turns = options_of(checkpoint, folder.with_name("turns"), num_rollouts=2, **packed)
        Loop(replace(turns, task="add", sampling_params=params)).run()
        # Rollouts of two turns that are ahead: weights come while they are under way.
        ahead = options_of(checkpoint, folder.with_name("ahead"), num_rollouts=5, balance="shuffle")
        policy = replace(ahead.policy, staleness="keep", lr=LearningRate(1e-6))
        params = {**ahead.sampling_params, "max_new_tokens": 110}
        Loop(replace(ahead, lag=1, task="add", policy=policy, sampling_params=params)).run()


if __name__ == "__main__":
    main(sys.argv[1:])
