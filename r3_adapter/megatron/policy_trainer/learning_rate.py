"""The learning rate over a run's optimizer steps, by Megatron's own scheduler and in its words."""

from dataclasses import dataclass
from typing import Any, Literal

from r3_adapter.errors import ReplayError, check_choice

DecayStyle = Literal["constant", "linear", "cosine", "inverse-square-root"]


@dataclass(frozen=True)
class LearningRate:
    """What the rate is at each optimizer step.

    peak: after the warm-up. least: below which decay does not bring it. warmup_iters: optimizer steps from 0 to `peak`.
    decay_iters: optimizer steps, those of the warm-up among them, after which it is `least`; of a rate that decays.

    Raises:
        ReplayError: a style that is not known, or numbers that contradict each other.
    """

    peak: float = 1e-4
    least: float = 0.0
    decay_style: DecayStyle = "constant"
    warmup_iters: int = 0
    decay_iters: int | None = None

    def __post_init__(self) -> None:
        check_choice("lr_decay_style", self.decay_style, DecayStyle, ReplayError)
        if not 0 <= self.least <= self.peak:
            raise ReplayError(f"min_lr ({self.least}) is not between 0 and lr ({self.peak})")
        if self.warmup_iters < 0:
            raise ReplayError(f"lr_warmup_iters ({self.warmup_iters}) < 0")
        if self.decay_style == "constant":
            if self.decay_iters is not None or self.least:
                raise ReplayError(
                    f"lr_decay_iters ({self.decay_iters}), min_lr ({self.least}): lr_decay_style 'constant' has neither"
                )
        elif self.decay_iters is None or self.decay_iters <= self.warmup_iters:
            raise ReplayError(f"lr_decay_iters ({self.decay_iters}) <= lr_warmup_iters ({self.warmup_iters})")

    def scheduler(self, optimizer: Any) -> Any:
        """Return Megatron's scheduler, which has set the first step's rate."""
        from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

        weight_decay = optimizer.config.weight_decay
        return OptimizerParamScheduler(
            optimizer,
            init_lr=0.0,
            max_lr=self.peak,
            min_lr=self.least,
            lr_warmup_steps=self.warmup_iters,
            lr_decay_steps=self.decay_iters or self.warmup_iters + 1,
            lr_decay_style=self.decay_style,
            start_wd=weight_decay,
            end_wd=weight_decay,
            wd_incr_steps=1,
            wd_incr_style="constant",
        )
