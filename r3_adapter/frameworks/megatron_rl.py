"""Replay in Megatron-LM's own RL loop, whose files stay as they are; docs/frameworks/megatron-lm.md has the flags.

    torchrun ... -m r3_adapter.frameworks.megatron_rl train_rl.py --perform-rl-step --moe-enable-routing-replay ...

Its inference engine records the experts of a request and drops them. This module puts them, with the request's tokens,
into the ledger by which the loop passes on what its HTTP server does not. Each training row gets the experts of its
turns. The policy's passes, for old log-probabilities and for training, replay them by Megatron's own RouterReplay. The
reference model routes live.

S: tokens of a request or a row; M: MoE layers; K: experts a token; b: rows of a micro-batch.

Source: NVIDIA/Megatron-LM@d98e8a64 (core 0.20.0.dev20260822): megatron/rl/rl_utils.py,
    megatron/core/inference/engines/dynamic_engine.py
"""

import logging
import runpy
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from r3_adapter.errors import CaptureError, ReplayError, TraceError
from r3_adapter.frameworks.rows import UNKNOWN_VERSION
from r3_adapter.layout import Packing
from r3_adapter.megatron.agreement import agreed
from r3_adapter.megatron.attach import attach
from r3_adapter.megatron.batches import packed_places
from r3_adapter.megatron.layers import unwrapped, whole_moe_layers
from r3_adapter.megatron.replay import prepare_step
from r3_adapter.megatron.replay_batch import StepInput
from r3_adapter.signals import run_command
from r3_adapter.trace import NOT_CAPTURED, RoutingTrace, ids_dtype

logger = logging.getLogger(__name__)

_RECORDED = "r3_recorded"


class Recorded(NamedTuple):
    """What the engine recorded of a finished request.

    token_ids: [S] int32; prompt and response.
    routes: [S - 1, M, K]; the last token was not fed. None where the engine has lost some: it computed the request in
        parts, or a block of its cache had none.
    """

    token_ids: npt.NDArray[np.int32]
    routes: npt.NDArray[np.integer] | None


class Shape(NamedTuple):
    """What a trace says of the model. layer_ids: [M] int32, global decoder layers; topk: K."""

    layer_ids: npt.NDArray[np.int32]
    num_experts: int
    topk: int

    @classmethod
    def of(cls, chunk: Any) -> "Shape":
        """Return that of the model that a chunk is of."""
        model = unwrapped(chunk)
        layers = whole_moe_layers(model, model.config)
        return cls(np.array(layers, np.int32), model.config.num_moe_experts, model.config.moe_router_topk)


class Numbered(list[Any]):
    """A micro-batch of the loop's data, and the row of this rank that it begins with."""

    first: int = 0


def take_recorded(request: Any) -> Recorded:
    """Take the recorded experts off a finished request, so that they are not sent through the HTTP server.

    request: the engine's, all parts of it merged.
    """
    tokens = [*torch.as_tensor(request.prompt_tokens).tolist(), *request.generated_tokens]
    routes, request.routing_indices = request.routing_indices, None
    return Recorded(np.array(tokens, np.int32), None if routes is None else np.asarray(routes))


def trace_of_row(row: Any, recorded: Mapping[str, Recorded | None], shape: Shape) -> RoutingTrace:
    """Return the routes of a training row: each token's of the turn in which it was fed first.

    That is the pass from which the log-probability of the token after it came; later turns have it in their prompts.

    row: None for one of padding; a rollout of tokens, of all whose turns the last one holds the tokens; or a rollout
        and the number of the one turn that the row is.
    recorded: by the names of requests, which rollouts have as `completion_ids`.

    Raises:
        CaptureError: A turn without routes; names its request. TraceError: Routes of other tokens or another model.
    """
    if row is None:
        return _empty(shape, 0, np.zeros(0, np.int32))
    rollout, turns = (row[0], [row[1]]) if isinstance(row, tuple) else (row, range(len(row.trajectory)))
    names = getattr(rollout, "completion_ids", None) or []
    if len(names) != len(rollout.trajectory):
        raise CaptureError(f"a rollout of {rollout.env_id!r}: {len(names)} requests != {len(rollout.trajectory)} turns")
    tokens = np.asarray(rollout.trajectory[turns[-1]], np.int32)
    trace = _empty(shape, len(tokens), tokens)
    ids, versions, done = trace.topk_ids.copy(), trace.version_ids.copy(), 0
    for turn in turns:
        found = recorded.get(names[turn])
        place = f"request {names[turn]}, turn {turn}"
        if found is None or found.routes is None:
            raise CaptureError(
                f"{place}: the engine recorded no routes of it; it records with --moe-enable-routing-replay, and not "
                "where it computes a request in parts"
            )
        num, want = len(found.token_ids) - 1, (len(shape.layer_ids), shape.topk)
        if found.routes.shape != (num, *want):
            raise TraceError(f"{place}: routes {found.routes.shape} != {(num, *want)} (tokens, MoE layers, top-k)")
        if not np.array_equal(tokens[: num + 1], found.token_ids):
            raise TraceError(f"{place}: its {num + 1} tokens are not the first ones of the row's {len(tokens)}")
        part = found.routes[done:]
        if part.size and not 0 <= part.min() <= part.max() < shape.num_experts:
            raise TraceError(f"{place}: expert {part.min()} or {part.max()} outside 0 to {shape.num_experts - 1}")
        ids[done:num], versions[done:num] = part, 0
        done = max(done, num)
    return RoutingTrace(ids, tokens, versions, shape.layer_ids, shape.num_experts, (UNKNOWN_VERSION,))


def _empty(shape: Shape, num_tokens: int, tokens: npt.NDArray[np.int32]) -> RoutingTrace:
    ids = np.zeros((num_tokens, len(shape.layer_ids), shape.topk), ids_dtype(shape.num_experts))
    versions = np.full(num_tokens, NOT_CAPTURED, np.int32)
    return RoutingTrace(ids, tokens, versions, shape.layer_ids, shape.num_experts, (UNKNOWN_VERSION,))


def numbered(batches: Iterator[Sequence[Any]], num_rows: int) -> Iterator[Numbered]:
    """Yield the loop's micro-batches with their numbers; it goes over this rank's rows in order, again and again."""
    at = 0
    for batch in batches:
        found = Numbered(batch)
        found.first = at
        yield found
        at = (at + len(batch[0])) % num_rows


def step_inputs(batches: Sequence[tuple[int, torch.Tensor]], traces: Sequence[RoutingTrace]) -> list[StepInput]:
    """Return what `prepare_step` takes of micro-batches of whole rows.

    batches: the first row and the tokens, [b, S], of each. traces: of all rows of this rank.

    Raises:
        ReplayError: More rows than there are traces.
    """
    from megatron.core import parallel_state as ps

    cp, device = ps.get_context_parallel_world_size(), torch.cuda.current_device()
    inputs = []
    for first, tokens in batches:
        mine = list(traces[first : first + len(tokens)])
        if len(mine) != len(tokens):
            raise ReplayError(f"rows {first} to {first + len(tokens) - 1} of {len(traces)} rows that have traces")
        one = packed_places(Packing.packed([0, tokens.shape[1]]), cp, ps.get_context_parallel_rank())[0, :, 1]
        packing = Packing.padded(len(tokens), tokens.shape[1])
        inputs.append(StepInput(mine, tokens[:, torch.from_numpy(one).to(tokens.device)].to(device), packing))
    return inputs


@contextmanager
def not_recording() -> Iterator[None]:
    """Let no RouterReplay of the process record or replay, as the engine has left them, until the context ends."""
    from megatron.core.transformer.moe.router_replay import RouterReplay

    before = [(each, each.router_replay_action) for each in RouterReplay.global_router_replay_instances]
    for each, _ in before:
        each.clear_router_replay_action()
    try:
        yield
    finally:
        for each, action in before:
            each.router_replay_action = action


class Passes:
    """The passes of one rank."""

    def __init__(self, args: Callable[[], Namespace]) -> None:
        self._args = args
        self._recorded: dict[str, Recorded | None] = {}
        self._traces: list[RoutingTrace] = []
        self._of_policy = False
        self._shape: Shape | None = None

    def prepare(self, theirs: Callable[..., Any], **call: Any) -> Any:
        """Run `prepare_data_for_update`; its micro-batches are numbered."""
        check_arguments(self._args())
        # It takes the records of these rollouts out of the ledger.
        self._recorded = {name: getattr(each, _RECORDED, None) for name, each in call["request_ledger"].items()}
        self._shape, self._of_policy = Shape.of(call["model"][0]), True
        data, *rest = theirs(**call)
        self._recorded.clear()
        data.iterable = numbered(data.iterable, len(self._traces))
        return (data, *rest)

    def trajectories(self, theirs: Callable[..., Any], rows: Sequence[Any], *args: Any, **named: Any) -> Any:
        """Run `prepare_trajectories`, which is given this rank's rows."""
        shape = self._shape
        assert shape is not None
        self._traces = agreed(lambda: [trace_of_row(row, self._recorded, shape) for row in rows])
        return theirs(rows, *args, **named)

    def log_probs(self, theirs: Callable[..., Any], **call: Any) -> Any:
        """Run `compute_logprobs_batch`: the first time of a collection for the policy, then for the reference."""
        if not self._of_policy:
            with not_recording():
                return theirs(**call)
        self._of_policy = False
        batches, at = list[tuple[int, torch.Tensor]](), 0
        for tokens, *_ in call["data_loader"]:
            batches.append((at, tokens))
            at += len(tokens)
        with self._replaying(call["model"], batches):
            return theirs(**call)

    def schedule(self, theirs: Callable[..., Any], **call: Any) -> Any:
        """Run a forward and backward pass of the loop."""
        if call.get("forward_only"):
            return theirs(**call)
        iterators = call["data_iterator"]
        iterator = iterators[0] if isinstance(iterators, list) else iterators
        taken = [next(iterator) for _ in range(call["num_microbatches"])]
        if not all(isinstance(each, Numbered) for each in taken):
            raise ReplayError(f"a {type(taken[0]).__name__} is no micro-batch of `prepare_data_for_update`")
        with self._replaying(call["model"], [(each.first, each[0]) for each in taken]):
            return theirs(**{**call, "data_iterator": iter(taken)})

    @contextmanager
    def _replaying(self, model: Any, batches: Sequence[tuple[int, torch.Tensor]]) -> Iterator[None]:
        chunks = list(model) if isinstance(model, list) else [model]
        inputs = agreed(lambda: step_inputs(batches, self._traces))
        with not_recording():
            attached = attach(chunks, backend="native")
            try:
                # The last token of a row is fed, but its output is not used.
                steps = prepare_step(chunks, inputs, backend="native", last_row="balanced")
                with attached.replaying(steps):
                    yield
            finally:
                # The engine records by the routers' own objects.
                attached.detach()
        routes = [batch.routes for batch in steps[0]]
        replayed, live = (sum(getattr(each, name) for each in routes) for name in ("num_replayed", "num_live"))
        logger.info("r3: %d rows of this rank replayed, %d live", replayed, live)


def check_arguments(args: Namespace) -> None:
    """Refuse arguments of the loop with which routes would be lost or late.

    Raises:
        ReplayError: Names the argument.
    """
    if not args.moe_enable_routing_replay:
        raise ReplayError("--moe-enable-routing-replay is off: the engine records no routes without it")
    if args.rl_use_sequence_packing:
        raise ReplayError("--rl-use-sequence-packing: routes of rows that move to bins of other ranks are not carried")
    if (found := args.cuda_graph_impl) != "none":
        raise ReplayError(f"--cuda-graph-impl {found} != none: graphs replay the experts of their capture")
    if (args.virtual_pipeline_model_parallel_size or 1) > 1:
        raise ReplayError("virtual pipeline stages: the loop computes log-probabilities of one chunk alone")


def install() -> None:
    """Put functions around those of megatron.rl; before train_rl.py begins.

    Raises:
        ReplayError: A function that this version has not.
    """
    from megatron.core.inference import inference_request
    from megatron.rl import rl_utils
    from megatron.training import get_args, training

    passes = Passes(get_args)
    record = getattr(inference_request, "FinishedRequestRecord", None)
    if record is None:
        raise ReplayError("megatron.core.inference has no FinishedRequestRecord; this version of it is not known")
    theirs = record.from_request

    def from_request(request: Any) -> Any:
        found = theirs(request)
        setattr(found, _RECORDED, take_recorded(request))
        return found

    record.from_request = from_request
    _around(rl_utils, "prepare_data_for_update", passes.prepare)
    _around(rl_utils, "prepare_trajectories", passes.trajectories)
    _around(rl_utils, "compute_logprobs_batch", passes.log_probs)
    schedule_of = training.get_forward_backward_func

    def get_forward_backward_func(*args: Any, **named: Any) -> Any:
        schedule = schedule_of(*args, **named)
        return lambda **call: passes.schedule(schedule, **call)

    training.get_forward_backward_func = get_forward_backward_func


def _around(module: Any, name: str, run: Callable[..., Any]) -> None:
    theirs = getattr(module, name, None)
    if theirs is None:
        raise ReplayError(f"{module.__name__}.{name}: there is no such function; this version of it is not known")
    setattr(module, name, lambda *args, **named: run(theirs, *args, **named))


def main() -> None:
    """Run the script that is the first argument, with replay."""
    if len(sys.argv) < 2:
        raise ReplayError("wants a script: -m r3_adapter.frameworks.megatron_rl train_rl.py [ARGUMENT...]")
    install()
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    sys.exit(run_command("megatron_rl", main, "the same command goes on from the last checkpoint"))
