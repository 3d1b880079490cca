"""In slime's trainers: its log-probability and training passes of the actor replay the rollout's routes.

slime's hooks before a pass see neither its data nor its end. So `init`, which slime calls in each trainer, wraps the
two functions that run the passes: they take the micro-batches and return the metrics.
"""

import functools
import importlib
import inspect
import logging
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch

from r3_adapter.errors import ReplayError
from r3_adapter.frameworks.metrics import Counts, compare_live, k3_of_samples
from r3_adapter.frameworks.slime.batches import TokenCheck, step_inputs
from r3_adapter.frameworks.slime.rollout import loaded_framework, refuse_own_replay
from r3_adapter.megatron.agreement import agreed
from r3_adapter.megatron.attach import Attached, attach
from r3_adapter.megatron.replay import prepare_step
from r3_adapter.megatron.replay_batch import ReplayBatch

logger = logging.getLogger(__name__)

_FORWARD = ("f", "args", "model", "data_iterator", "num_microbatches", "store_prefix")
_TRAIN = ("args", "data_iterator", "model", "num_microbatches")
_LOG_PROBS = "get_log_probs_and_entropy"

Run = Callable[[Callable[[], Any], dict[str, Any]], Any]
"""Runs a function of the framework's, which it is given with the arguments of the call by name."""


def init(args: Namespace) -> None:
    """Let this trainer's passes of the actor replay; slime calls it before the model is built.

    Passes of the critic, the reference and the teacher route live, as they do without it.

    Raises:
        ReplayError: slime's own replay is on, or its functions are those of an unknown version.
    """
    refuse_own_replay(args)
    name = loaded_framework()
    model = importlib.import_module(f"{name}.backends.megatron_utils.model")
    actor = importlib.import_module(f"{name}.backends.megatron_utils.actor")
    passes = Passes(name, model.get_batch)
    around(actor, "forward_only", _FORWARD, passes.log_probs)
    around(model, "train_one_step", _TRAIN, passes.train)


class Passes:
    """The passes of one trainer process."""

    def __init__(self, framework: str, get_batch: Callable[..., dict[str, Any]]) -> None:
        self._framework, self._get_batch = framework, get_batch
        self._attached: Attached | None = None
        self._model: Any = None

    def log_probs(self, theirs: Callable[[], Any], call: dict[str, Any]) -> Any:
        """Run `forward_only`; what it returns has `r3/k3` too, where the rollout has log-probabilities."""
        function = call["f"]
        if getattr(function, "__name__", "") != _LOG_PROBS or call["store_prefix"]:
            return theirs()
        # It begins with the first micro-batch, wherever the iterator is.
        attached, steps, tokens = self._steps(call, 0, sum(call["num_microbatches"]))
        with attached.replaying(steps), tokens:
            found = theirs()
        agreed(tokens.raise_different)
        return {**found, **self._k3(call, found)}

    def train(self, theirs: Callable[[], Any], call: dict[str, Any]) -> Any:
        """Run `train_one_step`; the losses that it returns on the last pipeline stage have our counts too."""
        from megatron.core import parallel_state as ps

        if call["args"].loss_type == "value_loss":
            return theirs()
        attached, steps, tokens = self._steps(call, call["data_iterator"][0].offset, call["num_microbatches"])
        counts = Counts()
        with attached.replaying(steps), tokens, compare_live(call["model"], steps, counts):
            found = theirs()
        agreed(tokens.raise_different)
        last = ps.is_pipeline_last_stage(ignore_virtual=True)
        if last:
            counts.add_rows(steps[0])
        report = counts.summed().report()
        if last:
            found[0].update(report)
        return found

    def _steps(
        self, call: dict[str, Any], first: int, num: int
    ) -> tuple[Attached, list[list[ReplayBatch]], TokenCheck]:
        model = call["model"]
        if self._attached is None or model is not self._model:
            if self._attached is not None:
                self._attached.detach()
            self._attached, self._model = attach(list(model), backend="auto"), model
            logger.info("Routing replay by r3_adapter, backend %s", self._attached.backend)
        inputs = agreed(lambda: step_inputs(call["data_iterator"][0], first, num, self._get_batch, call["args"]))
        steps = prepare_step(list(model), inputs, backend=self._attached.backend, last_row="balanced")
        return self._attached, steps, TokenCheck(model, inputs)

    def _k3(self, call: dict[str, Any], found: dict[str, Any]) -> dict[str, list[float]]:
        """Return the k3 of each sample, on the last pipeline stage; over context parallel ranks their mean is right."""
        from megatron.core import parallel_state as ps

        data = call["data_iterator"][0].rollout_data
        if "log_probs" not in found or not data.get("rollout_log_probs"):
            return {}
        samples = zip(data["loss_masks"], data["total_lengths"], data["response_lengths"], strict=True)
        sums = k3_of_samples(
            found["log_probs"],
            data["rollout_log_probs"],
            [self._cut(*sample, call, number) for number, sample in enumerate(samples)],
        )
        counts = torch.stack([mask.sum() for mask in data["loss_masks"]]).clamp_min(1)
        means = sums.to(counts.device) * ps.get_context_parallel_world_size() / counts
        return {"r3/k3": means.tolist()}

    def _cut(self, mask: Any, total: int, response: int, call: dict[str, Any], at: int) -> Any:
        """Return a sample's mask as its log-probabilities are cut for context parallelism."""
        if self._framework == "miles":
            theirs = importlib.import_module("miles.backends.training_utils.cp_utils").slice_log_prob_with_cp
            lengths = call["data_iterator"][0].rollout_data.get("max_seq_lens")
            return theirs(mask, total, response, call["args"].qkv_format, lengths[at] if lengths else None)
        theirs = importlib.import_module("slime.backends.megatron_utils.cp_utils").slice_log_prob_with_cp
        return theirs(mask, total, response)


def around(module: Any, name: str, parameters: tuple[str, ...], run: Run) -> None:
    """Wrap a function of the framework's in `run`; the wrapper has the attribute `_r3_adapter`.

    Raises:
        ReplayError: There is none, its parameters are others, or it is done already.
    """
    theirs = getattr(module, name, None)
    place = f"{module.__name__}.{name}"
    if theirs is None:
        raise ReplayError(f"{place}: there is no such function; this version of the framework is not known")
    if getattr(theirs, "_r3_adapter", False):
        raise ReplayError(f"{place}: replay is on already")
    signature = inspect.signature(theirs)
    missing = [parameter for parameter in parameters if parameter not in signature.parameters]
    if missing:
        raise ReplayError(f"{place}{signature} has no {', '.join(missing)}; this version of the framework is not known")

    @functools.wraps(theirs)
    def replaced(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        return run(lambda: theirs(*args, **kwargs), call.arguments)

    replaced._r3_adapter = True  # type: ignore[attr-defined]
    setattr(module, name, replaced)
