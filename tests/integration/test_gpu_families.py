"""Families of whose layers other packages have kernels for a GPU, or which Megatron has for a GPU alone."""

import pytest

from r3_adapter.errors import R3Error
from r3_adapter.proof.families import KERNELS, NOT_ON_CPU
from r3_adapter.proof.models import Model
from r3_adapter.proof.shown import prove_families
from r3_adapter.sglang.cpu import has_gpu


@pytest.mark.engine
@pytest.mark.megatron
@pytest.mark.gpu(2)
@pytest.mark.parametrize("family", [*KERNELS, *NOT_ON_CPU])
def test_a_family_with_kernels_replays_on_two_gpus(family: str) -> None:
    if not has_gpu():
        # A rehearsal; without kernels the families are proved in test_families.py.
        if family in NOT_ON_CPU:
            with pytest.raises(R3Error, match=f"{family}: Megatron does not train it without a GPU"):
                prove_families([Model(family)])
        else:
            Model(family).check()
        return
    (found,) = prove_families([Model(family, rollout="transformers")])
    assert found.passed, found.sentence
