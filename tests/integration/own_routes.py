"""One rank of a trainer of a model whose own routes must change no bit, others just the layers that they are for.

The model has shared experts, dense layers in a pattern, sigmoid routers with a bias and groups, and MTP (multi-token
prediction).

python own_routes.py LAYOUT_JSON CONFIG_JSON RENDEZVOUS RANK; exits 0, or fails with what differs.

T: tokens of a micro-batch; K: experts a token; E: experts of a layer.
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from r3_adapter.layout import Packing, ParallelLayout, local_segments
from r3_adapter.megatron.batches import MicroBatch, micro_batches
from r3_adapter.megatron.layers import moe_routers
from r3_adapter.megatron.policy_trainer.build import build_optimizer, initialize
from r3_adapter.megatron.policy_trainer.step import training_step
from r3_adapter.megatron.replay import StepInput, prepare_step
from r3_adapter.repack import RankRoutes, collect
from r3_adapter.rollout import Sample
from r3_adapter.trace import RoutingTrace

PATTERN, EXPERTS, TOPK, VOCAB = (1, 0, 1, 1, 0, 1), 8, 2, 64
MOE_LAYERS = [layer for layer, is_moe in enumerate(PATTERN) if is_moe]
SAMPLES, SIZE, FED = 4, 2, 16
MTP = -1


@dataclass
class Record:
    """What the routers of this rank did in one training step.

    maps, inputs: by decoder layer, or MTP, of each call: [T, E] routing map, [s, b, h] hidden states.
    bits: gradients, losses, and the MTP loss.
    """

    maps: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    inputs: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    bits: dict[str, torch.Tensor] = field(default_factory=dict)


class KeptWeights:
    """Stands for an optimizer, and leaves weights and gradients as they are."""

    def zero_grad(self) -> None:
        """Do nothing: the step zeroes the gradients' buffers itself."""

    def step(self) -> tuple[bool, float, int]:
        return True, 0.0, 0


def build(layout: ParallelLayout, options: Mapping[str, Any]) -> torch.nn.Module:
    """Build this rank's part of the model."""
    from megatron.core import parallel_state as ps
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_mtp_block_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    from r3_adapter.megatron.attention import LocalAttention

    config = TransformerConfig(
        num_layers=len(PATTERN),
        hidden_size=32,
        num_attention_heads=4,
        ffn_hidden_size=64,
        num_moe_experts=EXPERTS,
        moe_layer_freq=list(PATTERN),
        moe_ffn_hidden_size=32,
        moe_shared_expert_intermediate_size=16,
        moe_router_topk=TOPK,
        moe_router_dtype="fp32",
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True,
        moe_router_topk_scaling_factor=2.5,
        moe_router_num_groups=4,
        moe_router_group_topk=2,
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="alltoall",
        mtp_num_layers=1,
        calculate_per_token_loss=True,
        tensor_model_parallel_size=layout.tp,
        sequence_parallel=layout.tp > 1,
        pipeline_model_parallel_size=layout.pp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        pipeline_dtype=torch.float32,
        normalization="RMSNorm",
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        **options,
    )
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
    for layer in spec.layer_specs:
        layer.submodules.self_attention.submodules.core_attention = LocalAttention
    first, last = ps.is_pipeline_first_stage(), ps.is_pipeline_last_stage()
    mtp = get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False)
    model = GPTModel(
        config, spec, VOCAB, 64, first, last, position_embedding_type="rope", mtp_block_spec=mtp if last else None
    )
    for router in routers(model).values():
        router.weight.data.mul_(10)
        router.expert_bias += torch.linspace(-0.2, 0.2, EXPERTS).to(router.expert_bias.device)
    return model.to(torch.cuda.current_device())


def routers(model: torch.nn.Module) -> dict[int, Any]:
    """Return the routers by decoder layer, that of the MTP layer, where this rank has it, as MTP."""
    found: dict[int, Any] = dict(moe_routers(model))
    prediction = [module for name, module in model.named_modules() if "mtp." in name and name.endswith(".router")]
    return found | dict.fromkeys([MTP] if prediction else [], *prediction)


@contextmanager
def recorded(model: torch.nn.Module) -> Iterator[Record]:
    """Record what the routers do; that of MTP must be given nothing."""
    record = Record()

    def hook(layer: int) -> Any:
        def keep(router: Any, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> None:
            record.inputs.setdefault(layer, []).append(args[0].detach().clone())
            record.maps.setdefault(layer, []).append(output[1].clone())
            if layer == MTP:
                assert [*args[1:], *kwargs.values()] == [None] * (len(args) - 1 + len(kwargs)), (args[1:], kwargs)

        return keep

    hooks = [router.register_forward_hook(hook(layer), with_kwargs=True) for layer, router in routers(model).items()]
    yield record
    for each in hooks:
        each.remove()


def train(model: torch.nn.Module, batches: Sequence[MicroBatch], traces: Sequence[RoutingTrace] | None) -> Record:
    """Make a training step that changes no weight; with traces, of the samples in order, they are replayed."""
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    MTPLossLoggingHelper.tracker.clear()
    routes = None
    if traces is not None:
        own = [traces[SIZE * i : SIZE * (i + 1)] for i in range(len(batches))]
        routes = prepare_step([model], [StepInput(own[i], x.tokens, x.packing) for i, x in enumerate(batches)])
        assert not any(each.routes.num_live or each.routes.num_padding for each in routes[0])
    losses: list[torch.Tensor] = []
    with recorded(model) as record:
        training_step([model], KeptWeights(), batches, routes, keep=lambda _, found: losses.append(found.detach()))
    for name, parameter in model.named_parameters():
        record.bits[name] = parameter.main_grad.clone()
    record.bits |= {f"buffer {name}": buffer.clone() for name, buffer in model.named_buffers()}
    record.bits |= {f"losses {index}": found.clone() for index, found in enumerate(losses)}
    # Its name in 0.16.1, and in 0.19.2.
    for name in {"values", "loss_values"} & MTPLossLoggingHelper.tracker.keys():
        record.bits["MTP loss"] = MTPLossLoggingHelper.tracker[name].clone()
    for name, buffer in model.named_buffers():
        buffer.copy_(before[name])
    return record


def own_traces(record: Record, samples: Sequence[Sample], layout: ParallelLayout, rank: int) -> list[RoutingTrace]:
    """Gather what all ranks' routers selected into traces of the fed tokens."""
    packing, coords = Packing.padded(SIZE, FED), layout.coords(rank)
    layers = [layer for layer in sorted(record.maps) if layer != MTP]
    traces = []
    for index in range(SAMPLES // SIZE):
        # Of each call of a router; recomputation, if any, comes after the pass that it repeats.
        ids = [_calls(record.maps[layer])[index].nonzero()[:, 1].view(-1, TOPK) for layer in layers]
        shard = RankRoutes(
            topk_ids=torch.stack(ids).to("cpu", torch.uint8).numpy(),
            row_versions=np.zeros(len(ids[0]), np.int32),
            weight_versions=("own",),
            layer_ids=np.array(layers, np.int32),
            segments=local_segments(packing, layout, coords),
            num_experts=EXPERTS,
        )
        shards: list[Any] = [None] * layout.world_size
        torch.distributed.all_gather_object(shards, shard)
        tokens = [sample.trace.token_ids[:FED] for sample in samples[SIZE * index : SIZE * (index + 1)]]
        traces += collect(shards, tokens, layer_ids=MOE_LAYERS, num_experts=EXPERTS)
    return traces


def _calls(maps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the distinct calls, in order."""
    return [found for i, found in enumerate(maps) if not any(torch.equal(found, other) for other in maps[:i])]


def other_routes(traces: Sequence[RoutingTrace], layer: int) -> list[RoutingTrace]:
    """Return traces with random experts in one layer."""
    rng, found = np.random.default_rng(layer), []
    for trace in traces:
        ids = trace.topk_ids.copy()
        noise = rng.random((len(ids), EXPERTS)).argsort(axis=1)[:, :TOPK]
        ids[:, MOE_LAYERS.index(layer)] = noise.astype(np.uint8)
        found.append(replace(trace, topk_ids=ids))
    return found


def different(want: Mapping[Any, Any], have: Mapping[Any, Any]) -> list[Any]:
    """Return the keys whose tensors, or lists of tensors, differ in a bit."""
    assert want.keys() == have.keys()

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, list):
            return len(a) == len(b) and all(map(same, a, b))
        return bool(a.cpu().numpy().tobytes() == b.cpu().numpy().tobytes())

    return [key for key in want if not same(want[key], have[key])]


def main(argv: Sequence[str]) -> None:
    """Run all steps, and compare."""
    layout, options, rank = ParallelLayout.smallest(**json.loads(argv[0])), json.loads(argv[1]), int(argv[3])
    device = initialize(layout, rank, f"file://{argv[2]}")
    # A GPU's live step does not repeat itself without them.
    torch.use_deterministic_algorithms(device.type == "cuda")
    (model,), _ = build_optimizer([build(layout, options)], distributed=False)
    rng = np.random.default_rng(0)
    samples = []
    for _ in range(SAMPLES):
        tokens = rng.integers(0, VOCAB, FED + 1).astype(np.int32)
        nothing = np.zeros((FED + 1, len(MOE_LAYERS), TOPK), np.uint8)
        layers, none = np.array(MOE_LAYERS, np.int32), np.full(FED + 1, -1, np.int32)
        trace = RoutingTrace(nothing, tokens, none, layers, EXPERTS, ())
        samples.append(Sample(trace, 1, np.zeros(FED, np.float32)))
    batches = micro_batches(samples, layout, rank, size=SIZE, qkv_format="sbhd", device=device)

    live = train(model, batches, None)
    assert set(live.maps) - {MTP} <= set(MOE_LAYERS) and ("MTP loss" in live.bits) == (MTP in live.maps)
    traces = own_traces(live, samples, layout, rank)
    own = train(model, batches, traces)
    for name in ("bits", "maps", "inputs"):
        assert different(getattr(live, name), getattr(own, name)) == [], f"own routes: {name} differ"

    for layer in MOE_LAYERS:
        other = train(model, batches, other_routes(traces, layer))
        maps = [found for found in different(live.maps, other.maps) if found != MTP]
        assert maps == [layer] * (layer in live.maps), f"routes of layer {layer} changed {maps}"
        later = {found for found in live.inputs if found == MTP or found > layer}
        changed = set(different(live.inputs, other.inputs))
        assert changed == later, f"routes of layer {layer} changed the inputs of {changed} != {later}"
        assert "MTP loss" not in live.bits or different(live.bits, other.bits).count("MTP loss") == 1
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
