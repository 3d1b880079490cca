"""In slime's rollout process: share samples out so that their routes load the experts' ranks evenly.

slime plans the micro-batches of all data-parallel ranks there, right after it has converted the samples.
`convert_packed` converts as `convert` does, and wraps that planning: samples stay in the training step that slime gave
them, but rank and micro-batch are chosen here.

S: samples.
"""

import importlib
import logging
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from r3_adapter.balance.loads import Counts, count_traces
from r3_adapter.balance.schedule import Schedule, fullest_load, schedule
from r3_adapter.errors import LayoutError, ReplayError
from r3_adapter.frameworks.slime.rollout import converted, framework_of
from r3_adapter.frameworks.slime.training import around

logger = logging.getLogger(__name__)

_PLAN = "build_dp_schedule"
_PARAMETERS = ("args", "train_parallel_config", "total_lengths")

Planned = tuple[list[list[int]], list[list[list[int]]], list[int], list[int]]
"""slime's: by rank its samples, by rank and micro-batch places among these, by step micro-batches and rollouts."""


class _Waiting(NamedTuple):
    """The samples that were converted last: their lengths and counts [S, L, E]."""

    tokens: list[int]
    counts: Counts


_waiting: list[_Waiting] = []


def convert_packed(args: Namespace, samples: Sequence[Any]) -> dict[str, Any]:
    """Convert samples as `convert` does, and let slime's plan of their micro-batches even out the loads of experts.

    Raises:
        R3Error: What `convert` refuses; a version of slime that plans elsewhere; micro-batches of a fixed size.
    """
    name = framework_of(samples[0]) if samples else "slime"
    if name != "slime":
        raise ReplayError(f"{name}: its plan of micro-batches was not read; use `convert`")
    if not getattr(args, "use_dynamic_batch_size", False):
        raise ReplayError("--use-dynamic-batch-size is off: micro-batches of a fixed size cannot be composed by loads")
    module = importlib.import_module(f"{name}.ray.rollout")
    if not getattr(getattr(module, _PLAN, None), "_r3_adapter", False):
        around(module, _PLAN, _PARAMETERS, _planned)
    data, traces = converted(args, samples)
    _waiting[:] = [_Waiting([trace.num_tokens for trace in traces], count_traces(traces))]
    return data


def _planned(theirs: Callable[[], Planned], call: dict[str, Any]) -> Planned:
    """Plan as slime does, then share the samples of each step out anew."""
    planned = theirs()
    tokens = list(call["total_lengths"])
    if not _waiting or _waiting[0].tokens != tokens:
        raise ReplayError(f"{_PLAN}: {len(tokens)} samples that are not those which were converted last")
    return replanned(planned, *_waiting.pop(), call["args"], call["train_parallel_config"])


def replanned(
    planned: Planned, tokens: Sequence[int], counts: Counts, args: Namespace, config: dict[str, Any]
) -> Planned:
    """Return slime's plan with the samples of each step shared out by their loads, where that is better.

    Source: slime/utils/dp_schedule.py@0.3.1:build_dp_schedule
    """
    theirs, places, numbers, rollouts = planned
    dp_size, vpp = config["dp_size"], config.get("vpp_size") or 1
    tp, ep = args.tensor_model_parallel_size, args.expert_model_parallel_size
    etp = getattr(args, "expert_tensor_parallel_size", None) or tp
    parts = max(1, ep * etp // (tp * config["cp_size"]))
    multiple = config["microbatch_group_size_per_vp_stage"] if vpp > 1 else 1
    partitions: list[list[int]] = [[] for _ in range(dp_size)]
    micro_batches: list[list[list[int]]] = [[] for _ in range(dp_size)]
    found_numbers, first = [], 0
    for step, number in enumerate(numbers):
        own = [
            [[theirs[rank][place] for place in batch] for batch in places[rank][first : first + number]]
            for rank in range(dp_size)
        ]
        first += number
        chosen = _step(
            step, own, tokens, counts, num_ranks=ep, num_parts=parts, multiple=multiple, max_tokens=_cap(args, config)
        )
        found_numbers.append(len(chosen[0]))
        for rank, batches in enumerate(chosen):
            for batch in batches:
                start = len(partitions[rank])
                partitions[rank].extend(batch)
                micro_batches[rank].append(list(range(start, start + len(batch))))
    return partitions, micro_batches, found_numbers, rollouts


def _cap(args: Namespace, config: dict[str, Any]) -> int:
    return int(args.max_tokens_per_gpu) * int(config["cp_size"])


def _step(
    number: int,
    theirs: Schedule,
    tokens: Sequence[int],
    counts: Counts,
    *,
    num_ranks: int,
    num_parts: int,
    multiple: int,
    max_tokens: int,
) -> Schedule:
    """Return the better of slime's schedule of a step and ours, as samples of the whole rollout."""
    samples = np.array(sorted(sample for rank in theirs for batch in rank for sample in batch))
    try:
        ours = schedule(
            np.asarray(tokens, np.int64)[samples],
            counts[samples],
            num_ranks=num_ranks,
            dp_size=len(theirs),
            num_parts=num_parts,
            max_tokens=max_tokens,
            multiple=multiple,
        )
    except LayoutError as error:
        logger.warning("R3: step %d keeps slime's micro-batches: %s", number, error)
        return theirs
    found = [[samples[batch].tolist() for batch in rank] for rank in ours]
    before, mean = fullest_load(theirs, counts, num_ranks=num_ranks, num_parts=num_parts)
    after, _ = fullest_load(found, counts, num_ranks=num_ranks, num_parts=num_parts)
    ratios = [each / mean if mean else 1.0 for each in (min(before, after), before)]
    logger.info("R3: step %d: fullest over mean load %.3f, %.3f before", number, *ratios)
    return found if after < before else theirs
