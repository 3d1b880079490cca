"""Supervised training on a task's right answers, so that a run has a reward to begin with."""

from collections import deque
from collections.abc import Callable
from pathlib import Path

import numpy as np

from r3_adapter.layout import ParallelLayout
from r3_adapter.megatron.policy_trainer.trainer import PolicyOptions
from r3_adapter.ray.trainer import Spoken, TrainerGroup
from r3_adapter.rl.tasks import Task

_MEAN = 10


def supervise(
    checkpoint: Path,
    out: Path,
    task: Task,
    layout: ParallelLayout,
    options: PolicyOptions,
    *,
    num_steps: int,
    batch_size: int,
    seed: int,
    enough: float | None = None,
    progress: Callable[[int, float], None] = lambda step, loss: None,
) -> float:
    """Train with live routers, and write a checkpoint; return the last loss.

    batch_size: conversations of a step, in one micro-batch for each data-parallel rank and pipeline stage.
    enough: end where the mean loss of the last _MEAN steps is below it; None to make all steps.
    """
    trainers = TrainerGroup(layout, checkpoint, options)
    rng, loss = np.random.default_rng(seed), float("nan")
    losses: deque[float] = deque(maxlen=_MEAN)
    micro_batches = layout.pp
    try:
        for step in range(num_steps):
            spoken = [converse_right(task, rng) for _ in range(batch_size)]
            shares = [spoken[i :: layout.dp * micro_batches] for i in range(layout.dp * micro_batches)]
            loss, _ = trainers.fit([shares[rank :: layout.dp] for rank in range(layout.dp)])
            progress(step, loss)
            losses.append(loss)
            if enough is not None and len(losses) == _MEAN and sum(losses) / _MEAN < enough:
                break
        trainers.export(out)
    finally:
        trainers.close()
    return loss


def converse_right(task: Task, rng: np.random.Generator) -> Spoken:
    """Return a conversation in which the model says what is right, and the tool answers."""
    prompt = task.prompt(rng)
    tokens, sampled = list(prompt), [False] * len(prompt)
    for turn, said in enumerate(task.answer(prompt)):
        tokens += said
        sampled += [True] * len(said)
        answer = task.reply(prompt, said, turn)
        if answer is not None:
            tokens += answer
            sampled += [False] * len(answer)
    return Spoken(tokens, sampled)
