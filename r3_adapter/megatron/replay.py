"""The replay argument for a Megatron model: the routes of a micro-batch, cut for one rank and one model chunk.

T: tokens of this rank; M: MoE layers of the chunk; K: experts a token; E: experts of a layer.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, cast

import numpy as np
import numpy.typing as npt
import torch

from r3_adapter.arena import Arena
from r3_adapter.errors import R3Error, ReplayError, TraceError, check_choice
from r3_adapter.layout import Packing, ParallelLayout
from r3_adapter.megatron.agreement import NOT_ASKED, Terms, agreed, agreed_step, own_rank
from r3_adapter.megatron.backends import Backend, Channel
from r3_adapter.megatron.checks import check_layout, check_model
from r3_adapter.megatron.dispatch import Plan, check_astray, plan_step, why_not_planned
from r3_adapter.megatron.feeding import FEEDS
from r3_adapter.megatron.inputs import check_device, check_inputs, check_shape, name_cut
from r3_adapter.megatron.layers import moe_layers, moe_routers, unwrapped
from r3_adapter.megatron.placed import placement_of
from r3_adapter.megatron.reach import check_reach, note_routes
from r3_adapter.megatron.replay_batch import ReplayBatch, StepInput
from r3_adapter.repack import LIVE, LastRow, RankRoutes, repack
from r3_adapter.trace import RoutingTrace

# The first two are what programs import from here, and are made in a module that `feeding` and `reach` can import too.
__all__ = [
    "ReplayBatch",
    "Staleness",
    "StepInput",
    "check_chunks",
    "check_dispatch",
    "current_layout",
    "prepare",
    "prepare_step",
    "step_terms",
    "with_plans",
]

Staleness = Literal["refuse", "live", "keep"]
"""What to do with rows that other weights computed: raise, route them live, or replay them all the same."""


def prepare_step(
    chunks: Sequence[torch.nn.Module],
    micro_batches: Sequence[StepInput],
    *,
    weight_version: str | None = None,
    staleness: Staleness = "refuse",
    last_row: LastRow = "live",
    layout: ParallelLayout | None = None,
    arena: Arena | None = None,
    plan: bool = True,
    backend: Backend = "patch",
) -> list[list[ReplayBatch]]:
    """Check and cut the routes of a whole step, and agree with all other ranks that it can go on.

    Every rank must call it, once before the step. If any rank has refused its part, all of them raise: none waits in a
    collective of the step for a rank that never comes.

    chunks: this rank's model chunks; more than one with VPP.
    micro_batches: of this rank, in the order in which the schedule takes them.
    weight_version, staleness, last_row, arena, backend: as for `prepare`.
    plan: exchange token counts, so that MoE layers need not; where that cannot be, each batch's plan says why.

    Returns:
        For each chunk the batches of its micro-batches.

    Raises:
        R3Error: On every rank, what the ranks that refuse have said; also of the step before, if a rank's tokens were
            sent by a plan that was not theirs, and `check_dispatch` was not called.
    """

    def make() -> list[list[ReplayBatch]]:
        check_choice("staleness", staleness, Staleness, ReplayError)
        check_choice("last_row", last_row, LastRow, ReplayError)
        _check_step(chunks, micro_batches)
        check_astray([dict(moe_layers(chunk)) for chunk in chunks])
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
                    last_row=last_row,
                    arena=arena,
                    place=f"micro-batch {index}",
                    backend=backend,
                )
                for index, each in enumerate(micro_batches)
            ]
            for chunk in chunks
        ]

    steps, why_not = agreed_step(make, lambda steps: step_terms(chunks, len(steps[0]), plan))
    return with_plans(chunks, steps, why_not)


def step_terms(chunks: Sequence[torch.nn.Module], num_micro_batches: int, plan: bool) -> Terms:
    """Return the terms of a step. plan: whether its dispatch is to be planned, where it can be."""
    from megatron.core import parallel_state as ps

    shared = ps.get_expert_tensor_and_model_parallel_world_size() > 1
    reasons = [_why_not_planned(chunk) for chunk in chunks] if plan else []
    why_not = next(filter(None, reasons), "") if plan else NOT_ASKED
    groups = (
        ps.get_expert_tensor_and_model_parallel_group(),
        ps.get_pipeline_model_parallel_group(),
        ps.get_tensor_and_context_parallel_group(),
    )
    first = tuple(torch.distributed.get_process_group_ranks(group)[0] for group in groups)
    return Terms(num_micro_batches if shared else 0, why_not, first)


def _why_not_planned(chunk: torch.nn.Module) -> str:
    if _channel(chunk, "auto") == "native":
        return "backend 'native': the dispatchers of a Megatron without our patches take no counts"
    return why_not_planned(unwrapped(chunk), dict(moe_layers(chunk)))


def with_plans(
    chunks: Sequence[torch.nn.Module], steps: list[list[ReplayBatch]], why_not: str
) -> list[list[ReplayBatch]]:
    """Return the batches of a step with their plans; every rank must call it, once all have agreed.

    why_not: as `agreed_step` has returned it.
    """
    if why_not:
        return [[replace(batch, plan=Plan(None, why_not)) for batch in step] for step in steps]
    layers = [dict(moe_layers(chunk)) for chunk in chunks]
    plans = plan_step(layers, [[batch.routes for batch in step] for step in steps])
    return [
        [replace(batch, plan=each) for batch, each in zip(step, theirs, strict=True)]
        for step, theirs in zip(steps, plans, strict=True)
    ]


def check_dispatch(chunks: Sequence[torch.nn.Module]) -> None:
    """Raise if a dispatch plan did not fit the tokens that a rank sent; every rank must call it.

    Call it after a pass, before the optimizer's step: it waits for the device. Otherwise `prepare_step` does it.

    Raises:
        ReplayError: On every rank; names the ranks and layers.
    """
    agreed(lambda: check_astray([dict(moe_layers(chunk)) for chunk in chunks]))


def check_chunks(chunks: object, name: str = "chunks", kind: str = "model chunks") -> None:
    """Refuse what is not a sequence, an empty one, or one with an item of another type."""
    if not isinstance(chunks, Sequence | torch.nn.ModuleList) or not len(chunks):
        says = "none" if isinstance(chunks, Sequence) else f"a {type(chunks).__name__}, not a sequence"
        raise ReplayError(f"{name}: {says} of {kind}")


def _check_step(chunks: object, micro_batches: object) -> None:
    check_chunks(chunks)
    check_chunks(micro_batches, "micro_batches", "StepInput")
    for index, each in enumerate(cast(Sequence[object], micro_batches)):
        if not isinstance(each, StepInput):
            raise ReplayError(f"micro-batch {index}: a {type(each).__name__} is not a StepInput")


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


def prepare(
    chunk: torch.nn.Module,
    traces: Sequence[RoutingTrace],
    tokens: torch.Tensor,
    *,
    packing: Packing | None = None,
    layout: ParallelLayout | None = None,
    weight_version: str | None = None,
    staleness: Staleness = "refuse",
    last_row: LastRow = "live",
    arena: Arena | None = None,
    place: str = "micro-batch",
    backend: Backend = "patch",
) -> ReplayBatch:
    """Check the traces of a micro-batch against its tokens, and cut them for this rank's model chunk.

    Call it before the step: it raises before any collective is entered. With more than one rank use `prepare_step`,
    which makes all of them raise.

    chunk: the model chunk whose forward gets the routes.
    traces: one for each sample of the micro-batch, in order.
    tokens: [b, s] int64; the input_ids that this rank's model is given, [b, s / cp] under context parallelism; padding
        behind each sample. [1, t] or [1, t / cp] if packed. The model turns them to [s, b], so that row r of its
        routers, and of the routes, is token r // b of sample r % b.
    packing: how the samples lie in the micro-batch, and how context parallelism cuts it; the default is a padded batch
        of the tokens' shape, in Megatron's zigzag.
    layout: default: Megatron's own.
    weight_version: the trainer's weights by the engine's name; None to take rows of any.
    staleness: what to do with rows of other weights.
    last_row: of a sample whose last token is fed and has no route: "live", or "balanced" to give it experts as padding
        has, so that the batch has no live row for it. Only for a loop in which nothing reads that row: no label, value
        or reward is taken from it.
    arena: memory for the routes on the host, used again when nothing refers to a batch any more.
    place: names the micro-batch in errors.
    backend: how the experts will get to the routers; "auto": as the model is attached, "patch" if it is not.

    Raises:
        R3Error: traces that are not this model's or these tokens', or a layout that cannot hold them; names sample and
            position, and both operands.
    """
    check_choice("staleness", staleness, Staleness, ReplayError)
    check_choice("last_row", last_row, LastRow, ReplayError)
    channel = _channel(chunk, backend)
    check_inputs(traces, tokens, packing, weight_version)
    rank, layout = own_rank(), layout or current_layout()
    check_layout(layout)
    routers = dict(moe_routers(chunk))
    model = unwrapped(chunk)
    placement = placement_of(model)
    names = check_model(model, routers, traces, channel)
    if (feed := FEEDS.get(model)) is not None:
        feed.check(routers)
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
            layer_ids=np.fromiter((names[layer] for layer in routers), np.int32),
            input_ids=input_ids if packing.qkv_format == "sbhd" else input_ids.reshape(-1),
            dtype=np.dtype(np.int16),
            arena=arena,
            last_row=last_row,
            slot_of=None if placement is None else placement.slots([names[layer] for layer in routers]),
        )
    except R3Error as error:
        says = str(error).removeprefix(f"rank {rank}: ")
        if isinstance(error, TraceError) and packing is not None:
            cut = name_cut(traces, tokens.cpu().numpy(), packing, layout, layout.coords(rank).cp_rank)
            says = f"{cut} ({says})" if cut else says
        raise type(error)(f"rank {rank}, {place}: {says}") from error
    stale = _stale_rows(routes, weight_version)
    if staleness == "live":
        routes.topk_ids[:, stale] = LIVE
        routes.row_versions[stale] = LIVE
    topk_ids = routes.topk_ids if routes.num_live else routes.topk_ids.view(np.uint16)
    routed_experts = torch.from_numpy(topk_ids).to(tokens.device)
    note_routes(routed_experts, routes)
    return ReplayBatch(routed_experts, routes, int(stale.sum()), backend=channel)


def _channel(chunk: object, backend: Backend) -> Channel:
    """Return the back end that was asked for; refuse another than that of a model that is attached."""
    check_choice("backend", backend, Backend, ReplayError)
    feed = FEEDS.get(unwrapped(chunk)) if isinstance(chunk, torch.nn.Module) else None
    if feed is None:
        if backend == "native":
            raise ReplayError("backend 'native' of a model that is not attached: attach(chunks, backend='native')")
        return "patch"
    if backend not in ("auto", feed.channel):
        raise ReplayError(f"backend {backend!r} != {feed.channel!r}, with which the model is attached")
    return feed.channel


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
