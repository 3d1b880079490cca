"""What must divide what, what must fit, and what R3 refuses: each answer names both operands."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from r3_adapter.errors import R3Error
from r3_adapter.megatron.checks import check_layout
from r3_adapter.megatron.config_fields import SELECTS, refused_options
from r3_adapter.plan.request import PlanRequest, length_multiple
from r3_adapter.repack import local_dtype
from r3_adapter.sglang.server_arguments import refused_arguments


@dataclass(frozen=True)
class Check:
    """An answer: what was asked, whether it is so, and with which operands."""

    name: str
    passed: bool
    says: str


def run_checks(request: PlanRequest) -> list[Check]:
    """Return every check of a request; none depends on another."""
    return [*checks_of_model(request), *_batch(request), *_machines(request)]


def checks_of_model(request: PlanRequest) -> list[Check]:
    """Return what is asked of the model, the layout and the engines, whatever the batch and the machines are."""
    checks = [
        _tried("trainer's layout", lambda: check_layout(request.layout), _grids(request)),
        _tried("pipeline stages", request.stages, _stage_sizes(request)),
    ]
    return [*checks, *_trainer(request), *_engines(request), *_refusals(request)]


def divides(name: str, by: str, size: int, what: str, number: int) -> Check:
    """Return whether a size divides a number."""
    passed = size >= 1 and number % size == 0
    return Check(name, passed, f"{by} ({size}) {'divides' if passed else 'does not divide'} {what} ({number:,})")


def _tried(name: str, do: Callable[[], Any], says: Callable[[], str]) -> Check:
    try:
        do()
    except R3Error as error:
        return Check(name, False, str(error))
    return Check(name, True, says())


def _grids(request: PlanRequest) -> Callable[[], str]:
    layout = request.layout
    return lambda: (
        f"tp * cp * dp * pp ({layout.tp} * {layout.cp} * {layout.dp} * {layout.pp}) = {layout.world_size} ranks; "
        f"etp * ep ({layout.etp} * {layout.ep}) divides a stage's {layout.stage_size}"
    )


def _stage_sizes(request: PlanRequest) -> Callable[[], str]:
    def says() -> str:
        sizes = [" + ".join(str(len(chunk)) for chunk in stage) for stage in request.stages()]
        return f"num_layers ({request.model.moe.num_layers}) as {', '.join(sizes)}"

    return says


def _trainer(request: PlanRequest) -> Iterator[Check]:
    model, layout = request.model, request.layout
    assert layout.etp is not None
    experts = model.moe.num_experts
    yield divides("trainer: experts", "ep", layout.ep, "experts", experts)
    yield divides("trainer: inner size of an expert", "etp", layout.etp, "moe_intermediate_size", model.expert_ffn_size)
    yield divides("trainer: attention heads", "tp", layout.tp, "num_attention_heads", model.num_heads)
    if model.num_kv_heads is not None:
        yield divides("trainer: key-value heads", "tp", layout.tp, "num_key_value_heads", model.num_kv_heads)
    yield divides("trainer: vocabulary", "tp", layout.tp, "vocab_size", model.vocab_size)
    if model.num_moe_layers < model.moe.num_layers:
        yield divides("trainer: inner size of dense layers", "tp", layout.tp, "intermediate_size", model.ffn_size)
    if model.shared_ffn_size:
        yield divides("trainer: inner size of shared experts", "tp", layout.tp, "their size", model.shared_ffn_size)
    most = np.iinfo(np.int16).max + 1
    says = f"experts ({experts}) <= {most:,}, the most beside a live row's mark"
    yield _tried("trainer: ids in int16", lambda: local_dtype(np.int16, experts), lambda: says)


def _batch(request: PlanRequest) -> Iterator[Check]:
    batch, layout, model = request.batch, request.layout, request.model
    parts = batch.steps * batch.micro_batch_size * layout.dp
    by = f"steps * micro-batch * dp, {batch.steps} * {batch.micro_batch_size} * {layout.dp}"
    samples = f"samples {batch.num_prompts} * {batch.samples_per_prompt}"
    yield divides("batch: samples", by, parts, samples, batch.num_samples)
    multiple = length_multiple(layout)
    padded_length = -(-batch.max_length // multiple) * multiple
    yield _tried(
        "batch: lengths",
        lambda: batch.local_tokens(batch.max_length, layout),
        lambda: (
            f"padded to multiples of 2 * tp * cp ({multiple}); the longest, {batch.max_length:,}, to {padded_length:,}"
        ),
    )
    if layout.vpp > 1:
        yield _interleaving(batch.num_micro_batches(layout), layout.pp)
    if model.max_length is not None:
        fits = batch.max_length <= model.max_length
        says = f"prompt + response ({batch.max_prompt:,} + {batch.max_response:,}) {'<=' if fits else '>'}"
        yield Check("batch: longest sample", fits, f"{says} max_position_embeddings ({model.max_length:,})")


def _interleaving(num_micro_batches: int, pp: int) -> Check:
    # Source: megatron/core/pipeline_parallel/schedules.py@0.16.1:forward_backward_pipelining_with_interleaving
    passed = num_micro_batches >= pp and num_micro_batches % pp == 0
    says = f"pp ({pp}) {'divides' if passed else 'does not divide'} the {num_micro_batches} micro-batches of a step"
    return Check("batch: interleaved micro-batches", passed, says)


def _engines(request: PlanRequest) -> Iterator[Check]:
    model, engines = request.model, request.engines
    for name, size in (("tp", engines.tp), ("pp", engines.pp)):
        if (given := engines.arguments.get(f"{name}_size", size)) != size:
            says = f"--sglang-args {name}_size ({given!r}) != --rollout-{name}-size ({size})"
            yield Check(f"engine: {name}_size", False, says)
    yield divides("engine: data-parallel attention", "dp_size", engines.dp, "rollout tp", engines.tp)
    attention = max(engines.tp // engines.dp, 1)
    yield divides("engine: attention heads", "tp / dp_size", attention, "num_attention_heads", model.num_heads)
    if model.num_kv_heads is not None:
        low, high = sorted((attention, model.num_kv_heads))
        says = f"tp / dp_size ({attention}) and num_key_value_heads ({model.num_kv_heads})"
        yield Check("engine: key-value heads", high % low == 0, f"{says}: one {_must(high % low == 0)} the other")
    yield divides("engine: expert parallelism", "ep_size", engines.ep, "rollout tp", engines.tp)
    yield divides("engine: experts", "ep_size", engines.ep, "experts", model.moe.num_experts)
    layers = model.moe.num_layers
    says = f"rollout pp ({engines.pp}) {'<=' if engines.pp <= layers else '>'} num_layers ({layers})"
    yield Check("engine: pipeline stages", engines.pp <= layers, says)
    if model.num_states and engines.arguments.get("max_total_tokens") is None:
        says = f"max_total_tokens (None) must be given: {model.num_states} layers have states in place of a KV cache"
        yield Check("engine: KV slots", False, says)
    cut = max(engines.tp // engines.ep, 1)
    yield divides(
        "engine: inner size of an expert", "tp / ep_size", cut, "moe_intermediate_size", model.expert_ffn_size
    )


def _must(passed: bool) -> str:
    return "divides" if passed else "must divide"


def _machines(request: PlanRequest) -> Iterator[Check]:
    machines, engines, ranks = request.machines, request.engines, request.layout.world_size
    per_node = machines.gpus_per_node
    low, high = sorted((engines.size, per_node))
    fits = low >= 1 and high % low == 0
    says = f"rollout tp * pp ({engines.size}) and gpus per node ({per_node}): one {_must(fits)} the other"
    yield Check("machines: an engine's GPUs", fits, says)
    if machines.num_nodes is not None:
        have, want = machines.num_nodes * per_node, ranks + engines.num_gpus
        says = f"trainer + engines ({ranks} + {engines.num_gpus}) {'<=' if want <= have else '>'} "
        yield Check("machines: GPUs", want <= have, says + f"nodes * gpus per node ({machines.num_nodes} * {per_node})")


def _refusals(request: PlanRequest) -> Iterator[Check]:
    given, clean = {**request.trainer_arguments}, True
    layout = request.layout
    sizes = {
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.vpp if layout.vpp > 1 else None,
    }
    for name, found, wanted, why in refused_options({**given, **sizes}):
        clean = False
        yield Check(f"R3 in the trainer: {name}", False, f"{found!r} != {wanted}: {why}")
    for kind in SELECTS:
        if kind in str(given.get("moe_router_load_balancing_type", "")):
            clean = False
            says = f"{kind!r} != another type: it selects experts itself"
            yield Check("R3 in the trainer: load balancing", False, says)
    if clean:
        yield Check("R3 in the trainer", True, f"refuses none of the {len(given)} Megatron arguments given")
    yield from _engine_refusals(request)


def _engine_refusals(request: PlanRequest) -> Iterator[Check]:
    given, clean = request.engines.arguments, True
    for name, why in refused_arguments(given):
        clean = False
        yield Check(f"R3 in the engine: {name}", False, why)
    if clean:
        yield Check("R3 in the engine", True, f"refuses none of the {len(given)} SGLang arguments given")
