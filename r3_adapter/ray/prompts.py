"""Which prompts a step trains on, and which are held out of training for evaluations."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from r3_adapter.errors import R3Error
from r3_adapter.ray.pool import RolloutPool
from r3_adapter.ray.rollout import Group
from r3_adapter.rl.tasks import Dataset, Task, Tokens

EVALUATION = -1
"""Number of an evaluation's batch in the pool; those of steps are from 0 on."""
_STREAM = 1 << 20
"""Of the random numbers that prompts are held out by; those of steps have smaller ones."""
_DRAWS = 1000


class Prompts:
    """The prompts of a run: the same for a seed, whenever they are asked for.

    A task that draws its prompts draws those of each step; of a data set every prompt comes once in an epoch, in an
    order of chance.

    num_held: prompts that are held out of training, all different.

    Raises:
        R3Error: there are not so many.
    """

    def __init__(self, task: Task, seed: int, num_held: int = 0) -> None:
        self._task, self._seed = task, seed
        rng = np.random.default_rng([seed, _STREAM])
        self.held = self._draw(rng, num_held)
        self._held = frozenset(self.held)
        self._kept: list[Tokens] = []
        self._orders: dict[int, npt.NDArray[np.int64]] = {}
        if isinstance(task, Dataset):
            self._kept = [prompt for prompt in task.prompts if tuple(prompt) not in self._held]
            if not self._kept:
                raise R3Error(f"all {len(task.prompts)} prompts are held out, none is left to train on")

    def of_step(self, step: int, number: int) -> list[Tokens]:
        """Return the prompts of a step, `number` in each."""
        if self._kept:
            return [self._at(step * number + index) for index in range(number)]
        rng = np.random.default_rng([self._seed, step])
        return [self._other(rng) for _ in range(number)]

    def evaluate(self, pool: RolloutPool) -> dict[str, float]:
        """Let the engines answer what is held out, greedily and by their own routers: that is what ships.

        Raises:
            R3Error: a prompt that fails again and again.
        """
        groups = [Group(number, prompt, 1, greedy=True) for number, prompt in enumerate(self.held)]
        pool.submit(EVALUATION, groups)
        rollouts = pool.collect(EVALUATION)
        rewards = [reward for rollout in rollouts for reward in rollout.rewards]
        lengths = [rollout.response_tokens for rollout in rollouts]
        return {"eval_reward": float(np.mean(rewards)), "eval_response_len": float(np.mean(lengths))}

    def _draw(self, rng: np.random.Generator, number: int) -> Sequence[tuple[int, ...]]:
        found: dict[tuple[int, ...], None] = {}
        for _ in range(_DRAWS + 20 * number):
            if len(found) == number:
                return list(found)
            found[tuple(self._task.prompt(rng))] = None
        raise R3Error(f"{len(found)} different prompts of the task < {number}, which are to be held out")

    def _other(self, rng: np.random.Generator) -> Tokens:
        """Draw a prompt that is not held out."""
        for _ in range(_DRAWS):
            prompt = self._task.prompt(rng)
            if tuple(prompt) not in self._held:
                return prompt
        raise R3Error(f"{_DRAWS} prompts in a row are among the {len(self.held)} that are held out of training")

    def _at(self, place: int) -> Tokens:
        epoch, place = divmod(place, len(self._kept))
        if epoch not in self._orders:
            # One is kept: a step hardly ever has prompts of more than two epochs.
            rng = np.random.default_rng([self._seed, _STREAM + 1, epoch])
            self._orders = {epoch: rng.permutation(len(self._kept))}
        return self._kept[self._orders[epoch][place]]
