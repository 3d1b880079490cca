"""Steps of a rollout that never ran, with a skew of experts like that of real ones, for `r3 balance --simulate`.

Experts are popular in general, by topic of a prompt, by prompt and by sample: each adds a normal number to the
logarithm of an expert's weight. A sample's tokens choose the top-k of weights with noise.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from r3_adapter.balance.loads import Counts
from r3_adapter.errors import R3Error, check_choice

Skew = Literal["mild", "medium", "strong"]
SPREADS: dict[str, tuple[float, float, float, float]] = {
    "mild": (0.25, 0.25, 0.15, 0.1),
    "medium": (0.55, 0.5, 0.3, 0.15),
    "strong": (0.95, 0.85, 0.5, 0.2),
}
"""Standard deviations of an expert's popularity in general, by topic, by prompt and by sample."""
MOST_DRIFT = 1.0


@dataclass(frozen=True)
class World:
    """What is simulated: 64 prompts of 16 samples each in 8 topics, and a model's sizes.

    drift: of a policy that learns: standard deviation of what each step adds to each expert's popularity, in general
        and by topic.
    """

    skew: Skew = "medium"
    num_experts: int = 128
    topk: int = 8
    num_layers: int = 24
    num_prompts: int = 64
    samples_per_prompt: int = 16
    num_topics: int = 8
    mean_tokens: int = 4096
    drift: float = 0.0

    def __post_init__(self) -> None:
        check_choice("skew", self.skew, Skew)
        if not 0 <= self.drift <= MOST_DRIFT:
            raise R3Error(f"drift ({self.drift}) outside 0 to {MOST_DRIFT}")


def simulate(world: World, num_steps: int, seed: int) -> list[tuple[npt.NDArray[np.int64], Counts]]:
    """Return the tokens [S] and the counts [S, L, E] of each step; prompts are new in each, topics are not."""
    rng = np.random.default_rng(seed)
    general, by_topic, *_ = SPREADS[world.skew]
    base = rng.normal(0, general, (world.num_layers, world.num_experts))
    topics = rng.normal(0, by_topic, (world.num_layers, world.num_topics, world.num_experts))
    steps = []
    for number in range(num_steps):
        if number and world.drift:
            base = base + rng.normal(0, world.drift, base.shape)
            topics = topics + rng.normal(0, world.drift, topics.shape)
        steps.append(_step(world, rng, base, topics))
    return steps


def _step(
    world: World, rng: np.random.Generator, base: npt.NDArray[np.float64], topics: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.int64], Counts]:
    *_, by_prompt, by_sample = SPREADS[world.skew]
    shape = (world.num_prompts, world.samples_per_prompt)
    lengths = (rng.lognormal(0, 0.6, shape[0])[:, None] * rng.lognormal(0, 0.5, shape)).ravel()
    shares = np.clip(lengths / lengths.mean(), 1 / 16, 4)
    tokens = np.maximum(shares * world.mean_tokens, 1).astype(np.int64)
    prompt = np.repeat(np.arange(shape[0]), shape[1])
    topic = rng.integers(0, world.num_topics, shape[0])[prompt]
    counts = np.empty((len(tokens), world.num_layers, world.num_experts), np.int32)
    for layer in range(world.num_layers):
        weight = base[layer] + topics[layer][topic]
        weight += rng.normal(0, by_prompt, (shape[0], world.num_experts))[prompt]
        weight += rng.normal(0, by_sample, weight.shape)
        counts[:, layer] = rng.poisson(_chosen(np.exp(weight), world.topk) * tokens[:, None])
    return tokens, counts


def _chosen(weights: npt.NDArray[np.float64], topk: int) -> npt.NDArray[np.float64]:
    """Return the probability with which each of [S, E] weights is among the top-k, as 1 - exp(-c * weight)."""
    low, high = np.full((len(weights), 1), 1e-6), np.full((len(weights), 1), 1e6)
    for _ in range(40):
        middle = np.sqrt(low * high)
        too_many = (1 - np.exp(-middle * weights)).sum(axis=1, keepdims=True) > topk
        low, high = np.where(too_many, low, middle), np.where(too_many, middle, high)
    found: npt.NDArray[np.float64] = 1 - np.exp(-np.sqrt(low * high) * weights)
    return found
