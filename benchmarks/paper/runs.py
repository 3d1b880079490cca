"""The experiment's work: supervised starts, and RL runs that go on where they were stopped."""

import fcntl
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import ray
import torch
from design import (
    BATCH_SIZE,
    ENOUGH,
    MOST_SUPERVISED,
    PRECISIONS,
    SAMPLES_PER_PROMPT,
    SHAPES,
    SUPERVISED_LR,
    Cell,
    dense,
)
from safetensors.torch import load_file, save_file

from r3_adapter.errors import R3Error
from r3_adapter.layout import ParallelLayout
from r3_adapter.megatron.policy_trainer.learning_rate import LearningRate
from r3_adapter.megatron.policy_trainer.trainer import PolicyOptions
from r3_adapter.proof.tiny import TinyModel, write_checkpoint
from r3_adapter.ray.cluster import cluster
from r3_adapter.ray.loop import Loop
from r3_adapter.ray.options import LoopOptions
from r3_adapter.ray.supervised import supervise
from r3_adapter.rl.tasks import END, task_named
from r3_adapter.sglang.settings import EngineSettings

LAYOUT = ParallelLayout()
EVAL_INTERVAL = 25


class TimeIsUp(Exception):
    """The sitting ends; what was done is kept."""


class Diverged(Exception):
    """A figure of a run is not finite: nothing that comes after means anything."""


@dataclass(frozen=True)
class Sitting:
    """Where the work is, and when to stop; deadline: of time.monotonic(), None for never.

    shapes, most_supervised, save_interval: the design's, but for tests.
    """

    work: Path
    deadline: float | None = None
    shapes: dict[str, TinyModel] | None = None
    most_supervised: int = MOST_SUPERVISED
    save_interval: int = 20

    def check(self) -> None:
        """Raise TimeIsUp after the deadline."""
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise TimeIsUp

    def shape(self, name: str, is_dense: bool) -> TinyModel:
        """Return a shape of the design, or its dense control."""
        shape = (self.shapes or SHAPES)[name]
        return dense(shape) if is_dense else shape


@contextmanager
def connected() -> Iterator[None]:
    """Use the cluster that this process has, or one that ends with the context."""
    if ray.is_initialized():
        yield
        return
    # oneDNN makes a kernel for each number of rows that an expert gets, and by default keeps 1024 of them.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16384")
    # Threads that wait for each other on cores that others use take up to ten times as long to round the weights.
    torch.set_num_threads(1)
    with cluster():
        yield


def once(folder: Path, make: Callable[[Path], None]) -> Path:
    """Make a folder unless it is there, or another process is at it, which is waited for; a part is thrown away."""
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            print(time.strftime("%H:%M"), folder.name, flush=True)
            partial = folder.with_name(f"partial-{folder.name}")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            make(partial)
            partial.rename(folder)
    return folder


def start(sitting: Sitting, shape: str, task: str, seed: int, *, dtype: str, is_dense: bool = False) -> Path:
    """Return a checkpoint after the supervised start, which is made in float32 once, and rounded for bfloat16."""
    name = f"start-{'dense-' if is_dense else ''}{shape}-{task}-{seed}"

    def learn(folder: Path) -> None:
        write_checkpoint(folder / "random", dtype="float32", seed=seed, shape=sitting.shape(shape, is_dense))
        losses: list[float] = []

        def progress(step: int, loss: float) -> None:
            losses.append(loss)
            sitting.check()

        with connected():
            supervise(
                folder / "random",
                folder,
                task_named(task),
                LAYOUT,
                PolicyOptions(lr=LearningRate(SUPERVISED_LR)),
                num_steps=sitting.most_supervised,
                batch_size=64,
                seed=seed,
                enough=ENOUGH,
                progress=progress,
            )
        (folder / "losses.json").write_text(json.dumps(losses), encoding="utf-8")

    whole = once(sitting.work / name, learn)
    return whole if dtype == "float32" else once(whole.with_name(f"{name}-{dtype}"), lambda out: _cast(whole, out))


def _cast(source: Path, out: Path) -> None:
    """Write a checkpoint in bfloat16."""
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config = {key: "bfloat16" if key in ("dtype", "torch_dtype") else value for key, value in config.items()}
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for path in source.glob("*.safetensors"):
        tensors = {name: each.to(torch.bfloat16) for name, each in load_file(path).items()}
        save_file(tensors, out / path.name, {"format": "pt"})
    for path in source.glob("*.index.json"):
        shutil.copyfile(path, out / path.name)


def folder_of(work: Path, cell: Cell) -> Path:
    """Return where a cell's run is."""
    return work / f"{cell.name.replace(':', '-')}-seed{cell.seed}"


def engine_settings(checkpoint: Path, seed: int) -> EngineSettings:
    """Return an engine that computes in bfloat16, whatever the trainer does."""
    return EngineSettings(
        str(checkpoint),
        dtype="bfloat16",
        radix_cache=True,
        random_seed=seed,
        max_total_tokens=8192,
        max_running_requests=128,
    )


def sampling_params(task: str) -> dict[str, object]:
    """Return how responses are sampled: as long as the right one, and some more."""
    return {"temperature": 1.0, "max_new_tokens": 28 if task == "running-24" else 16, "stop_token_ids": [END]}


def train(sitting: Sitting, cell: Cell, versions: dict[str, str], observe: Callable[[int], None]) -> None:
    """Make an RL run, or go on with it.

    observe: called before each step.

    Raises:
        TimeIsUp: the sitting has ended; the run goes on from its last checkpoint.
        Diverged: it has come to its end before its last step.
    """
    precision = PRECISIONS[cell.base[1]]
    task, is_dense = cell.regime.task, cell.variant.dense
    checkpoint = start(sitting, cell.base[0], task, cell.seed, dtype=precision.trainer, is_dense=is_dense)
    options = LoopOptions(
        folder=folder_of(sitting.work, cell),
        checkpoint=checkpoint,
        layout=LAYOUT,
        policy=cell.policy,
        engine=engine_settings(checkpoint, cell.seed),
        task=task,
        sampling_params=sampling_params(task),
        batch_size=BATCH_SIZE,
        samples_per_prompt=SAMPLES_PER_PROMPT,
        micro_batch_size=BATCH_SIZE * SAMPLES_PER_PROMPT // cell.regime.num_steps,
        lag=cell.lag,
        rollout_weights=precision.weights,
        num_rollouts=cell.num_rollouts,
        seed=cell.seed,
        save_interval=sitting.save_interval,
        keep_checkpoints=1,
        agreement_interval=20,
        eval_interval=EVAL_INTERVAL,
        config={
            "name": f"{cell.name}-seed{cell.seed}",
            "flags": {"lr": cell.regime.lr, "r3": cell.policy.replay == "r3", "r2": cell.policy.replay == "r2"},
            "model": f"{cell.base[0]}{' dense' if is_dense else ''}",
            "layout": {},
            "seed": cell.seed,
            "versions": versions,
        },
    )

    def watch(loop: Loop, step: int, stage: str) -> None:
        if stage == "rollout":
            observe(step)
            sitting.check()
            if not all(math.isfinite(loop.last_metrics.get(name, 0.0)) for name in ("grad_norm", "loss", "k3")):
                raise Diverged(f"step {step - 1}: a figure is not finite")

    with connected():
        try:
            Loop(options, watch).run()
        except R3Error as error:
            # What metrics.gap says of log-probabilities of a policy that is no more.
            if "is not finite" not in str(error):
                raise
            raise Diverged(str(error)) from error
