"""Two ranks of models of real Megatron in several layouts, replaying by both back ends; write what each case says.

python hybrid_rank.py RANK RENDEZVOUS OUTPUT
"""

import json
import sys
from itertools import cycle
from pathlib import Path
from typing import Any

import hybrid_tiny as hybrid
import megatron_tiny as tiny
import torch
from megatron.core import parallel_state as ps
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_mtp_block_spec
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from r3_adapter.frameworks.metrics import live_map
from r3_adapter.megatron.attach import attach
from r3_adapter.megatron.layers import moe_routers
from r3_adapter.megatron.replay import StepInput, prepare_step

RANK = int(sys.argv[1])
NUM, STEPS = 2, 3
GPT = "gpt"
said: dict[str, Any] = {}


def start(tp: int = 1, pp: int = 1, vpp: int | None = None, ep: int = 1) -> dict[str, Any]:
    """Set up Megatron's groups of a layout of two ranks; return what a configuration says of it."""
    ps.destroy_model_parallel()
    ps.initialize_model_parallel(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=1,
    )
    model_parallel_cuda_manual_seed(1234)
    return {
        "tensor_model_parallel_size": tp,
        "sequence_parallel": tp > 1,
        "pipeline_model_parallel_size": pp,
        "virtual_pipeline_model_parallel_size": vpp,
        "expert_model_parallel_size": ep,
        "expert_tensor_parallel_size": 1,
        "pipeline_dtype": torch.float32,
        "batch_p2p_comm": False,
    }


def build_gpt(pre: bool, post: bool, vp_stage: int | None, **options: Any) -> Any:
    """Build a chunk of a GPTModel of four MoE layers, with a layer of multi-token prediction where that is."""
    config = tiny.configure(4, mtp_num_layers=1, **options)
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, vp_stage=vp_stage)
    mtp = get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False, vp_stage=vp_stage)
    kinds = {"position_embedding_type": "rope", "mtp_block_spec": mtp, "vp_stage": vp_stage}
    return GPTModel(config, spec, tiny.VOCAB, tiny.SEQ, pre_process=pre, post_process=post, **kinds).train()


def build(pattern: str, options: dict[str, Any]) -> list[Any]:
    """Build this rank's chunks."""
    pp, vpp = options["pipeline_model_parallel_size"], options["virtual_pipeline_model_parallel_size"]
    stage, chunks = ps.get_pipeline_model_parallel_rank(), []
    for chunk in range(vpp or 1):
        pre, post = stage == chunk == 0, stage == pp - 1 and chunk == (vpp or 1) - 1
        vp_stage = None if vpp is None else chunk
        if pattern == GPT:
            chunks.append(build_gpt(pre, post, vp_stage, **options))
        else:
            chunks.append(hybrid.build(pattern, pre=pre, post=post, vp_stage=vp_stage, **options))
    return chunks


def inputs(layers: list[int], replica: int) -> list[StepInput]:
    """Return the micro-batches of a data-parallel rank."""
    generator, found = torch.Generator().manual_seed(replica), []
    for number in range(NUM):
        tokens = torch.randint(0, tiny.VOCAB, (tiny.BATCH, tiny.SEQ), generator=generator)
        first = (replica * NUM + number) * tiny.BATCH
        found.append(StepInput(hybrid.make_traces(tokens, layers, first), tokens))
    return found


class Seen:
    """What the routers of some chunks used: those of the decoder by layer, those of multi-token prediction."""

    def __init__(self, chunks: list[Any]) -> None:
        self.maps: dict[int, list[Any]] = {}
        self.given: list[Any] = []
        self.live: list[bool] = []
        self.mtp: list[Any] = []
        for chunk in chunks:
            for layer, router in moe_routers(chunk):
                keep = self.maps.setdefault(layer, [])
                router.register_forward_hook(lambda *call, keep=keep: keep.append(call[2][1]))
            for name, module in chunk.named_modules():
                if name.startswith("mtp") and name.endswith(".router"):
                    self.mtp.append(module)
                    module.register_forward_hook(self._predicted, with_kwargs=True)

    def _predicted(self, router: Any, args: Any, kwargs: Any, output: Any) -> None:
        target = getattr(getattr(router, "router_replay", None), "target_topk_idx", None)
        self.given.append([len([each for each in args[1:] if each is not None]), sorted(kwargs), target is None])
        self.live.append(torch.equal(output[1].bool(), live_map(router, args[0])))


def want(layers: list[int], layer: int, micro_batch: int, replica: int, first_position: int) -> list[list[int]]:
    """Return the experts of each row of a router, from what the traces were made of."""
    first = (replica * NUM + micro_batch) * tiny.BATCH
    rows = [divmod(row, tiny.BATCH) for row in range(tiny.TOKENS // (2 if first_position >= 0 else 1))]
    start = max(first_position, 0)
    return [hybrid.ids_at(first + sample, start + at, layers.index(layer)) for at, sample in rows]


def case(name: str, pattern: str, backend: Any, **sizes: int) -> None:
    """Train some steps in a layout; say what each router used, and what those of multi-token prediction were given."""
    options = start(**sizes)
    if backend == "native":
        # Megatron then lists all routers of the process, and those of multi-token prediction among them.
        options["moe_enable_routing_replay"] = True
    chunks = build(pattern, options)
    layers = list(range(4)) if pattern == GPT else hybrid.moe_letters(pattern)
    replica, tp = ps.get_data_parallel_rank(), sizes.get("tp", 1)
    position = RANK * tiny.SEQ // 2 if tp > 1 else -1
    data, seen = inputs(layers, replica), Seen(chunks)
    before = [router.weight.detach().clone() for router in seen.mtp]
    optimizer = torch.optim.SGD([each for chunk in chunks for each in chunk.parameters()], lr=0.1)
    attached, plans = attach(chunks, backend), set()
    for _ in range(STEPS if pattern == GPT or "/" in pattern else 1):
        optimizer.zero_grad()
        steps = prepare_step(chunks, data, backend=attached.backend)
        plans |= {batch.plan.kind for step in steps for batch in step if len(batch.routed_experts)}
        with attached.replaying(steps):
            tiny.loop(chunks, data)
        optimizer.step()
    attached.detach()
    right = {
        layer: bool(maps)
        and all(
            each.nonzero()[:, 1].view(-1, tiny.TOPK).tolist() == want(layers, layer, number, replica, position)
            for each, number in zip(maps, cycle(range(NUM)), strict=False)
        )
        for layer, maps in seen.maps.items()
    }
    said[f"{name}, {backend}"] = {
        "right": right,
        "calls": sorted({len(maps) for maps in seen.maps.values()}),
        "plans": sorted(plans),
        "predicted": [len(seen.live), all(seen.live), [each for each in seen.given if each != [0, [], True]]],
        "trained": [not torch.equal(old, router.weight) for old, router in zip(before, seen.mtp, strict=True)],
    }


torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=RANK, world_size=2)
for backend in ("patch", "native"):
    case("hybrid, pp 2", "ME*E|-M*E" if hybrid.NAMED else hybrid.BLOCKS, backend, pp=2)
    case("hybrid, tp 2, ep 2", hybrid.BLOCKS, backend, tp=2, ep=2)
    case("hybrid, ep 2", hybrid.BLOCKS, backend, ep=2)
    case("gpt, pp 2, prediction", GPT, backend, pp=2)
    case("gpt, pp 2, vpp 2, prediction", GPT, backend, pp=2, vpp=2)
    if hybrid.NAMED:
        case("hybrid, pp 2, vpp 2, prediction", "ME|*E|-M|*E/*E", backend, pp=2, vpp=2)
Path(sys.argv[3]).write_text(json.dumps(said), encoding="utf-8")
