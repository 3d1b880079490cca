"""A rank's optimizer comes back bit by bit, and only to a model whose weights lie as they did."""

from types import SimpleNamespace

import pytest
import torch

from r3_adapter.errors import ReplayError
from r3_adapter.megatron.policy_trainer.moments import load_moments, save_moments

ABOUT = {"layout": "ep 2", "placement": "0123"}


def made(seed: int) -> SimpleNamespace:
    """Return what Megatron has of an optimizer, after a step."""
    parameter = torch.nn.Parameter(torch.rand(3, generator=torch.Generator().manual_seed(seed)))
    inner = torch.optim.Adam([parameter])
    parameter.grad = torch.ones(3)
    inner.step()
    return SimpleNamespace(chained_optimizers=[SimpleNamespace(optimizer=inner), SimpleNamespace(optimizer=None)])


def state_of(optimizer: SimpleNamespace) -> list[torch.Tensor]:
    inner = optimizer.chained_optimizers[0].optimizer
    (parameter,) = inner.param_groups[0]["params"]
    return [parameter, *(inner.state[parameter][name] for name in ("exp_avg", "exp_avg_sq"))]


def test_moments_come_back_as_they_were(tmp_path):
    first, other = made(1), made(2)
    path = save_moments(first, tmp_path / "optimizer.0.pt", ABOUT, {"version": 7})
    assert load_moments(other, path, ABOUT, torch.device("cpu")) == {"version": 7}
    assert all(torch.equal(*pair) for pair in zip(state_of(first), state_of(other), strict=True))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"placement": "4567"}, "optimizer of placement 0123 != 4567 of the model"),
        ({"placement": None}, "optimizer of placement 0123 != None of the model"),
        ({"layout": "ep 4"}, "optimizer of layout ep 2 != ep 4 of the model"),
    ],
)
def test_moments_of_experts_that_lay_elsewhere_are_refused(change, says, tmp_path):
    path = save_moments(made(1), tmp_path / "optimizer.0.pt", ABOUT, {"version": 7})
    untouched = made(2)
    before = [each.clone() for each in state_of(untouched)]
    with pytest.raises(ReplayError, match=says):
        load_moments(untouched, path, {**ABOUT, **change}, torch.device("cpu"))
    assert all(torch.equal(*pair) for pair in zip(before, state_of(untouched), strict=True))
