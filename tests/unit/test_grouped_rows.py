"""Experts that compute together say what each alone says, to the bit in bfloat16."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from r3_adapter.grouped_rows import GroupedRows  # noqa: E402

IN, OUT = 24, 40
HAS_BFLOAT16 = torch.cpu._is_avx512_bf16_supported()


def products(counts: Sequence[int], dtype: Any) -> list[tuple[Any, Any]]:
    """Return pairs, of all experts together and of each alone: outputs, and the gradients of the weights."""
    generator = torch.Generator().manual_seed(sum(counts))
    x = torch.randn(sum(counts), IN, generator=generator).to(dtype)
    grad = torch.randn(sum(counts), OUT, generator=generator).to(dtype)
    weights = torch.randn(len(counts), IN, OUT, generator=generator).to(dtype)
    rows = GroupedRows(counts)
    padded = rows.padded(x)
    each = [part @ weights[expert] for expert, part in enumerate(x.split(list(counts)))]
    pairs = [(rows.through(padded, weights[rows.experts]), torch.cat(each))]
    parts = list(zip(grad.split(list(counts)), x.split(list(counts)), strict=True))
    for expert, found in zip(rows.experts, rows.products(rows.padded(grad), padded), strict=True):
        pairs.append((found, parts[expert][0].t() @ parts[expert][1]))
    assert sorted(rows.experts) == [expert for expert, count in enumerate(counts) if count]
    return pairs


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 70), min_size=1, max_size=9))
def test_each_row_meets_the_matrix_of_its_expert(counts: list[int]) -> None:
    for together, alone in products(counts, torch.float64):
        torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(not HAS_BFLOAT16, reason="this processor has no instructions for bfloat16")
@pytest.mark.parametrize("counts", [[700, 3, 0, 17, 16, 1, 33, 300], [5] * 32, [0, 0, 64], [0, 1, 2, 1100]])
def test_bits_are_the_same_in_bfloat16(counts: list[int]) -> None:
    for together, alone in products(counts, torch.bfloat16):
        assert torch.equal(together, alone)
