"""Rows that say which token they are of, whatever a framework does to the array that holds them."""

from typing import Any

import numpy as np
import pytest
import torch

from r3_adapter.errors import CaptureError, R3Error, ReplayError, TraceError
from r3_adapter.frameworks.verl.options import Options
from r3_adapter.frameworks.verl.sealed import num_seal_layers, seal, unseal
from r3_adapter.layout import Packing, ParallelLayout
from r3_adapter.megatron.inputs import check_order
from r3_adapter.repack import repack
from r3_adapter.sglang.moe_config import MoEConfig

MOE = MoEConfig(num_experts=200, topk=4, layer_ids=(1, 2, 4), num_layers=5)
TOKENS = [7, 70_000, 7, 2**31 - 1, 0, 12]


def rows(seed: int = 0) -> np.ndarray[Any, Any]:
    """Return [5, L, K], of all tokens but the last."""
    found = np.random.default_rng(seed).random((5, 5, MOE.num_experts)).argsort(axis=2)[:, :, :4]
    found[:, [0, 3]] = 0
    return found


def padded(sealed: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the rows as verl makes them as many as there are tokens."""
    return np.concatenate([sealed, np.zeros((1, *sealed.shape[1:]), sealed.dtype)])


@pytest.mark.parametrize("topk", [1, 2, 4, 5, 8])
def test_what_was_sealed_is_read_with_its_steps(topk: int) -> None:
    moe = MoEConfig(200, topk, (1, 2, 4), 5)
    routes = rows()[:, :, :1] + np.arange(topk)
    routes = np.where(np.isin(np.arange(5), moe.layer_ids)[None, :, None], routes % 200, 0)
    sealed = [seal(routes[:3], TOKENS[:3], 70_001, moe, "a"), seal(routes[3:], TOKENS[3:5], None, moe, "b")]
    assert sealed[0].shape == (3, 5 + num_seal_layers(topk), topk)
    trace = unseal(padded(np.concatenate(sealed)), np.array(TOKENS), moe, "sample 0")
    assert trace.token_ids.tolist() == TOKENS and trace.captured.tolist() == [True] * 5 + [False]
    assert (trace.topk_ids[:5] == routes[:, [1, 2, 4]]).all()
    names = [trace.weight_versions[version] for version in trace.version_ids[:5]]
    assert names == ["70001"] * 3 + ["unknown"] * 2


def test_a_sample_of_padding_has_no_route() -> None:
    shape = (3, 5 + num_seal_layers(4), 4)
    assert not unseal(np.zeros(shape, np.int16), np.array([1, 2, 3]), MOE, "sample 0").captured.any()


def sealed() -> np.ndarray[Any, Any]:
    return padded(seal(rows(), TOKENS[:-1], 1, MOE, "a"))


def shifted(found: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.roll(found, 1, axis=0)


def moved_layers(found: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return found[:, [1, 0, *range(2, found.shape[1])]]


def gap(found: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    found[2] = 0
    return found


def unsealed(found: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    found[:, 5:] = 0
    return found


def no_expert(found: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    found[3, 2, 1] = 200
    return found


def repeated(found: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    found[3, 2, 1] = found[3, 2, 0]
    return found


DAMAGES = {
    shifted: "sample 0: no row at position 0, and there are 5 rows",
    moved_layers: "sample 0: layer 0 has routes, but the MoE layers are",
    gap: "sample 0: no row at position 2, and there are 4 rows",
    unsealed: "sample 0: the row at position 0 does not say which token it is of",
    no_expert: r"sample 0: expert 200 at token 3, layer 2 outside 0 to num_experts \(200\) - 1",
    repeated: "sample 0: .*token 3",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_is_named(damage: Any) -> None:
    with pytest.raises(TraceError, match=DAMAGES[damage]):
        unseal(damage(sealed()), np.array(TOKENS), MOE, "sample 0")


def test_rows_of_other_tokens_and_of_another_engine_are_named() -> None:
    with pytest.raises(TraceError, match="position 1 is of token 70000 != 70001 of the batch"):
        unseal(sealed(), np.array([7, 70_001, *TOKENS[2:]]), MOE, "sample 0")
    with pytest.raises(TraceError, match="was it loaded in the processes of the rollout too"):
        unseal(padded(rows().astype(np.int16)), np.array(TOKENS), MOE, "sample 0")
    with pytest.raises(CaptureError, match=r"shape \[5, 5, 4\] != whole numbers of \[6, 5, 4\]"):
        seal(rows(), TOKENS, 1, MOE, "a")
    with pytest.raises(CaptureError, match="expert 200 at token 0, layer 1"):
        seal(np.where(rows() > 0, 200, 0), TOKENS[:-1], 1, MOE, "a")


def test_options_are_known_words() -> None:
    assert Options.from_environment({"R3_VERL_BACKEND": "native", "HOME": "/"}).backend == "native"
    for variables in ({"R3_VERL_BACKENDS": "auto"}, {"R3_VERL_BACKEND": "mcore"}, {"R3_VERL_DISPATCH_PLAN": "1"}):
        with pytest.raises(ReplayError, match=next(iter(variables))):
            Options.from_environment(variables)
    assert issubclass(ReplayError, R3Error)


def test_nested_tokens_of_a_later_stage_say_nothing_of_the_order_of_rows() -> None:
    """verl gives a stage that reads no tokens its samples as they are; a padded batch is refused there as anywhere."""
    trace = unseal(sealed(), np.array(TOKENS), MOE, "sample 0")
    routes = repack([trace, trace], Packing.packed([0, 6, 12]), ParallelLayout(), 0, layer_ids=[1])
    samples = [torch.tensor(TOKENS), torch.tensor(TOKENS)]
    check_order("chunk 0", torch.nested.as_nested_tensor(samples, layout=torch.jagged), routes)
    with pytest.raises(ReplayError, match="chunk 0: its input_ids are"):
        check_order("chunk 0", torch.stack(samples), routes)
