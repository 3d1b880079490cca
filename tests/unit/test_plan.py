import base64
import importlib.util
import itertools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from r3_adapter.codec import encode, encode_all
from r3_adapter.errors import LayoutError
from r3_adapter.layout import Packing, ParallelLayout
from r3_adapter.plan import sizes
from r3_adapter.plan.request import Machines
from r3_adapter.plan.stages import even_stages, stages_of
from r3_adapter.repack import repack
from r3_adapter.sglang.engine import native_bytes
from r3_adapter.sglang.moe_config import MoEConfig
from r3_adapter.trace import RoutingTrace, ids_dtype

SPEC = importlib.util.spec_from_file_location("plan_requests", Path(__file__).with_name("plan_requests.py"))
requests = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(requests)
ROOT, CONFIGS, QWEN, request_of = requests.ROOT, requests.CONFIGS, requests.QWEN, requests.request_of


def array_bytes(data):
    """Return the bytes of safetensors without their header."""
    return len(data) - 8 - int.from_bytes(data[:8], "little")


def traces_of(moe, lengths, *, prefix=0, seed=0):
    """Return traces of random routes that have the first tokens in common; the last of each holds no route."""
    rng = np.random.default_rng(seed)
    num_layers, dtype = len(moe.layer_ids), ids_dtype(moe.num_experts)
    every = rng.random((prefix + sum(lengths), num_layers, moe.num_experts)).argsort(axis=2)[..., : moe.topk]
    traces, at = [], prefix
    for length in lengths:
        ids = np.concatenate([every[:prefix], every[at : at + length - prefix]]).astype(dtype)
        ids[-1] = 0
        versions = np.zeros(length, np.int32)
        versions[-1] = -1
        tokens = np.arange(length, dtype=np.int32)
        tokens[prefix:] += at
        at += length - prefix
        layers = np.array(moe.layer_ids, np.int32)
        traces.append(RoutingTrace(ids, tokens, versions, layers, moe.num_experts, ("1",)))
    return traces


# Routes on their way.


def test_figures_of_a_token_that_are_known():
    moe = MoEConfig.from_config(QWEN)
    assert sizes.id_bytes(moe) == 384
    assert native_bytes(2, moe) == 1536
    assert sizes.base64_bytes(1536) == 2048
    assert sizes.set_bytes(1, 1, moe) - 8 == 48 * 41 // 8


@pytest.mark.parametrize("size", range(1, 9))
def test_base64_is_as_long_as_base64(size):
    assert sizes.base64_bytes(size) == len(base64.b64encode(bytes(size)))


@pytest.mark.parametrize("num_experts", [8, 256, 300])
def test_payloads_are_as_large_as_the_plan_says(num_experts):
    moe = MoEConfig(num_experts, 4, (1, 2, 4, 5), 6)
    (trace,) = traces_of(moe, [500])
    assert array_bytes(trace.to_bytes()) == sizes.trace_bytes(500, moe)
    assert array_bytes(encode(trace)) == sizes.set_bytes(500, 499, moe) + 4 * (4 + 3)  # layers; three counts
    assert np.zeros((499, 6, 4), np.int32).nbytes == native_bytes(500, moe)


def test_prompts_of_a_group_are_sent_once():
    moe = MoEConfig(64, 4, tuple(range(8)), 8)
    groups = [traces_of(moe, [120] * 4, prefix=99, seed=seed) for seed in range(2)]
    groups = [
        [replace(trace, token_ids=trace.token_ids + np.int32(10_000 * seed)) for trace in group]
        for seed, group in enumerate(groups)
    ]
    found = array_bytes(encode_all([trace for group in groups for trace in group]))
    want = sizes.set_bytes_of_groups(2, 4, 100, 20, moe)
    assert found == want + 4 * (8 + 3 * 8)  # layers; three counts of each trace
    assert want < 0.5 * sum(len(encode(trace)) for group in groups for trace in group)


# Routes of a rank.


@pytest.mark.parametrize("sizes_of_layout", list(itertools.product((1, 2), (1, 2), (1, 2), (1, 2), (1, 2))))
def test_a_rank_gets_arrays_of_the_size_that_the_plan_says(sizes_of_layout):
    tp, pp, vpp, cp, dp = sizes_of_layout
    if vpp > pp:
        return
    config = QWEN | {"num_hidden_layers": 8, "num_experts": 16, "num_experts_per_tok": 4, "mlp_only_layers": [0, 5]}
    layout = ParallelLayout(tp=tp, pp=pp, vpp=vpp, cp=cp, dp=dp, etp=1)
    request = request_of(config, layout)
    stages, moe, batch = request.stages(), request.model.moe, request.batch
    for length, field in ((batch.mean_length, "micro_batch"), (batch.max_length, "max_micro_batch")):
        padded_length = -(-length // (2 * tp * cp)) * 2 * tp * cp
        packing = Packing.packed([0, padded_length, 2 * padded_length])
        traces = traces_of(moe, [length] * 2)
        for rank in range(layout.world_size):
            pp_rank = layout.coords(rank).pp_rank
            found = [
                repack(traces, packing, layout, rank, layer_ids=[layer for layer in chunk if layer in moe.layer_ids])
                for chunk in stages[pp_rank]
            ]
            planned = sizes.stage_routes(request, stages, pp_rank)
            assert sum(routes.topk_ids.nbytes for routes in found) == getattr(planned, field)
    planned = [sizes.stage_routes(request, stages, pp_rank) for pp_rank in range(pp)]
    assert all(each.step == each.micro_batch * 8 // (2 * dp) for each in planned)
    # What the ranks of all stages and data-parallel shares pull is what the samples hold, token_ids for each stage.
    whole = sizes.trace_bytes(batch.mean_length, moe) - 4 * len(moe.layer_ids)
    assert sum(each.pulled for each in planned) * dp == 8 * (whole + 8 * (pp - 1) * batch.mean_length)
    assert all(each.read == each.pulled // (tp * cp) for each in planned)


@pytest.mark.parametrize("per_node", [1, 2, 4, 8])
def test_a_node_pulls_each_object_once(per_node):
    layout = ParallelLayout(tp=2, pp=2, cp=2, dp=2, ep=4, etp=1)
    request = request_of(QWEN, layout, machines=Machines(per_node, 80 << 30, None))
    one = sizes.stage_routes(request, request.stages(), 0).pulled
    # tp * cp ranks that are next to each other read the same object; two shares are next to each other in a stage.
    assert sizes.node_pulled(request, request.stages()) == one * max(1, per_node // 4)


def test_passes_in_flight_are_those_of_the_schedule():
    schedules = pytest.importorskip("megatron.core.pipeline_parallel.schedules")
    for pp, vpp, micro in itertools.product((2, 4), (1, 2, 3), (4, 8)):
        for rank in range(pp):
            group = SimpleNamespace(size=lambda pp=pp: pp, rank=lambda rank=rank: rank)
            size = None if vpp == 1 else vpp
            fake = SimpleNamespace(pp_group=group, virtual_pipeline_model_parallel_size=size)
            total, _, warmup, _ = schedules.get_pp_rank_microbatches(micro, vpp, pp, p2p_communicator=fake)
            found = sizes.in_flight(ParallelLayout(pp=pp, vpp=vpp), rank, micro)
            assert found == min(warmup + 1, total)
    assert sizes.in_flight(ParallelLayout(), 0, 8) == 1


# Layers of a stage.


def test_layers_are_shared_out_as_megatron_does():
    stages = even_stages(8, ParallelLayout(pp=2, vpp=2))
    assert stages == (((0, 1), (4, 5)), ((2, 3), (6, 7)))
    with pytest.raises(LayoutError, match=r"pp \* vpp \(4 \* 1\) does not divide num_layers \(94\)"):
        even_stages(94, ParallelLayout(pp=4))


@pytest.mark.parametrize(
    ("text", "pp", "vpp"),
    [
        ("Et*23|t*24|t*24|t*23L", 4, 1),
        ("Ettt|(tt|)*2,t|L", 5, 1),
        ("E|(t*2|)*2t|tL", 5, 1),
        ("Et|tt|t|ttL", 2, 2),
        ("E|t||tttL", 2, 2),
    ],
)
def test_a_pipeline_layout_is_read_as_megatron_does(text, pp, vpp):
    found = pytest.importorskip("megatron.core.transformer.pipeline_parallel_layer_layout")
    rows = found.PipelineParallelLayerLayout.parse_str_to_list(text)
    counts = [sum(kind.name == "decoder" for kind in row) for row in rows]
    stages = stages_of(text, sum(counts), ParallelLayout(pp=pp, vpp=vpp))
    assert [len(stages[at % pp][at // pp]) for at in range(pp * vpp)] == counts
    in_order = [layer for at in range(pp * vpp) for layer in stages[at % pp][at // pp]]
    assert in_order == list(range(sum(counts)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Et|tL|", r"3 parts != pp \* vpp \(2 \* 1\)"),
        ("Et|L", r"1 layers != num_layers \(2\)"),
        ("Et|mtL", "'m' is none of"),
        ("tE|tL", "'E' first"),
        ("E(t|t)L", r"'\(\)' is none of"),
    ],
)
def test_pipeline_layouts_that_cannot_be_are_refused(text, message):
    with pytest.raises(LayoutError, match=message):
        stages_of(text, 2, ParallelLayout(pp=2))
