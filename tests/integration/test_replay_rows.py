"""A padded batch of several samples: Megatron's rows are s * b + i, and each row uses the experts of its own token."""

from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.megatron

ORDER = (
    "its input_ids are (3, 16), so that Megatron's rows are s * 3 + i, and its routes are in the order of a packed "
    "batch [1, t], sample by sample: prepare them with the packing of what the model gets"
)


@pytest.fixture(scope="module")
def said(tell: Callable[..., list[dict[str, Any]]]) -> dict[str, Any]:
    """What the routers of a model had and used."""
    (found,) = tell(["replay_rows.py"])
    return found


@pytest.mark.parametrize("way", ["argument", "attached"])
def test_rows_take_turns_at_the_samples(said: dict[str, Any], way: str) -> None:
    routers, num_samples = said[way], len(said["tokens"])
    assert (len(routers), num_samples) == (3, 3)
    for m, router in enumerate(routers):
        rows = [divmod(row, num_samples) for row in range(len(router["tokens"]))]
        assert router["tokens"] == [said["tokens"][sample][pos] for pos, sample in rows]
        assert router["used"] == [sorted(said["ids"][sample][pos][m]) for pos, sample in rows]


def test_routes_sample_by_sample_are_refused_by_a_padded_model(said: dict[str, Any]) -> None:
    assert said["sample by sample, as an argument"] == f"GPTModel: {ORDER}"
    assert said["sample by sample, attached"] == f"rank 0: chunk 0, micro-batch 0: {ORDER}"
