"""The losses of policy optimisation, against their definitions."""

import numpy as np
import pytest
import torch

from r3_adapter.rl.losses import (
    Objective,
    TokenColumns,
    clipped,
    group_advantages,
    k3,
    policy_loss,
    sequence_ratio,
    truncated_importance,
)

OWNER = torch.tensor([0, 0, 0, 1, 1, 2])


def alone(values: torch.Tensor) -> torch.Tensor:
    return values


def columns(seed: int = 0) -> tuple[torch.Tensor, TokenColumns]:
    """Return log-probabilities that want a gradient, and columns of 6 tokens of 3 samples."""
    generator = torch.Generator().manual_seed(seed)

    def logprobs() -> torch.Tensor:
        return -torch.rand(6, generator=generator) - 0.1

    current = logprobs().requires_grad_()
    return current, TokenColumns(
        owner=OWNER,
        advantage=torch.tensor([1.5, -0.5, 2.0])[OWNER],
        weight=torch.ones(6),
        rollout=logprobs(),
        old=logprobs(),
        reference=logprobs(),
    )


def test_advantages_are_normalised_in_each_group() -> None:
    found = group_advantages(np.array([[0.0, 1.0, 1.0, 0.0], [0.5, 0.5, 0.5, 0.5], [1.0, 2.0, 3.0, 10.0]]))
    assert found.mean(axis=1) == pytest.approx(0.0)
    assert found.std(axis=1) == pytest.approx([1.0, 0.0, 1.0])
    assert found[0] == pytest.approx([-1, 1, 1, -1])


def test_a_clipped_ratio_has_no_gradient_where_it_went_too_far_already() -> None:
    ratio = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.0], requires_grad=True)
    clipped(ratio, torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0]), 0.2, 0.3).sum().backward()
    assert ratio.grad is not None
    assert ratio.grad.tolist() == [0.0, 1.0, -1.0, 0.0, -1.0]


def test_the_upper_bound_is_its_own() -> None:
    loss = clipped(torch.tensor([2.0, 0.1]), torch.tensor([1.0, -1.0]), 0.2, 0.5)
    assert loss.tolist() == pytest.approx([-1.5, 0.8])


def test_sequence_ratio_is_the_geometric_mean_with_the_gradient_of_gspo() -> None:
    current, data = columns()
    ratio = sequence_ratio(current, data, 3, alone)
    own = torch.zeros(3).index_add(0, OWNER, current - data.old) / torch.tensor([3.0, 2.0, 1.0])
    assert torch.allclose(ratio, own.exp()[OWNER])
    (by_token,) = torch.autograd.grad((ratio * data.advantage / torch.tensor([3.0, 2.0, 1.0])[OWNER]).sum(), current)
    (by_sequence,) = torch.autograd.grad((own.exp() * torch.tensor([1.5, -0.5, 2.0])).sum(), current)
    assert torch.allclose(by_token, by_sequence)


def test_sequence_ratio_is_the_same_where_ranks_share_the_tokens_out() -> None:
    current, data = columns()
    whole = sequence_ratio(current, data, 3, alone)
    halves = [torch.tensor([0, 2, 4]), torch.tensor([1, 3, 5])]

    def part(chosen: torch.Tensor) -> TokenColumns:
        return TokenColumns(OWNER[chosen], *(getattr(data, name)[chosen] for name in FIELDS))

    sums: list[torch.Tensor] = []
    for chosen in halves:
        sequence_ratio(current[chosen], part(chosen), 3, lambda own: sums.append(own) or own)  # type: ignore[func-returns-value]
    for chosen in halves:
        found = sequence_ratio(current[chosen], part(chosen), 3, lambda _: sums[0] + sums[1])
        assert torch.allclose(found, whole[chosen])


FIELDS = ("advantage", "weight", "rollout", "old", "reference")


def test_importance_weights_are_truncated_above_only() -> None:
    _, data = columns()
    plain = torch.exp(data.old - data.rollout)
    weights = truncated_importance(data, 1.1)
    assert torch.equal(weights, plain.clamp(max=1.1))
    assert (plain > 1.1).any() and (plain < 0.9).any()


def test_k3_estimates_kl() -> None:
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.5, 0.3, 0.2])
    each = k3(p.log(), q.log())
    assert (each >= 0).all() and float(k3(p.log(), p.log()).abs().sum()) == 0.0
    assert float((p * each).sum()) == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-6)


@pytest.mark.parametrize("estimator", ["grpo", "gspo"])
def test_on_policy_the_gradient_is_the_policy_gradient(estimator: str) -> None:
    current, data = columns()
    data = TokenColumns(OWNER, data.advantage, data.weight, data.rollout, current.detach())
    loss, cut = policy_loss(Objective(estimator=estimator), current, data, 3, alone)  # type: ignore[arg-type]
    loss.sum().backward()
    assert current.grad is not None and torch.allclose(current.grad, -data.advantage)
    assert not cut.any()


def test_parts_of_the_objective_add_up() -> None:
    current, data = columns()
    plain, cut = policy_loss(Objective(), current, data, 3, alone)
    whole, _ = policy_loss(Objective(tis_clip=1.1, kl_coef=0.5), current, data, 3, alone)
    assert data.reference is not None
    want = plain * truncated_importance(data, 1.1) + 0.5 * k3(current, data.reference)
    assert torch.allclose(whole, want)
    ratio = torch.exp(current - data.old)
    outside = ((ratio > 1.2) & (data.advantage > 0)) | ((ratio < 0.8) & (data.advantage < 0))
    assert torch.equal(cut, outside) and cut.any() and not cut.all()
