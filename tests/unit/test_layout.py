import itertools

import pytest

from r3_adapter.errors import LayoutError
from r3_adapter.layout import ParallelLayout


@pytest.mark.parametrize("sizes", list(itertools.product((1, 2), (1, 2), (1, 2), (1, 2, 4), (1, 2))))
def test_ranks_fill_both_grids_once(sizes):
    tp, pp, cp, ep, etp = sizes
    layout = ParallelLayout.smallest(tp=tp, pp=pp, cp=cp, ep=ep, etp=etp)
    coords = [layout.coords(rank) for rank in range(layout.world_size)]
    assert len({(c.tp_rank, c.cp_rank, c.dp_rank, c.pp_rank) for c in coords}) == layout.world_size
    assert len({(c.etp_rank, c.ep_rank, c.edp_rank, c.pp_rank) for c in coords}) == layout.world_size
    assert max(c.ep_rank for c in coords) == ep - 1


def test_expert_tensor_parallel_defaults_to_tensor_parallel():
    layout = ParallelLayout.smallest(tp=2, ep=2)
    assert (layout.etp, layout.dp, layout.world_size) == (2, 2, 4)


def test_impossible_layouts_are_refused():
    with pytest.raises(LayoutError, match=r"etp \* ep \(4\) does not divide tp \* cp \* dp \(2\)"):
        ParallelLayout(dp=2, ep=4)
    with pytest.raises(LayoutError, match=r"rank \(1\) outside world of 1"):
        ParallelLayout().coords(1)
    with pytest.raises(LayoutError, match=r"pp \(0\) < 1"):
        ParallelLayout(pp=0)
