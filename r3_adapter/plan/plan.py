"""A plan: the checks and figures of a request, as tables and as JSON."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from r3_adapter.plan.checks import Check, run_checks
from r3_adapter.plan.loads import Loads
from r3_adapter.plan.model import windows
from r3_adapter.plan.request import PlanRequest
from r3_adapter.plan.sizes import (
    CaptureBuffers,
    EngineMemory,
    RankMemory,
    StageRoutes,
    Transport,
    capture_buffers,
    engine_memory,
    node_pulled,
    rank_memory,
    stage_routes,
    transports,
    weight_bytes,
)
from r3_adapter.plan.stages import Stages

GIB = 1 << 30
STARTS = "trainer: weights"
"""The check that says whether a model that fits can be started."""


@dataclass(frozen=True)
class Figures:
    """The sizes of a request that passes its first checks. Lists are by pipeline stage; see plan/sizes.py."""

    stages: Stages
    transports: list[Transport]
    routes: list[StageRoutes]
    node_pulled: int
    memory: list[RankMemory]
    native: CaptureBuffers
    patched: CaptureBuffers
    engine: EngineMemory
    weights: int


@dataclass(frozen=True)
class Plan:
    """figures: None where a check before them said no. loads: None where nobody asked for them, or without figures."""

    request: PlanRequest
    checks: list[Check]
    notes: list[str]
    figures: Figures | None
    loads: Loads | None = None

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """Return everything that the tables say, sizes in bytes."""
        request, moe = self.request, self.request.model.moe
        report: dict[str, Any] = {
            "passed": self.passed,
            "model": {
                "family": request.model.family,
                "parameters": request.model.num_parameters(),
                "layers": moe.num_layers,
                "moe_layers": len(moe.layer_ids),
                "experts": moe.num_experts,
                "topk": moe.topk,
            },
            "layout": {**asdict(request.layout), "world_size": request.layout.world_size},
            "checks": [asdict(check) for check in self.checks],
            "notes": self.notes,
        }
        if (found := self.figures) is None:
            return report
        return report | {
            "stages": found.stages,
            "transports": [each._asdict() for each in found.transports],
            "routes_by_stage": [each._asdict() for each in found.routes],
            "node_pulled": found.node_pulled,
            "memory_by_stage": [
                {**each._asdict(), "device": each.on_device(cpu_offload=request.cpu_offload)} for each in found.memory
            ],
            "capture_native": found.native._asdict(),
            "capture_patched": found.patched._asdict(),
            "engine": {**found.engine._asdict(), "pool": found.engine.pool},
            "weight_update": found.weights,
            **({} if self.loads is None else {"loads": self.loads.to_json()}),
        }


def make_plan(request: PlanRequest, before: Sequence[Check] = ()) -> Plan:
    """Check a request and compute its figures.

    before: checks of what the request does not hold, which come first.
    """
    checks = [*before, *run_checks(request)]
    if not all(check.passed for check in checks):
        return Plan(request, [*checks, *_starts(request)], list(_notes(request)), None)
    stages, moe, engine = request.stages(), request.model.moe, engine_memory(request)
    of_stages = range(request.layout.pp)
    figures = Figures(
        stages=stages,
        transports=transports(moe, request.batch),
        routes=[stage_routes(request, stages, pp_rank) for pp_rank in of_stages],
        node_pulled=node_pulled(request, stages),
        memory=[rank_memory(request, stages, pp_rank) for pp_rank in of_stages],
        native=capture_buffers(moe, request.engines, engine.num_slots, patched=False),
        patched=capture_buffers(moe, request.engines, engine.num_slots, patched=True),
        engine=engine,
        weights=weight_bytes(request.model),
    )
    checks += [*_fits(request, figures), *_starts(request)]
    return Plan(request, checks, list(_notes(request)), figures)


def _fits(request: PlanRequest, figures: Figures) -> list[Check]:
    gpu, engine = request.machines.gpu_memory, figures.engine
    states = [each.on_device(cpu_offload=request.cpu_offload) for each in figures.memory]
    stage = max(range(len(states)), key=states.__getitem__)
    routes = figures.routes[stage].step
    size = states[stage] + routes
    trainer = f"model states + routes ({states[stage] / GIB:.1f} + {routes / GIB:.2f} GiB, stage {stage})"
    static = int(engine.fraction * gpu)
    rollout = f"weights + KV pool ({engine.weights / GIB:.1f} + {engine.pool / GIB:.1f} GiB)"
    of_static = f"mem_fraction_static ({engine.fraction}) of the GPU ({static / GIB:.1f} GiB)"
    longest, slots = request.batch.max_length, engine.num_slots
    return [
        _at_most("memory: a trainer's GPU", size, gpu, trainer, f"GPU memory ({gpu / GIB:.0f} GiB)"),
        _at_most("memory: an engine's GPU", engine.weights + engine.pool, static, rollout, of_static),
        _at_most("memory: longest sample", longest, slots, f"its tokens ({longest:,})", f"KV slots ({slots:,})"),
    ]


def _at_most(name: str, size: int, limit: int, what: str, of: str) -> Check:
    return Check(name, size <= limit, f"{what} {'<=' if size <= limit else '>'} {of}")


def _starts(request: PlanRequest) -> Iterator[Check]:
    """Say whether the trainer can be started with the model; its figures are computed all the same.

    Source: megatron/policy_trainer/weights.py, megatron/policy_trainer/trainer.py
    """
    model = request.model
    if model.family == "qwen3_moe":
        yield Check(STARTS, True, "its table of weights has the parameters of qwen3_moe")
        return
    missing = [
        what
        for what, there in (
            ("multi-head latent attention", model.num_kv_heads is None),
            ("shared experts", model.shared_ffn_size > 0),
            ("layers without a KV cache", any(layer.kv_size == 0 for layer in model.layers)),
            ("this family's router", True),
        )
        if there
    ]
    table = "megatron/policy_trainer/weights.py"
    says = f"model_type {model.family!r} != 'qwen3_moe', the one in its table of weights ({table}); missing: "
    yield Check(STARTS, False, says + ", ".join(missing))


def _notes(request: PlanRequest) -> Iterator[str]:
    model = request.model
    if model.num_mtp_layers:
        yield f"{model.num_mtp_layers} multi-token prediction layers: not built, not replayed, not counted."
    yield from windows(model)
    if request.trainer_arguments.get("moe_router_fusion"):
        yield "moe_router_fusion: on a GPU Triton fuses routers that are given experts, but not float64 logits."
    if request.engines.size > request.machines.gpus_per_node:
        nodes = request.engines.size // max(request.machines.gpus_per_node, 1)
        yield f"An engine is on {nodes} nodes: SGLang needs nnodes, node_rank and dist_init_addr for that."
    if "max_total_tokens" not in request.engines.arguments:
        yield "max_total_tokens is not given: KV slots are what SGLang's static memory leaves beside the weights."
