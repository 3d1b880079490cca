import ast
import importlib.util
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from r3_adapter.errors import CaptureError, LayoutError, R3Error, UnknownModelError
from r3_adapter.layout import ParallelLayout
from r3_adapter.plan import sizes
from r3_adapter.plan.checks import run_checks
from r3_adapter.plan.model import ModelShape
from r3_adapter.plan.plan import make_plan
from r3_adapter.plan.request import Engines
from r3_adapter.plan.stages import engine_stages
from r3_adapter.sglang.meta_model import meta_model
from r3_adapter.sglang.moe_config import MoEConfig

SPEC = importlib.util.spec_from_file_location("plan_requests", Path(__file__).with_name("plan_requests.py"))
requests = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(requests)
ROOT, CONFIGS, QWEN, request_of = requests.ROOT, requests.CONFIGS, requests.QWEN, requests.request_of


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
    layout, num_layers = ParallelLayout.smallest(tp=tp, pp=pp, ep=ep, etp=etp), model.moe.num_layers
    cuts = [num_layers * at // pp for at in range(pp + 1)]
    held = [
        model.rank_parameters(range(cuts[at], cuts[at + 1]), layout, first=at == 0, last=at == pp - 1)
        for at in range(pp)
    ]
    whole = sum(layer.whole for layer in model.layers) + model.norm
    found = sum(each.dense * tp + each.expert * ep * etp for each in held)
    assert found - (tp - 1) * whole == model.num_parameters()


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_what_tensor_parallelism_does_not_cut(name):
    model, config = ModelShape.from_config(CONFIGS[name]), CONFIGS[name]
    hidden, layer = model.hidden_size, model.layers[-1]
    norms = 2 * hidden + (2 * config["head_dim"] if "qwen" in name else 0)
    if "deepseek" in name:
        query, latent = config["q_lora_rank"], config["kv_lora_rank"]
        norms += query + latent + hidden * (query + latent + config["qk_rope_head_dim"])
    assert layer.whole == norms + hidden * model.moe.num_experts
    assert layer.experts == 3 * model.moe.num_experts * hidden * model.expert_ffn_size


def config_of(family, **changes):
    return pytest.importorskip("transformers").AutoConfig.for_model(family, **changes).to_dict()


HYBRIDS = {
    # Layers with a KV cache, and numbers of a token in all of them, by hand.
    "qwen3_next": (12, 12 * 2 * 2 * 256),
    "qwen3_5_moe": (10, 10 * 2 * 2 * 256),
    "minimax": (16, 16 * 2 * 8 * 128),
    "jamba": (4, 4 * 2 * 8 * 128),
    "glm4_moe_lite": (47, 47 * (512 + 64)),
    "longcat_flash": None,
    "deepseek_v32": None,
    "deepseek_v4": None,
    "glm_moe_dsa": None,
    "minimax_m3_vl": (60, 60 * 2 * 4 * 128),
}


@pytest.mark.parametrize("family", HYBRIDS)
def test_layers_that_cache_are_counted_or_the_cache_is_not_known(family):
    if HYBRIDS[family] is None:
        with pytest.raises(UnknownModelError, match="is not known"):
            ModelShape.from_config(config_of(family))
        return
    model, (num_layers, numbers) = ModelShape.from_config(config_of(family)), HYBRIDS[family]
    assert sum(layer.kv_size > 0 for layer in model.layers) == num_layers
    request = request_of(QWEN, ParallelLayout(), model=model, engines=Engines(1, 1, 1, {"max_total_tokens": 64}))
    assert sizes.engine_memory(request).token == model.dtype_size * numbers
    checks = {check.name: check for check in run_checks(replace(request, engines=Engines(1, 1, 1, {})))}
    assert ("engine: KV slots" in checks) == (model.num_states > 0)
    notes = make_plan(request).notes
    assert any("state in place of a KV cache" in note for note in notes) == (model.num_states > 0)


MORE = ("afmoe", "dots1", "gpt_oss", "laguna", "llama4_text", "mellum", "mistral4", "mixtral", "nemotron_h", "olmoe")


def test_parameters_of_every_family_are_those_of_its_modules_or_not_known():
    auto = pytest.importorskip("transformers.models.auto.configuration_auto")
    known = 0
    for family in (*(each for each in auto.CONFIG_MAPPING_NAMES if "moe" in each), *MORE):
        config = config_of(family)
        try:
            model = ModelShape.from_config(config)
        except (CaptureError, LayoutError):
            continue
        known += 1
        built = meta_model(config, "config")
        head = built.model.get_output_embeddings()
        inside = {id(each): each for each in (*built.decoder.parameters(), *(head.parameters() if head else ()))}
        beside = 0 if head or model.tied else model.output
        assert model.num_parameters() == sum(each.numel() for each in inside.values()) + beside, family
    assert known >= 25


FOUR, EIGHT = {"num_hidden_layers": 4}, {"num_hidden_layers": 8}
COUNTED = {
    **dict.fromkeys(("deepseek_v3", "glm4_moe", "gpt_oss", "minimax", "minimax_m2", "mixtral", "olmoe"), FOUR),
    **dict.fromkeys(("jamba", "llama4_text", "qwen2_moe", "qwen3_5_moe_text", "qwen3_moe", "qwen3_next"), EIGHT),
    "deepseek_v2": {**FOUR, "num_experts_per_tok": 6},
    "nemotron_h": {},
}
"""Families, with layers enough to have one of each kind; Nemotron-H has a letter for each."""


@pytest.mark.parametrize("family", COUNTED)
def test_parameters_are_those_that_transformers_counts(family):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(family, **COUNTED[family])
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert ModelShape.from_config(config.to_dict()).num_parameters() == sum(each.numel() for each in model.parameters())


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
    moe = MoEConfig.from_config(CONFIGS["deepseek-v3"])
    engines = Engines(1, 4, 1, {"max_running_requests": 3, "chunked_prefill_size": 8})
    native = sizes.capture_buffers(moe, engines, 100, patched=False)
    assert native.device == np.zeros((8, 61, 8), np.int32).nbytes
    assert native.host == 4 * np.zeros((100, 61, 8), np.int32).nbytes == 4 * native.host_rank
    patched = sizes.capture_buffers(moe, engines, 100, patched=True)
    assert patched.device == np.zeros((8 + 3, 58, 8), np.uint8).nbytes
    slots = sum(np.zeros(100, dtype).nbytes for dtype in (np.int32, np.int64, np.int64))
    assert patched.host == patched.host_rank == np.zeros((100, 58, 8), np.uint8).nbytes + slots
    two = Engines(1, 4, 1, dict(engines.arguments) | {"enable_dp_attention": True, "dp_size": 2})
    assert sizes.capture_buffers(moe, two, 100, patched=True).host == 2 * patched.host
    # Stages of 15, 15, 15 and 16 layers, of which the first three are dense.
    staged = sizes.capture_buffers(moe, Engines(1, 4, 4, engines.arguments), 100, patched=True)
    assert staged.device == np.zeros((8 + 3, 16, 8), np.uint8).nbytes
    assert (staged.host_rank, staged.host) == (patched.host_rank, patched.host)


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


@pytest.mark.parametrize("name", ["hidden_size", "num_experts_per_tok", "vocab_size"])
def test_a_configuration_without_a_size_is_refused(name):
    with pytest.raises(R3Error, match=name):
        ModelShape.from_config({key: value for key, value in QWEN.items() if key != name})


def test_a_plan_counts_the_reference_model():
    layout = ParallelLayout(dp=4, ep=4)
    without, with_it = (make_plan(request_of(QWEN, layout, reference=which)) for which in (False, True))
    assert with_it.figures.memory[0].reference == without.figures.memory[0].weights > 0
