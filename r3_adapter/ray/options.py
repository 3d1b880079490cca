"""What a run does, and what of it may not change while it is the same run."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from r3_adapter.balance.table import Table
from r3_adapter.errors import R3Error, check_choice
from r3_adapter.layout import ParallelLayout
from r3_adapter.megatron.policy_trainer.trainer import PolicyOptions
from r3_adapter.ray.rounded import RolloutWeights
from r3_adapter.rl.checks import Balance, check_balance, check_lag, check_max_received, num_micro_batches
from r3_adapter.runs.redact import redacted
from r3_adapter.sglang.sampling import check_engine, checked_params
from r3_adapter.sglang.server_arguments import check_server_arguments
from r3_adapter.sglang.settings import EngineSettings

_ENGINE_MAY_CHANGE = ("model_path", "weight_version", "max_total_tokens", "max_running_requests", "log_level")


@dataclass(frozen=True)
class LoopOptions:
    """What a run does.

    folder: of the run; weights and checkpoints are in it.
    checkpoint: a Hugging Face checkpoint, the first weights and, if the objective has a KL, the reference.
    engine: settings of each rollout engine; its checkpoint and weight version are set by the loop.
    batch_size: prompts of a step; samples_per_prompt: samples of each.
    lag: steps that rollouts are ahead of the trainer; 0 is on-policy.
    rollout_weights: what engines get; "fp8-rounded", for experiments, see rounded.py. Checkpoints are as trained.
    balance: how samples are put together, and whether experts are placed; placement: a file that says where.
    max_received: tokens that a rank may receive in a layer of a micro-batch.
    save_interval: steps between checkpoints; keep_checkpoints: how many of the newest are kept.
    eval_interval: steps between evaluations on eval_prompts prompts that are held out of training; None for none.
    trackers: "package.module:function" of each that is told the metrics of a step; see runs/trackers.py.
    record: a folder in which all rollouts are kept, a folder of samples for each prompt of each step.
    agreement_interval: steps between counts of the experts that live routers would have used.
    timeout: seconds after which a rank that does not answer is taken for hung, and in which an engine has to start.
    rollout_timeout: seconds in which an engine gets no prompt done, after which it is taken for hung.

    Raises:
        R3Error: numbers that contradict each other.
    """

    folder: Path
    checkpoint: Path
    layout: ParallelLayout
    policy: PolicyOptions
    engine: EngineSettings
    task: str
    sampling_params: Mapping[str, Any]
    num_engines: int = 1
    batch_size: int = 16
    samples_per_prompt: int = 8
    micro_batch_size: int = 8
    lag: int = 0
    rollout_weights: RolloutWeights = "as-trained"
    num_rollouts: int = 100
    seed: int = 0
    balance: Balance = "off"
    placement: Path | None = None
    max_received: int | None = None
    save_interval: int = 20
    keep_checkpoints: int = 2
    record: Path | None = None
    eval_interval: int | None = None
    eval_prompts: int = 64
    trackers: tuple[str, ...] = ()
    agreement_interval: int = 10
    timeout: float = 600
    rollout_timeout: float = 600
    num_gpus_per_rank: float = 0
    num_gpus_per_engine: float = 0
    config: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_choice("rollout_weights", self.rollout_weights, RolloutWeights)
        checked_params(self.sampling_params, place="sampling_params")
        check_server_arguments(self.engine.engine_arguments(gpu=True))
        check_engine(self.engine.engine_arguments(gpu=True))
        check_lag(self.lag, self.policy.replay, self.policy.staleness)
        num_samples = self.batch_size * self.samples_per_prompt
        num_micro_batches(
            num_samples, self.layout, micro_batch_size=self.micro_batch_size, num_steps=self.policy.num_steps
        )
        check_balance(self.balance, self.layout, replay=self.policy.replay, placed=self.placement is not None)
        check_max_received(self.max_received, self.balance, self.layout)

    def fixed(self) -> dict[str, Any]:
        """Return what may not change while a run is the same, as JSON has it; keys of inner objects joined by "."."""
        inside = self.checkpoint.is_relative_to(self.folder)
        engine = {key: value for key, value in asdict(self.engine).items() if key not in _ENGINE_MAY_CHANGE}
        whole = {
            "checkpoint": self.checkpoint.relative_to(self.folder) if inside else self.checkpoint.resolve(),
            "layout": str(self.layout),
            "policy": asdict(self.policy),
            "engine": engine,
            "task": self.task,
            "sampling_params": dict(self.sampling_params),
            "batch_size": self.batch_size,
            "samples_per_prompt": self.samples_per_prompt,
            "micro_batch_size": self.micro_batch_size,
            "lag": self.lag,
            "rollout_weights": self.rollout_weights,
            "seed": self.seed,
            # Which prompts are held out of training.
            "eval_prompts": self.eval_prompts if self.eval_interval else 0,
            "balance": self.balance,
            "placement": None if self.placement is None else Table.load(self.placement).digest(),
        }
        found: dict[str, Any] = json.loads(json.dumps(redacted(whole), default=str))
        return dict(_flat(found))


def check_same_run(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to go on with a run as another: its metrics would be of both. Keys that one lacks are not compared.

    before, now: what LoopOptions.fixed returned.

    Raises:
        R3Error: names what differs.
    """
    different = [f"{key} {before[key]!r} != {now[key]!r}" for key in now if key in before and before[key] != now[key]]
    if different:
        raise R3Error(f"{folder}: holds a run with {', '.join(different)}; take another folder, or go on with the same")


def _flat(value: Mapping[str, Any], before: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, inner in value.items():
        pairs += _flat(inner, f"{before}{key}.") if isinstance(inner, dict) and inner else [(f"{before}{key}", inner)]
    return pairs
