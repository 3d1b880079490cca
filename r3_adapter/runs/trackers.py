"""Where a run's metrics go beside its own folder: TensorBoard, and the user's trackers.

Trackers get the names that slime's and miles' dashboards have: rollout/, train/, perf/ and eval/, and r3/ for what only
replay has.
"""

import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

from r3_adapter.own import function_named
from r3_adapter.runs.files import Number, Step

Track = Callable[[int, Mapping[str, Number]], None]
"""Takes a step's number and its metrics by name."""
Tracker = Callable[[Path, Mapping[str, Any], int | None], AbstractContextManager[Track]]
"""Makes a Track of the run's folder, its configuration and the step that it resumes at, None for a new run."""

_NAMES = {
    "reward": "rollout/raw_reward",
    "reward_std": "rollout/raw_reward_std",
    "response_tokens": "rollout/response_tokens",
    "samples": "rollout/samples",
    "loss": "train/loss",
    "grad_norm": "train/grad_norm",
    "lr": "train/lr",
    "entropy": "train/entropy_loss",
    "clip_fraction": "train/pg_clipfrac",
    "kl_ref": "train/kl_loss",
    "k3": "train/train_rollout_kl",
    "mean_abs": "train/train_rollout_logprob_abs_diff",
    "max_abs": "train/train_rollout_logprob_abs_diff_max",
    "eval_reward": "eval/reward",
    "eval_reward_before": "eval/reward_before",
    "eval_response_len": "eval/response_len/mean",
    "eval_response_len_before": "eval/response_len_before/mean",
    "seconds/step": "perf/step_time",
    "seconds/rollout": "perf/rollout_time",
    "seconds/old_logprobs": "perf/log_probs_time",
    "seconds/reference": "perf/ref_log_probs_time",
    "seconds/train": "perf/actor_train_time",
    "seconds/weights": "perf/update_weights_time",
    "seconds/eval": "perf/eval_time",
}
"""slime's names, with miles' for k3 and the largest difference."""
_ROOMS = {"seconds": "perf/r3_time", "throughput": "perf", "bytes": "perf/bytes", "memory": "perf/memory"}
"""Where the rest of an object goes; what is not here goes to r3/."""


def scalars(step: Step) -> Iterator[tuple[str, Number]]:
    """Yield the numbers of a step but its own and its time; keys of inner objects are joined by "/"."""
    for key, value in step.items():
        if isinstance(value, dict):
            yield from ((f"{key}/{inner}", number) for inner, number in value.items())
        elif key not in ("step", "time", "weight_version"):
            yield key, value


def named(step: Step) -> dict[str, Number]:
    """Return a step's metrics by slime's and miles' names."""
    found: dict[str, Number] = {}
    for key, value in scalars(step):
        outer, _, inner = key.partition("/")
        default = f"{_ROOMS[outer]}/{inner}" if inner and outer in _ROOMS else f"r3/{key}"
        found[_NAMES.get(key, default)] = value
    if step.get("samples") and "response_tokens" in step:
        found["rollout/response_len/mean"] = step["response_tokens"] / step["samples"]
    return found


class Trackers:
    """All trackers of a run, until `close`. One that fails is left out from then on, and the run goes on.

    failed: told what to say of it.
    """

    def __init__(
        self,
        trackers: Mapping[str, Tracker],
        folder: Path,
        config: Mapping[str, Any],
        resume_at: int | None,
        failed: Callable[[str], None],
    ) -> None:
        self._failed, self._tracks = failed, dict[str, Track]()
        self._stacks = dict[str, ExitStack]()
        for name, tracker in trackers.items():
            self._stacks[name] = ExitStack()
            with self._told(name):
                self._tracks[name] = self._stacks[name].enter_context(tracker(folder, config, resume_at))

    def step(self, number: int, step: Step) -> None:
        """Give a step's metrics to each."""
        metrics = named(step)
        for name, track in list(self._tracks.items()):
            with self._told(name):
                track(number, metrics)

    def close(self) -> None:
        """End each."""
        for name, stack in self._stacks.items():
            with self._told(name):
                stack.close()

    @contextmanager
    def _told(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            # A service that does not answer is no reason to lose the run; its log is in its folder all the same.
            self._tracks.pop(name, None)
            self._failed(f"{name}: {type(error).__name__}: {error}; it gets no more steps")


@contextmanager
def tensorboard(folder: Path, config: Mapping[str, Any], resume_at: int | None) -> Iterator[Track]:
    """Write TensorBoard's files below the run's folder, the configuration as text; steps from resume_at on count."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder / "tensorboard"), purge_step=resume_at) as writer:
        writer.add_text("config", f"```json\n{json.dumps(config, indent=2)}\n```", resume_at or 0)

        def track(step: int, metrics: Mapping[str, Number]) -> None:
            for name, value in metrics.items():
                writer.add_scalar(name, value, step)
            writer.flush()

        yield track


def trackers_of(names: tuple[str, ...]) -> dict[str, Tracker]:
    """Return the user's trackers by name, and TensorBoard where it is installed.

    Raises:
        R3Error: one is not there.
    """
    own = {"tensorboard": tensorboard} if importlib.util.find_spec("tensorboard") else {}
    return {**own, **{name: function_named("tracker", name) for name in names}}
