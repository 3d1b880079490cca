"""The replay argument for a Megatron model: the routes of a micro-batch, cut for one rank and one model chunk.

T: tokens of this rank; M: MoE layers of the chunk; K: experts a token; E: experts of a layer.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch

from r3_adapter.arena import Arena
from r3_adapter.errors import R3Error, ReplayError, TraceError, check_choice
from r3_adapter.layout import Packing, ParallelLayout
from r3_adapter.megatron.checks import check_layout, check_model
from r3_adapter.megatron.inputs import check_device, check_inputs, check_shape, name_cut
from r3_adapter.megatron.reach import check_reach
from r3_adapter.repack import LIVE, RankRoutes, repack
from r3_adapter.trace import RoutingTrace

_MESSAGE_BYTES = 1024
_CUT = b" ..."
_Made = TypeVar("_Made")

Staleness = Literal["refuse", "live", "keep"]
"""What to do with rows that other weights computed: raise, route them live, or replay them all the same."""


@dataclass(frozen=True)
class ReplayBatch:
    """What one rank's model chunk replays in one micro-batch.

    routed_experts: [M, T, K], on the chunk's device; int16 with -1 in a row that is routed live, or uint16, which tells
        the routers that no row is and that they need no top-k. GPTModel.forward takes it as the argument of that name.
    routes: the same on the host, with the kind and the weight version of each row.
    num_stale: rows of `routes` that other weights computed, replayed or live as the policy says.
    """

    routed_experts: torch.Tensor
    routes: RankRoutes
    num_stale: int


@dataclass(frozen=True)
class StepInput:
    """One micro-batch for `prepare_step`: the arguments of `prepare` that differ between micro-batches."""

    traces: Sequence[RoutingTrace]
    tokens: torch.Tensor
    packing: Packing | None = None


def prepare_step(
    chunks: Sequence[torch.nn.Module],
    micro_batches: Sequence[StepInput],
    *,
    weight_version: str | None = None,
    staleness: Staleness = "refuse",
    layout: ParallelLayout | None = None,
    arena: Arena | None = None,
) -> list[list[ReplayBatch]]:
    """Check and cut the routes of a whole step, and agree with all other ranks that it can go on.

    Every rank must call it, once before the step. If any rank has refused its part, all of them raise: none waits in a
    collective of the step for a rank that never comes.

    chunks: this rank's model chunks; more than one with VPP.
    micro_batches: of this rank, in the order in which the schedule takes them.
    weight_version, staleness, arena: as for `prepare`.

    Returns:
        For each chunk the batches of its micro-batches.

    Raises:
        R3Error: On every rank, what the ranks that refuse have said.
    """

    def make() -> list[list[ReplayBatch]]:
        check_choice("staleness", staleness, Staleness, ReplayError)
        _check_step(chunks, micro_batches)
        return [
            [
                prepare(
                    chunk,
                    each.traces,
                    each.tokens,
                    packing=each.packing,
                    layout=layout,
                    weight_version=weight_version,
                    staleness=staleness,
                    arena=arena,
                    place=f"micro-batch {index}",
                )
                for index, each in enumerate(micro_batches)
            ]
            for chunk in chunks
        ]

    return agreed(make)


def _check_step(chunks: object, micro_batches: object) -> None:
    for name, each, kind in (("chunks", chunks, "model chunks"), ("micro_batches", micro_batches, "StepInput")):
        if not isinstance(each, Sequence | torch.nn.ModuleList) or not len(each):
            says = "none" if isinstance(each, Sequence) else f"a {type(each).__name__}, not a sequence"
            raise ReplayError(f"{name}: {says} of {kind}")
    for index, each in enumerate(cast(Sequence[object], micro_batches)):
        if not isinstance(each, StepInput):
            raise ReplayError(f"micro-batch {index}: a {type(each).__name__} is not a StepInput")


def agreed(make: Callable[[], _Made]) -> _Made:
    """Return what `make` makes, or raise on all ranks if it raises on one; every rank must call it.

    Raises:
        ReplayError: Names each rank whose `make` has raised, and what. A rank that was interrupted raises that instead,
            once the others have heard of it.
    """
    problem, cause, made = "", None, None
    try:
        made = make()
    except BaseException as error:  # Whatever it is, the other ranks must hear of it.
        problem, cause = _told(error), error
    try:
        agree(problem)
    except ReplayError as told:
        if cause is not None and not isinstance(cause, Exception):
            raise cause from told
        raise told from cause
    return cast(_Made, made)


def agree(problem: str) -> None:
    """Raise on all ranks if one of them has a problem; every rank must call it. An empty string is none.

    Without a problem this is one all-reduce of a number.

    Raises:
        ReplayError: Names each rank with a problem, and what it said.
    """
    _rank()
    device = torch.device("cpu") if torch.distributed.get_backend() == "gloo" else torch.cuda.current_device()
    # All that can fail comes before the first collective: a rank that fails between two leaves the others waiting.
    own = torch.tensor(list(_message(problem)), dtype=torch.uint8, device=device)
    flag = torch.tensor([bool(problem)], dtype=torch.int32, device=device)
    everybody = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size())] if problem else []
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
    if not flag.item():
        return
    everybody = everybody or [torch.empty_like(own) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(everybody, own)
    said = [bytes(found.tolist()).rstrip(b"\0").decode(errors="replace") for found in everybody]
    raise ReplayError("; ".join(f"rank {rank}: {message}" for rank, message in enumerate(said) if message))


def _message(problem: str) -> bytes:
    """Return a problem's bytes, padded with 0; what has no place in them is escaped, what is too long is cut."""
    text = problem.replace("\0", "\\0").encode(errors="backslashreplace")
    if len(text) > _MESSAGE_BYTES:
        # Not in the middle of a character.
        text = text[: _MESSAGE_BYTES - len(_CUT)].decode(errors="ignore").encode() + _CUT
    return text.ljust(_MESSAGE_BYTES, b"\0")


def _told(error: BaseException) -> str:
    """Return an error's type and message; an error may fail to say its own."""
    try:
        return f"{type(error).__name__}: {error}"
    except BaseException as other:
        return f"{type(error).__name__}, whose message raised {type(other).__name__}"


def _rank() -> int:
    """Return this process's rank.

    Raises:
        ReplayError: There is no process group.
    """
    if not torch.distributed.is_initialized():
        raise ReplayError("no process group: replay needs torch.distributed.init_process_group, also on one rank")
    return torch.distributed.get_rank()


def current_layout() -> ParallelLayout:
    """Return the layout that Megatron's parallel_state was initialised with."""
    from megatron.core import parallel_state as ps

    return ParallelLayout(
        tp=ps.get_tensor_model_parallel_world_size(),
        pp=ps.get_pipeline_model_parallel_world_size(),
        vpp=ps.get_virtual_pipeline_model_parallel_world_size() or 1,
        cp=ps.get_context_parallel_world_size(),
        ep=ps.get_expert_model_parallel_world_size(),
        etp=ps.get_expert_tensor_parallel_world_size(),
        dp=ps.get_data_parallel_world_size(),
    )


def unwrapped(chunk: torch.nn.Module) -> Any:
    """Return the GPTModel of a chunk, wrapped or not."""
    model: Any = chunk
    while hasattr(model, "module"):
        model = model.module
    return model


def moe_routers(chunk: torch.nn.Module) -> Iterator[tuple[int, torch.nn.Module]]:
    """Yield the global decoder layer (from 0) and the router of each MoE layer of a GPTModel, wrapped or not.

    Layers of multi-token prediction are not among them: routers there see no route.

    Raises:
        ReplayError: It is no GPTModel.
    """
    model = unwrapped(chunk)
    layers = getattr(getattr(model, "decoder", None), "layers", None)
    if layers is None:
        raise ReplayError(f"a {type(model).__name__} has no decoder layers: give prepare a GPTModel, wrapped or not")
    for layer in layers:
        if layer.is_moe_layer:
            yield layer.layer_number - 1, layer.mlp.router


def prepare(
    chunk: torch.nn.Module,
    traces: Sequence[RoutingTrace],
    tokens: torch.Tensor,
    *,
    packing: Packing | None = None,
    layout: ParallelLayout | None = None,
    weight_version: str | None = None,
    staleness: Staleness = "refuse",
    arena: Arena | None = None,
    place: str = "micro-batch",
) -> ReplayBatch:
    """Check the traces of a micro-batch against its tokens, and cut them for this rank's model chunk.

    Call it before the step: it raises before any collective is entered. With more than one rank use `prepare_step`,
    which makes all of them raise.

    chunk: the model chunk whose forward gets the routes.
    traces: one for each sample of the micro-batch, in order.
    tokens: [b, s] int64; the input_ids that this rank's model is given, [b, s / cp] under context parallelism; padding
        behind each sample. [1, t] or [1, t / cp] if packed.
    packing: how the samples lie in the micro-batch; the default is a padded batch of the tokens' shape.
    layout: default: Megatron's own.
    weight_version: the trainer's weights by the engine's name; None to take rows of any.
    staleness: what to do with rows of other weights.
    arena: memory for the routes on the host, used again when nothing refers to a batch any more.
    place: names the micro-batch in errors.

    Raises:
        R3Error: traces that are not this model's or these tokens', or a layout that cannot hold them; names sample and
            position, and both operands.
    """
    check_choice("staleness", staleness, Staleness, ReplayError)
    check_inputs(traces, tokens, packing, weight_version)
    rank, layout = _rank(), layout or current_layout()
    check_layout(layout)
    routers = dict(moe_routers(chunk))
    model = unwrapped(chunk)
    check_model(model, routers, traces)
    check_reach(chunk, model, routers)
    check_device(tokens, next((router.weight for router in routers.values() if hasattr(router, "weight")), None))
    try:
        if packing is None:
            packing = Packing.padded(num_samples=len(traces), seq_length=tokens.shape[1] * layout.cp)
        check_shape(tokens, packing, layout.cp)
        if weight_version is not None and staleness == "refuse":
            _refuse_stale(traces, weight_version)
        input_ids = tokens.cpu().numpy()
        routes = repack(
            traces,
            packing,
            layout,
            rank,
            layer_ids=np.fromiter(routers, np.int32),
            input_ids=input_ids if packing.qkv_format == "sbhd" else input_ids.reshape(-1),
            dtype=np.dtype(np.int16),
            arena=arena,
        )
    except R3Error as error:
        says = str(error).removeprefix(f"rank {rank}: ")
        if isinstance(error, TraceError) and packing is not None and layout.cp > 1:
            cut = name_cut(traces, tokens.cpu().numpy(), packing, layout, layout.coords(rank).cp_rank)
            says = f"{cut} ({says})" if cut else says
        raise type(error)(f"rank {rank}, {place}: {says}") from error
    stale = _stale_rows(routes, weight_version)
    if staleness == "live":
        routes.topk_ids[:, stale] = LIVE
        routes.row_versions[stale] = LIVE
    topk_ids = routes.topk_ids if routes.num_live else routes.topk_ids.view(np.uint16)
    return ReplayBatch(torch.from_numpy(topk_ids).to(tokens.device), routes, int(stale.sum()))


def _refuse_stale(traces: Sequence[RoutingTrace], weight_version: str) -> None:
    for sample, trace in enumerate(traces):
        current = [version == weight_version for version in trace.weight_versions]
        if all(current):
            continue
        # -1, a row that was not captured, falls on the last entry.
        stale = np.flatnonzero(~np.array([*current, True])[trace.version_ids])
        if len(stale):
            version = trace.weight_versions[trace.version_ids[stale[0]]]
            raise TraceError(
                f"sample {sample}, position {stale[0]}: row of weights {version!r} != {weight_version!r}, "
                f"the trainer's ({len(stale)} such rows)"
            )


def _stale_rows(routes: RankRoutes, weight_version: str | None) -> npt.NDArray[np.bool_]:
    """Return [T] whether other weights computed the row."""
    other = [weight_version not in (None, version) for version in routes.weight_versions]
    # LIVE and PADDING fall on the last two entries.
    return np.array([*other, False, False])[routes.row_versions]
