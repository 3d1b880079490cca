"""Bytes of routes, weights and model states, for each place that they pass or stay in.

S: tokens of a sample; L: decoder layers; M: MoE layers; K: experts a token; E: experts; T: tokens of a rank.
"""

from collections.abc import Callable
from typing import NamedTuple

from r3_adapter import _core
from r3_adapter.errors import LayoutError
from r3_adapter.layout import ParallelLayout, RankCoords
from r3_adapter.plan.model import ModelShape, Parameters
from r3_adapter.plan.request import Batch, Engines, PlanRequest
from r3_adapter.plan.stages import Stages, engine_stages
from r3_adapter.sglang.engine import native_bytes
from r3_adapter.sglang.moe_config import MoEConfig
from r3_adapter.trace import ids_dtype

_TOKEN_BYTES = 8
"""token_ids and version_ids, int32 each."""
_SLOT_BYTES = 20
"""version_ids int32, row_ids and parent_ids int64 of each KV slot; patches/sglang: routed_experts_links.py."""
_REPLAY_BYTES = 2
"""int16, as `prepare` gives ids to the model."""


def base64_bytes(size: int) -> int:
    """Return the length of the base64 of so many bytes."""
    return 4 * -(-size // 3)


def id_bytes(moe: MoEConfig) -> int:
    """Return the bytes of a token's ids in a RoutingTrace, [M, K]."""
    return len(moe.layer_ids) * moe.topk * ids_dtype(moe.num_experts).itemsize


def trace_bytes(num_tokens: int, moe: MoEConfig) -> int:
    """Return the bytes of a RoutingTrace's arrays; its header takes some hundred more."""
    return num_tokens * (_TOKEN_BYTES + id_bytes(moe)) + 4 * len(moe.layer_ids)


def set_bytes(num_rows: int, num_captured: int, moe: MoEConfig) -> int:
    """Return the bytes of codec.encode_all's codes, token_ids and version_ids.

    num_rows: tokens that are not shared with the sample before; num_captured: those of them that hold a route.

    Raises:
        LayoutError: more experts than the code can tell apart.
    """
    try:
        bits = _core.set_bits(moe.num_experts, moe.topk)
    except ValueError as error:
        raise LayoutError(f"set code: {error}") from error
    return num_rows * _TOKEN_BYTES + (num_captured * len(moe.layer_ids) * bits + 7) // 8


def set_bytes_of_groups(num_groups: int, samples: int, prompt: int, response: int, moe: MoEConfig) -> int:
    """Return `set_bytes` of groups of samples that share their prompt but for its last token.

    The engine computes that one again for each sample; each sample's last token holds no route.
    """
    rows = num_groups * (prompt - 1 + samples * (response + 1))
    return set_bytes(rows, rows - num_groups * samples, moe)


class Transport(NamedTuple):
    """A form in which routes leave an engine: bytes of a token, of a mean and a longest sample, and of a step."""

    name: str
    token: float
    mean_sample: int
    max_sample: int
    step: int


def transports(moe: MoEConfig, batch: Batch) -> list[Transport]:
    """Return what each form takes; samples of mean length make the step."""

    def form(name: str, size: Callable[[int], int]) -> Transport:
        mean, longest = size(batch.mean_length), size(batch.max_length)
        return Transport(name, mean / batch.mean_length, mean, longest, mean * batch.num_samples)

    groups, samples = batch.num_prompts, batch.samples_per_prompt
    step = set_bytes_of_groups(groups, samples, batch.mean_prompt, batch.mean_response, moe)
    mean = set_bytes(batch.mean_length, batch.mean_length - 1, moe)
    longest = set_bytes(batch.max_length, batch.max_length - 1, moe)
    return [
        form("SGLang's own: int32, all layers, base64", lambda size: base64_bytes(native_bytes(size, moe))),
        form("patched: MoE layers, base64 (HTTP)", lambda size: base64_bytes(trace_bytes(size, moe))),
        form("patched: bytes (in process, Ray)", lambda size: trace_bytes(size, moe)),
        Transport(
            "as sets, prompts of a group once", step / batch.num_samples / batch.mean_length, mean, longest, step
        ),
    ]


class StageRoutes(NamedTuple):
    """Routes of a rank of a pipeline stage.

    pulled: its stage's layers of its data-parallel share of a step's samples: the object that it takes from the store.
    read: the part of it that this rank's context- and sequence-parallel share of the tokens is.
    micro_batch, max_micro_batch: [M, T, K] int16 on the device, for samples of mean and of most length.
    in_flight: of mean micro-batches whose backward pass is still to come under 1F1B, at most.
    step: of all mean micro-batches of an optimizer step, as `prepare_step` makes them.
    """

    pulled: int
    read: int
    micro_batch: int
    max_micro_batch: int
    in_flight: int
    step: int


def stage_routes(request: PlanRequest, stages: Stages, pp_rank: int) -> StageRoutes:
    """Return the bytes of routes of each rank of a stage; the most where its chunks differ."""
    model, batch, layout = request.model, request.batch, request.layout
    moe, num_micro = model.moe, batch.num_micro_batches(layout)
    moe_layers = [len(set(chunk) & set(moe.layer_ids)) for chunk in stages[pp_rank]]
    tokens = batch.num_samples * batch.mean_length // layout.dp
    ids = moe.topk * ids_dtype(moe.num_experts).itemsize
    pulled = tokens * (_TOKEN_BYTES + sum(moe_layers) * ids)
    row = moe.topk * _REPLAY_BYTES
    mean, longest = (row * batch.local_tokens(size, layout) for size in (batch.mean_length, batch.max_length))
    passes = in_flight(layout, pp_rank, num_micro)
    return StageRoutes(
        pulled=pulled,
        read=pulled // (layout.cp * layout.tp),
        micro_batch=sum(moe_layers) * mean,
        max_micro_batch=sum(moe_layers) * longest,
        in_flight=min(passes * max(moe_layers), num_micro * sum(moe_layers)) * mean,
        step=num_micro * sum(moe_layers) * mean,
    )


def in_flight(layout: ParallelLayout, pp_rank: int, num_micro_batches: int) -> int:
    """Return the most forward passes of chunks that wait for their backward pass at once.

    Source: megatron/core/pipeline_parallel/schedules.py@0.16.1:get_pp_rank_microbatches
    """
    behind = layout.pp - pp_rank - 1
    warmup = behind if layout.vpp == 1 else 2 * behind + (layout.vpp - 1) * layout.pp
    return min(warmup + 1, num_micro_batches * layout.vpp)


def node_pulled(request: PlanRequest, stages: Stages) -> int:
    """Return the bytes that the busiest node takes from the store in a step: each object once, however many read it."""
    layout, per_node = request.layout, request.machines.gpus_per_node
    sizes = [stage_routes(request, stages, pp_rank).pulled for pp_rank in range(layout.pp)]
    nodes: dict[int, set[tuple[int, int]]] = {}
    for rank in range(layout.world_size):
        coords: RankCoords = layout.coords(rank)
        nodes.setdefault(rank // per_node, set()).add((coords.pp_rank, coords.dp_rank))
    return max(sum(sizes[pp_rank] for pp_rank, _ in objects) for objects in nodes.values())


class RankMemory(NamedTuple):
    """Model states of a rank in bytes; optimizer: on the host if it is offloaded. Activations come on top."""

    parameters: Parameters
    weights: int
    gradients: int
    optimizer: int
    reference: int

    def on_device(self, *, cpu_offload: bool) -> int:
        """Return the part that takes the GPU's memory."""
        return self.weights + self.gradients + self.reference + (0 if cpu_offload else self.optimizer)


def rank_memory(request: PlanRequest, stages: Stages, pp_rank: int) -> RankMemory:
    """Return the states of each rank of a stage: float32 gradients, and Adam with float32 main weights.

    The distributed optimizer shares dense states out over dp * cp ranks, those of experts over the expert copies.
    """
    model, layout = request.model, request.layout
    layers = [layer for chunk in stages[pp_rank] for layer in chunk]
    held = model.rank_parameters(layers, layout, first=pp_rank == 0, last=pp_rank == layout.pp - 1)
    copies = Parameters(layout.dp * layout.cp, layout.stage_size // layout.expert_size)
    if not request.distributed_optimizer:
        copies = Parameters(1, 1)
    size = model.dtype_size
    state = 8 if size == 4 else 12  # Two moments, and float32 main weights beside bfloat16 ones.
    optimizer = sum(-(-state * part // parts) for part, parts in zip(held, copies, strict=True))
    weights = size * sum(held)
    return RankMemory(held, weights, 4 * sum(held), optimizer, weights if request.reference else 0)


class CaptureBuffers(NamedTuple):
    """Route buffers of one engine in bytes: on each GPU, on each rank's host side where it has them, and in all."""

    device: int
    host_rank: int
    host: int


def capture_buffers(moe: MoEConfig, engines: Engines, num_slots: int, *, patched: bool) -> CaptureBuffers:
    """Return the buffers for so many KV slots in each data-parallel rank's pool; on a GPU, of the largest stage.

    Source: sglang@0.5.20 srt/state_capturer/base.py and routed_experts.py: int32, all layers, on every rank; patched:
        routed_experts_compact.py: MoE layers only, on a GPU those of its stage; ids, versions and links on the one
        rank that sends them.
    """
    row = id_bytes(moe) if patched else 4 * moe.num_layers * moe.topk
    tokens = engines.forward_tokens(patched=patched)
    if not patched:
        return CaptureBuffers(tokens * row, num_slots * row, engines.size * num_slots * row)
    with_experts = set(moe.layer_ids)
    most = max(len(with_experts & set(stage)) for stage in engine_stages(moe.num_layers, engines.pp))
    host = num_slots * (row + _SLOT_BYTES)
    return CaptureBuffers(tokens * row * most // len(with_experts), host, engines.dp * host)


class EngineMemory(NamedTuple):
    """Memory of a GPU of an engine in bytes; num_slots: KV slots of a pool; token: KV bytes a token on this GPU."""

    weights: int
    token: int
    num_slots: int
    fraction: float

    @property
    def pool(self) -> int:
        return self.num_slots * self.token


def engine_memory(request: PlanRequest) -> EngineMemory:
    """Return weights and KV pool of a GPU; without max_total_tokens the pool is what the static fraction leaves.

    With a pipeline the weights are those of the stage with most of them, the KV that of the one that caches most.
    """
    model, engines = request.model, request.engines
    stages = engine_stages(model.moe.num_layers, engines.pp)
    parameters = max(
        sum(model.rank_parameters(layers, ParallelLayout(), first=at == 0, last=at == engines.pp - 1))
        for at, layers in enumerate(stages)
    )
    weights = -(-model.dtype_size * parameters // engines.tp)
    attention = max(engines.tp // engines.dp, 1)
    token = model.dtype_size * max(model.kv_size(layers, attention) for layers in stages)
    fraction = float(engines.arguments.get("mem_fraction_static") or 0.85)
    left = max(int(fraction * request.machines.gpu_memory) - weights, 0)
    slots = int(engines.arguments.get("max_total_tokens") or (left // token if token else 0))
    return EngineMemory(weights, token, slots, fraction)


def weight_bytes(model: ModelShape) -> int:
    """Return the bytes of a weight update to one engine."""
    return model.dtype_size * model.num_parameters()
