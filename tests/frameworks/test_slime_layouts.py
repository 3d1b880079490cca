"""slime's packed micro-batches, cut by our repack, against its own cut in our own words."""

from types import ModuleType

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from r3_adapter.errors import LayoutError
from r3_adapter.frameworks.slime.batches import with_tail
from r3_adapter.layout import CpCut, Packing, ParallelLayout
from r3_adapter.repack import LIVE, repack
from r3_adapter.trace import RoutingTrace

EXPERTS, TOPK, LAYERS = 16, 3, (1, 2, 4)
PAD = (-1, -1)


def random_trace(num_tokens: int, rng: np.random.Generator) -> RoutingTrace:
    """Return a trace as the engine makes it: the last token has no route."""
    ids = rng.random((num_tokens, len(LAYERS), EXPERTS)).argsort(2)[..., :TOPK].astype(np.uint8)
    ids[-1] = 0
    versions = np.zeros(num_tokens, np.int32)
    versions[-1] = -1
    return RoutingTrace(
        topk_ids=ids,
        token_ids=rng.integers(0, 1000, num_tokens).astype(np.int32),
        version_ids=versions,
        layer_ids=np.array(LAYERS, np.int32),
        num_experts=EXPERTS,
        weight_versions=("3",),
    )


@given(
    lengths=st.lists(st.integers(2, 40), min_size=1, max_size=5),
    tp=st.sampled_from([1, 2]),
    cp=st.sampled_from([1, 2, 4]),
    multiple=st.sampled_from([1, 2, 4, 16]),
    whole_stream=st.booleans(),
    seed=st.integers(0, 1 << 30),
)
@example(lengths=[8, 16], tp=2, cp=2, multiple=2, whole_stream=False, seed=0)  # no tail of padding
@example(lengths=[8, 16], tp=2, cp=2, multiple=2, whole_stream=True, seed=0)
@example(lengths=[7, 9], tp=1, cp=1, multiple=16, whole_stream=False, seed=0)
@settings(max_examples=200)
def test_each_row_has_the_experts_of_its_token(
    lengths: list[int], tp: int, cp: int, multiple: int, whole_stream: bool, seed: int, slimelike: ModuleType
) -> None:
    rng = np.random.default_rng(seed)
    traces = [random_trace(length, rng) for length in lengths]
    cells = [[(sample, at) for at in range(length)] for sample, length in enumerate(lengths)]
    layout = ParallelLayout(tp=tp, cp=cp)
    cp_cut: CpCut = "contiguous" if whole_stream else "zigzag"
    for rank in range(layout.world_size):
        coords = layout.coords(rank)
        share, bounds = slimelike.pack(
            cells, tp=tp, cp=cp, cp_rank=coords.cp_rank, multiple=multiple, whole_stream=whole_stream, fill=PAD
        )
        tokens = [0 if cell == PAD else int(traces[cell[0]].token_ids[cell[1]]) for cell in share]
        packing = Packing.packed(bounds, cp_cut=cp_cut)
        routes = repack(
            with_tail(traces, len(bounds) - 1),
            packing,
            layout,
            rank,
            layer_ids=np.array(LAYERS, np.int32),
            input_ids=np.array(tokens, np.int64),
            dtype=np.dtype(np.int16),
        )
        # Sequence parallelism: the MoE layers of a tensor-parallel rank see their part of the tokens.
        part = len(share) // tp
        own = share[coords.tp_rank * part : (coords.tp_rank + 1) * part]
        assert routes.topk_ids.shape == (len(LAYERS), part, TOPK)
        for row, (sample, at) in enumerate(own):
            if (sample, at) == PAD:
                assert routes.row_versions[row] < LIVE
            elif traces[sample].captured[at]:
                assert np.array_equal(routes.topk_ids[:, row], traces[sample].topk_ids[at])
            else:
                assert (routes.topk_ids[:, row] == LIVE).all()


def test_sequences_that_are_not_the_samples() -> None:
    traces = [random_trace(5, np.random.default_rng(0))] * 2
    with pytest.raises(LayoutError, match="4 packed sequences != 2 samples, or these and one of padding"):
        with_tail(traces, 4)
    with pytest.raises(LayoutError, match="1 packed sequences != 2 samples"):
        with_tail(traces, 1)
