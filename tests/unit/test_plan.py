import ast
import base64
import importlib.util
import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from r3_adapter import cli
from r3_adapter.codec import encode, encode_all
from r3_adapter.errors import LayoutError, R3Error
from r3_adapter.layout import Packing, ParallelLayout
from r3_adapter.plan import sizes
from r3_adapter.plan.model import ModelShape
from r3_adapter.plan.plan import make_plan
from r3_adapter.plan.request import Batch, Engines, Machines, PlanRequest
from r3_adapter.plan.stages import engine_stages, even_stages, stages_of
from r3_adapter.repack import repack
from r3_adapter.sglang.engine import native_bytes
from r3_adapter.sglang.facts import ModelFacts
from r3_adapter.trace import RoutingTrace, ids_dtype

ROOT = Path(__file__).parents[2]
CONFIGS = {path.stem: json.loads(path.read_text()) for path in (ROOT / "launch/configs").glob("*.json")}
QWEN = CONFIGS["qwen3-30b-a3b"]


def array_bytes(data):
    """Return the bytes of safetensors without their header."""
    return len(data) - 8 - int.from_bytes(data[:8], "little")


def request_of(config, layout, *, batch=(4, 2, 5, 9, 8, 24), micro=2, steps=1, pipeline=None, **changes):
    prompts, samples, *lengths = batch
    values = {
        "model": ModelShape.from_config(config),
        "layout": layout,
        "pipeline_layout": pipeline,
        "batch": Batch(prompts, samples, *lengths, micro, steps),
        "engines": Engines(1, 1, 1, {}),
        "machines": Machines(8, 80 << 30, None),
        "distributed_optimizer": True,
        "cpu_offload": False,
        "reference": False,
        "trainer_arguments": {},
    }
    return PlanRequest(**values | changes)


def traces_of(facts, lengths, *, prefix=0, seed=0):
    """Return traces of random routes that have the first tokens in common; the last of each holds no route."""
    rng = np.random.default_rng(seed)
    num_layers, dtype = len(facts.layer_ids), ids_dtype(facts.num_experts)
    every = rng.random((prefix + sum(lengths), num_layers, facts.num_experts)).argsort(axis=2)[..., : facts.topk]
    traces, at = [], prefix
    for length in lengths:
        ids = np.concatenate([every[:prefix], every[at : at + length - prefix]]).astype(dtype)
        ids[-1] = 0
        versions = np.zeros(length, np.int32)
        versions[-1] = -1
        tokens = np.arange(length, dtype=np.int32)
        tokens[prefix:] += at
        at += length - prefix
        layers = np.array(facts.layer_ids, np.int32)
        traces.append(RoutingTrace(ids, tokens, versions, layers, facts.num_experts, ("1",)))
    return traces


# Routes on their way.


def test_figures_of_a_token_that_are_known():
    facts = ModelFacts.from_config(QWEN)
    assert sizes.id_bytes(facts) == 384
    assert native_bytes(2, facts) == 1536
    assert sizes.base64_bytes(1536) == 2048
    assert sizes.set_bytes(1, 1, facts) - 8 == 48 * 41 // 8


@pytest.mark.parametrize("size", range(1, 9))
def test_base64_is_as_long_as_base64(size):
    assert sizes.base64_bytes(size) == len(base64.b64encode(bytes(size)))


@pytest.mark.parametrize("num_experts", [8, 256, 300])
def test_payloads_are_as_large_as_the_plan_says(num_experts):
    facts = ModelFacts(num_experts, 4, (1, 2, 4, 5), 6)
    (trace,) = traces_of(facts, [500])
    assert array_bytes(trace.to_bytes()) == sizes.trace_bytes(500, facts)
    assert array_bytes(encode(trace)) == sizes.set_bytes(500, 499, facts) + 4 * (4 + 3)  # layers; three counts
    assert np.zeros((499, 6, 4), np.int32).nbytes == native_bytes(500, facts)


def test_prompts_of_a_group_are_sent_once():
    facts = ModelFacts(64, 4, tuple(range(8)), 8)
    groups = [traces_of(facts, [120] * 4, prefix=99, seed=seed) for seed in range(2)]
    groups = [
        [replace(trace, token_ids=trace.token_ids + np.int32(10_000 * seed)) for trace in group]
        for seed, group in enumerate(groups)
    ]
    found = array_bytes(encode_all([trace for group in groups for trace in group]))
    want = sizes.set_bytes_of_groups(2, 4, 100, 20, facts)
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
    stages, facts, batch = request.stages(), request.model.facts, request.batch
    for length, field in ((batch.mean_length, "micro_batch"), (batch.max_length, "max_micro_batch")):
        room = -(-length // (2 * tp * cp)) * 2 * tp * cp
        packing = Packing.packed([0, room, 2 * room])
        traces = traces_of(facts, [length] * 2)
        for rank in range(layout.world_size):
            pp_rank = layout.coords(rank).pp_rank
            found = [
                repack(traces, packing, layout, rank, layer_ids=[layer for layer in chunk if layer in facts.layer_ids])
                for chunk in stages[pp_rank]
            ]
            planned = sizes.stage_routes(request, stages, pp_rank)
            assert sum(routes.topk_ids.nbytes for routes in found) == getattr(planned, field)
    planned = [sizes.stage_routes(request, stages, pp_rank) for pp_rank in range(pp)]
    assert all(each.step == each.micro_batch * 8 // (2 * dp) for each in planned)
    # What the ranks of all stages and data-parallel shares pull is what the samples hold, token_ids for each stage.
    whole = sizes.trace_bytes(batch.mean_length, facts) - 4 * len(facts.layer_ids)
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


# Parameters and memory.

SMALL = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 80, "moe_intermediate_size": 24, "head_dim": 8}
SMALL |= {"num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 4}
MODELS = {
    **CONFIGS,
    "small qwen": QWEN | SMALL | {"mlp_only_layers": [1], "decoder_sparse_step": 2, "tie_word_embeddings": True},
    "small deepseek": CONFIGS["deepseek-v3"]
    | SMALL
    | {"q_lora_rank": None, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "num_key_value_heads": 8, "n_shared_experts": 2},
}


@pytest.mark.parametrize("name", sorted(MODELS))
def test_parameters_are_those_of_the_model(name):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = MODELS[name]
    kind = "Qwen3Moe" if config["model_type"] == "qwen3_moe" else "DeepseekV3"
    hf = getattr(transformers, f"{kind}Config")(**config)
    with torch.device("meta"):
        model = getattr(transformers, f"{kind}ForCausalLM")(hf)
    assert ModelShape.from_config(config).num_parameters() == sum(each.numel() for each in model.parameters())


@pytest.mark.parametrize("name", sorted(CONFIGS))
@pytest.mark.parametrize(("tp", "pp", "ep", "etp"), [(1, 1, 4, 1), (1, 3, 8, 2), (4, 2, 2, 4)])
def test_ranks_of_a_copy_hold_the_model(name, tp, pp, ep, etp):
    model = ModelShape.from_config(CONFIGS[name])
    layout, num_layers = ParallelLayout.smallest(tp=tp, pp=pp, ep=ep, etp=etp), model.facts.num_layers
    cuts = [num_layers * at // pp for at in range(pp + 1)]
    held = [
        model.rank_parameters(range(cuts[at], cuts[at + 1]), layout, first=at == 0, last=at == pp - 1)
        for at in range(pp)
    ]
    whole = 2 * model.hidden_size + model.attention_whole
    whole = num_layers * whole + model.num_moe_layers * model.hidden_size * model.facts.num_experts + model.hidden_size
    found = sum(each.dense * tp + each.expert * ep * etp for each in held)
    assert found - (tp - 1) * whole == model.num_parameters()


def test_states_are_shared_out_over_the_copies():
    layout = ParallelLayout(tp=2, cp=2, dp=4, ep=4, etp=1)
    request = request_of(QWEN, layout)
    memory = sizes.rank_memory(request, request.stages(), 0)
    assert (memory.weights, memory.gradients) == (2 * sum(memory.parameters), 4 * sum(memory.parameters))
    # 8 dense copies (dp * cp), 4 of the experts (16 ranks / ep 4).
    assert memory.optimizer == 12 * memory.parameters.dense // 8 + 12 * memory.parameters.expert // 4
    assert memory.on_device(cpu_offload=True) == 6 * sum(memory.parameters)
    whole = sizes.rank_memory(request_of(QWEN, layout, distributed_optimizer=False), request.stages(), 0)
    assert whole.optimizer == 12 * sum(memory.parameters)
    single = sizes.rank_memory(request_of(QWEN | {"torch_dtype": "float32"}, layout), request.stages(), 0)
    assert (single.weights, single.optimizer * 3) == (2 * memory.weights, memory.optimizer * 2)


def test_capture_buffers_are_those_of_the_patches():
    facts = ModelFacts.from_config(CONFIGS["deepseek-v3"])
    engines = Engines(1, 4, 1, {"max_running_requests": 3, "chunked_prefill_size": 8})
    native = sizes.capture_buffers(facts, engines, 100, patched=False)
    assert native.device == np.zeros((8, 61, 8), np.int32).nbytes
    assert native.host == 4 * np.zeros((100, 61, 8), np.int32).nbytes == 4 * native.host_rank
    patched = sizes.capture_buffers(facts, engines, 100, patched=True)
    assert patched.device == np.zeros((8 + 3, 58, 8), np.uint8).nbytes
    slots = sum(np.zeros(100, dtype).nbytes for dtype in (np.int32, np.int64, np.int64))
    assert patched.host == np.zeros((100, 58, 8), np.uint8).nbytes + 4 * slots
    assert patched.host_rank == patched.host - 3 * slots
    two = Engines(1, 4, 1, dict(engines.arguments) | {"enable_dp_attention": True, "dp_size": 2})
    assert sizes.capture_buffers(facts, two, 100, patched=True).host - patched.host == 100 * 58 * 8
    # Stages of 15, 15, 15 and 16 layers, of which the first three are dense.
    staged = sizes.capture_buffers(facts, Engines(1, 4, 4, engines.arguments), 100, patched=True)
    assert staged.device == np.zeros((8 + 3, 16, 8), np.uint8).nbytes
    assert (staged.host_rank, staged.host) == (patched.host_rank, patched.host + 12 * slots)


def test_stages_of_an_engine_are_sglangs():
    found = importlib.util.find_spec("sglang")
    if found is None:
        pytest.skip("needs sglang")
    # Nothing of SGLang can be imported without all of it.
    module = ast.parse(Path(found.submodule_search_locations[0], "srt/distributed/utils.py").read_text())
    (function,) = [node for node in module.body if getattr(node, "name", "") == "get_pp_indices"]
    names = {"os": SimpleNamespace(getenv=lambda name, default: default), "Tuple": tuple}
    exec(compile(ast.Module([function], []), "utils.py", "exec"), names)
    for num_layers, pp in ((48, 1), (48, 4), (61, 4), (61, 8), (7, 7), (94, 5)):
        want = [range(*names["get_pp_indices"](num_layers, stage, pp)) for stage in range(pp)]
        assert engine_stages(num_layers, pp) == want


def test_a_pool_fills_what_the_weights_leave():
    engines = Engines(1, 64, 1, {"mem_fraction_static": 0.5})
    request = request_of(CONFIGS["deepseek-v3"], ParallelLayout(), engines=engines)
    found = sizes.engine_memory(request)
    assert found.token == 61 * 576 * 2
    assert 0 <= (40 << 30) - found.weights - found.pool < found.token
    staged = sizes.engine_memory(replace(request, engines=replace(engines, tp=16, pp=4)))
    assert staged.token == 16 * 576 * 2
    # The last stage has more than a quarter: 16 of 58 MoE layers, and the output layer.
    assert 1 < staged.weights / found.weights < 16 / 58 * 4 + 0.01


# The command.


def plan_flags(config="qwen3-30b-a3b", **changes):
    flags = {
        "tensor-model-parallel-size": 2,
        "expert-model-parallel-size": 4,
        "expert-tensor-parallel-size": 1,
        "micro-batch-size": 1,
        "gpu-memory-gib": 400,
        "sglang-args": '{"mem_fraction_static": 0.9}',
    } | {name.replace("_", "-"): value for name, value in changes.items()}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return ["plan", "--model-config", str(ROOT / f"launch/configs/{config}.json"), *words]


def test_a_plan_that_fits(tmp_path, capsys):
    path = tmp_path / "plan.json"
    assert cli.main(plan_flags(json=path)) == 0
    report = json.loads(path.read_text())
    assert report["passed"] and report["layout"]["world_size"] == 4
    assert report["model"]["parameters"] == 30_532_122_624
    native, http, ray, _ = report["transports"]
    assert ray["step"] == 128 * (64 * (8 + 384) + 4 * 48) < http["step"] < native["step"]
    assert report["weight_update"] == 2 * 30_532_122_624
    printed = capsys.readouterr().out
    assert "30.5 B parameters" in printed and printed.rstrip().endswith("fits") and "NO" not in printed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tensor_model_parallel_size": 8}, "tp (8) does not divide num_key_value_heads (4)"),
        ({"tensor_model_parallel_size": 3}, "tp (3) does not divide num_attention_heads (32)"),
        ({"expert_model_parallel_size": 12}, "ep (12) does not divide experts (128)"),
        ({"expert_model_parallel_size": 1}, "tp (2) > 1 with ep 1 and etp 1"),
        ({"expert_tensor_parallel_size": 5}, "etp (5) does not divide moe_intermediate_size (768)"),
        ({"data_parallel_size": 3}, "etp * ep (4) does not divide tp * cp * dp (6)"),
        ({"pipeline_model_parallel_size": 5}, "pp * vpp (5 * 1) does not divide num_layers (48)"),
        ({"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 7}, "does not divide num_layers"),
        (
            {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2, "rollout_batch_size": 10}
            | {"n_samples_per_prompt": 1},
            "pp (2) does not divide the 5 micro-batches",
        ),
        ({"pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": "Et|tL"}, "2 layers != num_layers (48)"),
        ({"rollout_batch_size": 1, "n_samples_per_prompt": 3}, "1 * 1 * 2 (2) does not divide samples 1 * 3 (3)"),
        ({"num_steps_per_rollout": 3}, "3 * 1 * 2 (6) does not divide samples 16 * 8 (128)"),
        ({"rollout_max_response_len": 50_000}, "prompt + response (32 + 50,000) > max_position_embeddings (40,960)"),
        ({"rollout_tp_size": 3}, "tp / dp_size (3) does not divide num_attention_heads (32)"),
        ({"rollout_tp_size": 6}, "rollout tp * pp (6) and gpus per node (8): one must divide the other"),
        ({"num_nodes": 1, "rollout_num_engines": 5}, "trainer + engines (4 + 5) > nodes * gpus per node (1 * 8)"),
        ({"gpu_memory_gib": 100}, "> GPU memory (100 GiB)"),
        ({"sglang_args": '{"max_total_tokens": 20}'}, "its tokens (64) > KV slots (20)"),
        ({"sglang_args": '{"max_total_tokens": 99999999}'}, "> mem_fraction_static (0.85) of the GPU (340.0 GiB)"),
        ({"sglang_args": '{"pp_size": 2}'}, "--sglang-args pp_size (2) != --rollout-pp-size (1)"),
        ({"rollout_pp_size": 64}, "rollout pp (64) > num_layers (48)"),
        ({"sglang_args": '{"attn_cp_size": 2}'}, "2 != 1 or None: tokens of a request are on several ranks"),
        ({"sglang_args": '{"speculative_algorithm": "EAGLE"}'}, "'EAGLE' != None: rows of rejected tokens"),
        ({"sglang_args": '{"moe_runner_backend": "flashinfer_trtllm"}'}, "'flashinfer_trtllm' != another than"),
        ({"sglang_args": '{"enable_unified_memory": true}'}, "True != False or None: rows are written at kernel ids"),
        ({"sglang_args": '{"dllm_algorithm": "LowConfidence"}'}, "'LowConfidence' != None: a diffusion model"),
        ({"sglang_args": '{"max_total_token": 9}'}, "did you mean 'max_total_tokens'?"),
        ({"megatron_args": '{"cuda_graph_impl": "local"}'}, "'local' != 'none': graphs are captured"),
        ({"megatron_args": '{"moe_expert_capacity_factor": 1.5}'}, "1.5 != None: it drops tokens"),
        ({"megatron_args": '{"moe_router_load_balancing_type": "sinkhorn"}'}, "it selects experts itself"),
        (
            {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2}
            | {"megatron_args": '{"batch_p2p_comm": true}'},
            "True != False with pp 2 and vpp 2",
        ),
    ],
)
def test_what_does_not_fit_is_named_with_its_operands(changes, message, capsys):
    assert cli.main(plan_flags(**changes)) == 1
    printed = capsys.readouterr()
    # Words of a cell may be on several lines of a table.
    said = " ".join((printed.out + printed.err).replace("│", " ").split())
    assert message in said and "does not fit" in said


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"micro_batch_size": 0}, "--micro-batch-size (0) < 1"), ({"config": "missing"}, "cannot be read")],
)
def test_wrong_use_is_refused(changes, message, capsys):
    assert cli.main(plan_flags(**changes)) == 2
    assert message in capsys.readouterr().err


def test_arguments_that_are_no_json_object_are_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(plan_flags(sglang_args="[]"))
    assert stopped.value.code == 2 and "--sglang-args" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["hidden_size", "vocab_size"])
def test_a_configuration_without_a_size_is_refused(name):
    with pytest.raises(R3Error, match=name):
        ModelShape.from_config({key: value for key, value in QWEN.items() if key != name})


def test_a_plan_counts_the_reference_model():
    layout = ParallelLayout(dp=4, ep=4)
    without, with_it = (make_plan(request_of(QWEN, layout, reference=which)) for which in (False, True))
    assert with_it.figures.memory[0].reference == without.figures.memory[0].weights > 0


@pytest.mark.parametrize("script", ["qwen3-30b-a3b", "qwen3-235b-a22b", "deepseek-v3"])
def test_scripts_for_real_models_fit_their_machines(script):
    command = Path(sys.executable).parent / "r3"
    if not command.exists():
        pytest.skip("needs the r3 command beside the interpreter")
    done = subprocess.run(
        [ROOT / f"launch/{script}.sh", "--seed", "7"],
        env=os.environ | {"DRY_RUN": "1", "R3": str(command)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "launch/grpo.py" in done.stdout and "--seed 7" in done.stdout
    assert f"{ModelShape.from_config(CONFIGS[script]).num_parameters() / 1e9:.1f} B parameters" in done.stdout
