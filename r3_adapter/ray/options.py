"""What a run does, and what of it may not change while it is the same run."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from r3_adapter.errors import R3Error
from r3_adapter.layout import ParallelLayout
from r3_adapter.megatron.policy import PolicyOptions
from r3_adapter.rl.checks import check_lag, num_micro_batches
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
    save_interval: steps between checkpoints.
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
    num_rollouts: int = 100
    seed: int = 0
    save_interval: int = 20
    record: Path | None = None
    agreement_interval: int = 10
    timeout: float = 600
    rollout_timeout: float = 600
    num_gpus_per_rank: float = 0
    num_gpus_per_engine: float = 0
    config: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        checked_params(self.sampling_params, place="sampling_params")
        check_server_arguments(self.engine.engine_arguments(gpu=True))
        check_engine(self.engine.engine_arguments(gpu=True))
        check_lag(self.lag, self.policy.replay, self.policy.staleness)
        num_micro_batches(
            self.batch_size * self.samples_per_prompt,
            self.layout,
            micro_batch_size=self.micro_batch_size,
            num_steps=self.policy.num_steps,
        )

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
            "seed": self.seed,
        }
        found: dict[str, Any] = json.loads(json.dumps(redacted(whole), default=str))
        return dict(_flat(found))


def check_same_run(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to go on with a run as another: its figures would be of both. Keys that one lacks are not compared.

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
