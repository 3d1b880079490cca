"""Losses of policy optimisation, a small function each.

N: sampled tokens of a micro-batch; G: samples of a prompt; B: samples of a micro-batch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from r3_adapter.errors import check_choice

Estimator = Literal["grpo", "gspo"]
Reduce = Callable[[torch.Tensor], torch.Tensor]
"""Sums [B] over the ranks that share a micro-batch's tokens out."""


@dataclass(frozen=True)
class Objective:
    """What is minimised, apart from the data.

    eps_clip, eps_clip_high: how far the ratio may go below and above 1.
    tis_clip: truncation of the importance weight trainer / rollout; None leaves it out.
    kl_coef: weight of the KL to the reference model; 0 leaves it out.

    Raises:
        R3Error: an estimator that is not known.
    """

    estimator: Estimator = "grpo"
    eps_clip: float = 0.2
    eps_clip_high: float = 0.2
    tis_clip: float | None = None
    kl_coef: float = 0.0

    def __post_init__(self) -> None:
        check_choice("estimator", self.estimator, Estimator)


@dataclass(frozen=True)
class TokenColumns:
    """What the loss needs of each sampled token of a micro-batch, all [N].

    owner: int64; the token's sample in the micro-batch. advantage, weight: float32; weight is 1 where all tokens count
    alike. old, rollout: log-probabilities by the trainer before the step, and by the engine. reference: by the
    reference model; None without one.
    """

    owner: torch.Tensor
    advantage: torch.Tensor
    weight: torch.Tensor
    rollout: torch.Tensor
    old: torch.Tensor
    reference: torch.Tensor | None = None


def group_advantages(rewards: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return [..., G] advantages of the samples of each prompt: rewards less their mean, over their deviation.

    A group whose rewards are all the same has advantage 0.

    Source: arXiv 2402.03300 (GRPO), section 4.1.2.
    """
    centred = rewards - rewards.mean(axis=-1, keepdims=True)
    deviation = rewards.std(axis=-1, keepdims=True)
    found: npt.NDArray[np.float64] = np.where(deviation > 1e-8, centred / np.maximum(deviation, 1e-8), 0.0)
    return found


def clipped(ratio: torch.Tensor, advantage: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """Return [N] PPO's pessimistic loss: -min(ratio A, clip(ratio, 1 - low, 1 + high) A).

    Source: arXiv 1707.06347, equation 7; separate bounds as in arXiv 2503.14476, section 3.1.
    """
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def sequence_ratio(current: torch.Tensor, columns: TokenColumns, num_samples: int, reduce: Reduce) -> torch.Tensor:
    """Return [N] the length-normalised ratio of each token's sequence, with the gradient of its log-probability.

    Source: arXiv 2507.18071 (GSPO), equations 7 and 14: s = sg[s_i] pi / sg[pi].
    """
    sums = torch.zeros(2, num_samples, dtype=torch.float32, device=current.device)
    sums[0].index_add_(0, columns.owner, current.detach() - columns.old)
    sums[1].index_add_(0, columns.owner, torch.ones_like(columns.old))
    total, count = reduce(sums)
    mean = (total / count.clamp(min=1))[columns.owner]
    return torch.exp(mean + current - current.detach())


def truncated_importance(columns: TokenColumns, clip: float) -> torch.Tensor:
    """Return [N] min(pi_trainer / pi_rollout, clip), which corrects for the engine's other distribution.

    Source: F. Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training" (2025).
    """
    return torch.exp(columns.old - columns.rollout).clamp(max=clip)


def k3(current: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return [N] an unbiased, nonnegative estimate of KL(current || reference) on tokens of the current policy.

    Source: J. Schulman, "Approximating KL Divergence" (2020); as in arXiv 2402.03300, equation 4.
    """
    diff = reference - current
    return torch.expm1(diff) - diff


def policy_loss(
    objective: Objective, current: torch.Tensor, columns: TokenColumns, num_samples: int, reduce: Reduce
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return [N] the loss of each token, weighted, and [N] bool, whether its ratio was clipped.

    current: [N] float32; log-probabilities under the weights that are trained.
    """
    if objective.estimator == "gspo":
        ratio = sequence_ratio(current, columns, num_samples, reduce)
    else:
        ratio = torch.exp(current - columns.old)
    loss = clipped(ratio, columns.advantage, objective.eps_clip, objective.eps_clip_high)
    cut = loss.detach() > -(ratio * columns.advantage).detach()
    if objective.tis_clip is not None:
        loss = loss * truncated_importance(columns, objective.tis_clip)
    if objective.kl_coef:
        assert columns.reference is not None
        loss = loss + objective.kl_coef * k3(current, columns.reference)
    return loss * columns.weight, cut
