"""What a layout's expert-parallel ranks would get, from traces or a simulated skew, and what a step would take.

L: MoE layers; E: experts of a layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from r3_adapter.balance.compare import compare
from r3_adapter.balance.loads import Evenness
from r3_adapter.balance.simulate import SPREADS, World, simulate
from r3_adapter.balance.steps import Step, steps_of
from r3_adapter.errors import LayoutError, R3Error
from r3_adapter.plan.request import PlanRequest
from r3_adapter.rollout import SampleFolder

EXPERT_SHARE = 0.4
"""The part of a step's time that grows with the fullest rank's load: an assumption, until a run has measured it."""
WAIT = (0.06e-3, 0.15e-3)
"""Seconds of an exchange of counts and the host's wait for it, from one node to several: an assumption."""
MOST_SAMPLES, MOST_LAYERS = 1024, 24
"""Of a simulation: more of them change the figures little."""


@dataclass(frozen=True)
class Loads:
    """What is expected of the loads of a rank's experts, live and planned.

    source: where routes are from. num_samples, num_layers: that were looked at.
    max_tokens: of a micro-step of an expert group. micro_steps: of a rank in an optimizer step.
    exchanges, waits: exchanges of counts and waits of the host for them, of a rank in an optimizer step.
    live: in the order of arrival, experts as they are; planned: placed by the step before, packed.
    layer_bytes: activations of the experts of one layer at the peak; each live and planned.
    expert_share: the part of a step's time that grows with the ratio.
    """

    source: str
    num_samples: int
    num_layers: int
    num_ranks: int
    max_tokens: int
    micro_steps: int
    exchanges: tuple[int, int]
    waits: tuple[int, int]
    live: Evenness
    planned: Evenness
    layer_bytes: tuple[int, int]
    expert_share: float

    @property
    def step_ratio(self) -> float:
        """The time of a step with even loads over that without, as far as loads make it."""
        rest = 1 - self.expert_share
        return (rest + self.expert_share * self.planned.ratio) / (rest + self.expert_share * self.live.ratio)

    @property
    def wait_seconds(self) -> tuple[float, float]:
        """Return what the exchanges and waits of a live step take, at least and at most."""
        low, high = (each * self.waits[0] for each in WAIT)
        return low, high

    def to_json(self) -> dict[str, Any]:
        """Return every figure; pairs are live and planned."""
        evenness = {
            name: {"ratio": each.ratio, "p50": each.p50, "p95": each.p95, "worst": each.worst, "peak": each.peak_tokens}
            for name, each in (("live", self.live), ("planned", self.planned))
        }
        rest = ("source", "num_samples", "num_layers", "num_ranks", "max_tokens", "micro_steps", "exchanges", "waits")
        return {
            **{name: getattr(self, name) for name in rest},
            **evenness,
            "capacity_factor": (self.live.worst, self.planned.worst),
            "layer_bytes": self.layer_bytes,
            "expert_share": self.expert_share,
            "step_ratio": self.step_ratio,
            "wait_seconds": self.wait_seconds,
        }


def loads_of(
    request: PlanRequest,
    *,
    traces: Sequence[SampleFolder] = (),
    skew: str | None = None,
    expert_share: float = EXPERT_SHARE,
    recompute: bool = False,
) -> Loads:
    """Return what the layout's ranks would get of recorded steps, or of simulated ones.

    recompute: MoE layers run forward a second time in the backward pass.

    Raises:
        R3Error: both or neither, traces of another model, or a share that is none.
    """
    if bool(traces) == (skew is not None):
        raise R3Error("give traces, or a skew, and not both")
    if not 0 <= expert_share <= 1:
        raise R3Error(f"--expert-share ({expert_share}) outside 0 to 1")
    layout, batch, moe = request.layout, request.batch, request.model.moe
    if moe.num_experts % layout.ep:
        raise LayoutError(f"ep ({layout.ep}) does not divide the {moe.num_experts} experts of a layer")
    steps = _recorded(traces, request) if traces else _simulated(request, str(skew))
    assert layout.etp is not None
    # Of the data-parallel ranks whose tokens meet in a layer's experts, and no less than one.
    parts = max(1, layout.ep * layout.etp // (layout.tp * layout.cp))
    max_tokens = parts * batch.micro_batch_size * batch.mean_length
    ways = compare(steps, layout.ep, max_tokens).ways
    live, planned = ways["arrival"].figures, ways.get("placed_last", ways["placed"]).figures
    most = max(sum(layer in moe.layer_ids for chunk in stage for layer in chunk) for stage in request.stages())
    calls = batch.num_micro_batches(layout) * most * (2 if recompute else 1)
    shared = layout.ep * layout.etp > 1
    row = request.model.dtype_size * (2 * request.model.hidden_size + 3 * request.model.expert_ffn_size // layout.etp)
    tokens, counts = steps[-1]
    return Loads(
        source=f"{len(steps)} recorded steps" if traces else f"simulated, {skew} skew",
        num_samples=len(tokens),
        num_layers=counts.shape[1],
        num_ranks=layout.ep,
        max_tokens=max_tokens,
        micro_steps=batch.num_micro_batches(layout),
        exchanges=(calls, 1) if shared else (0, 0),
        waits=(calls, 1) if shared else (0, 0),
        live=live,
        planned=planned,
        layer_bytes=(live.peak_tokens * row, planned.peak_tokens * row),
        expert_share=expert_share,
    )


def _recorded(traces: Sequence[SampleFolder], request: PlanRequest) -> list[Step]:
    moe = request.model.moe
    steps = steps_of(traces)
    trace = traces[0][0].trace
    have = (trace.layer_ids.tolist(), trace.num_experts, trace.topk)
    want = (list(moe.layer_ids), moe.num_experts, moe.topk)
    for name, found, wanted in zip(("MoE layers", "experts", "topk"), have, want, strict=True):
        if found != wanted:
            raise R3Error(f"{name} ({found}) of the traces in {traces[0].folder} != {wanted} of --model-config")
    return steps


def _simulated(request: PlanRequest, skew: str) -> list[Step]:
    if skew not in SPREADS:
        raise R3Error(f"--skew {skew!r} is none of {', '.join(SPREADS)}")
    batch, moe = request.batch, request.model.moe
    prompts = min(batch.num_prompts, max(1, MOST_SAMPLES // batch.samples_per_prompt))
    world = World(
        skew=skew,  # type: ignore[arg-type]
        num_experts=moe.num_experts,
        topk=moe.topk,
        num_layers=min(len(moe.layer_ids), MOST_LAYERS),
        num_prompts=prompts,
        samples_per_prompt=min(batch.samples_per_prompt, MOST_SAMPLES),
        mean_tokens=batch.mean_length,
    )
    return simulate(world, 2, seed=0)
