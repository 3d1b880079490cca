"""Texts of a few samples of each step, for whoever wants to read what the policy says.

    RUN/samples.jsonl   one object a step: step, samples, each of a prompt, a response and its reward

Texts are what a model wrote: nobody vouches for them. Long ones lose their middle, so that a step takes
some KB at most.
"""

from collections.abc import Mapping
from typing import Any

from r3_adapter.errors import R3Error, show
from r3_adapter.runs.files import check_count

GROUPS, SAMPLES = 2, 2
"""Prompts of a step of which samples are kept, and how many of each."""
_MOST = 1000
"""Characters of a text; of a longer one half are its first, half its last."""
_KEYS = ("prompt", "response", "reward")


def shortened(text: str) -> str:
    """Return a text, without its middle if it is long."""
    if len(text) <= _MOST:
        return text
    half = _MOST // 2
    return f"{text[:half]} [... {len(text) - 2 * half:,} characters ...] {text[-half:]}"


def shown_sample(prompt: str, response: str, reward: float) -> dict[str, Any]:
    """Return a sample as samples.jsonl has it."""
    return {"prompt": shortened(prompt), "response": shortened(response), "reward": float(reward)}


def check_samples(record: Mapping[str, Any], place: str) -> None:
    """Refuse a line of samples.jsonl that is not as the one above.

    Raises:
        R3Error: with the place and what is wrong.
    """
    check_count(record, "step", place)
    samples = record.get("samples")
    if not isinstance(samples, list) or len(samples) > GROUPS * SAMPLES:
        raise R3Error(f"{place}: samples is {show(samples)}, not a list of at most {GROUPS * SAMPLES}")
    for at, sample in enumerate(samples):
        if not isinstance(sample, dict) or sorted(sample) != sorted(_KEYS):
            raise R3Error(f"{place}: sample {at} is {show(sample)}, not an object of {', '.join(_KEYS)}")
        if not (isinstance(sample["prompt"], str) and isinstance(sample["response"], str)):
            raise R3Error(f"{place}: prompt or response of sample {at} is not a string")
        if not isinstance(sample["reward"], float):
            raise R3Error(f"{place}: reward of sample {at} is {show(sample['reward'])}, not a fraction")
