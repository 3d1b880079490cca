import importlib
import json
import re
import sys
from functools import cache
from pathlib import Path

import pytest

from r3_adapter.errors import CaptureError, UnknownModelError
from r3_adapter.sglang.moe_config import MoEConfig

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

SMALL = {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 24, "vocab_size": 96}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
LFM2 = ["conv", "full_attention", "conv", "conv", "full_attention", "conv"]
MAX = {"max_position_embeddings": 64}

KNOWN = {
    # By hand, from each family's modeling file: num_experts, topk, layer_ids, num_layers.
    "afmoe": ({"num_hidden_layers": 5, "num_dense_layers": 2}, (64, 6, (2, 3, 4), 5)),
    "aria_text": ({"num_hidden_layers": 2, "moe_num_experts": 6, "moe_topk": 3}, (6, 3, (0, 1), 2)),
    "cohere2_moe": ({"num_hidden_layers": 4, "num_experts": 4}, (4, 2, (0, 1, 2, 3), 4)),
    "deepseek_v2": (
        {"num_hidden_layers": 3, "first_k_dense_replace": 1, "num_experts_per_tok": 6, "n_routed_experts": 16},
        (16, 6, (1, 2), 3),
    ),
    "deepseek_v3": ({"num_hidden_layers": 5}, (256, 8, (3, 4), 5)),
    "dots1": (
        {"num_hidden_layers": 3, "first_k_dense_replace": 1, "n_routed_experts": 8, "num_experts_per_tok": 2}
        | {"n_shared_experts": 1},
        (8, 2, (1, 2), 3),
    ),
    "ernie4_5_moe": (
        {"num_hidden_layers": 7, "moe_layer_start_index": 2, "moe_layer_end_index": 5, "moe_layer_interval": 2}
        | {"moe_num_experts": 8, "moe_k": 3},
        (8, 3, (3, 5), 7),
    ),
    "flex_olmo": ({"num_hidden_layers": 2}, (7, 5, (0, 1), 2)),
    "gemma4_text": (
        {"num_hidden_layers": 2, "enable_moe_block": True, "num_experts": 8, "top_k_experts": 3} | SMALL,
        (8, 3, (0, 1), 2),
    ),
    "glm4_moe": ({"num_hidden_layers": 3, "first_k_dense_replace": 2}, (128, 8, (2,), 3)),
    "glm4_moe_lite": (
        {"num_hidden_layers": 4, "mlp_layer_types": ["dense", "sparse", "dense", "sparse"]},
        (64, 4, (1, 3), 4),
    ),
    "gpt_oss": ({"num_hidden_layers": 2}, (128, 4, (0, 1), 2)),
    "granitemoe": ({"num_hidden_layers": 2, "num_local_experts": 6}, (6, 2, (0, 1), 2)),
    "hunyuan_v1_moe": (
        {"num_hidden_layers": 2, "num_experts": 8, "moe_topk": 3, "head_dim": 8} | SMALL,
        (8, 3, (0, 1), 2),
    ),
    "hy_v3": ({"num_hidden_layers": 3, "mlp_layer_types": ["dense", "dense", "sparse"]}, (192, 8, (2,), 3)),
    "jamba": (
        {"num_hidden_layers": 6, "expert_layer_period": 3, "expert_layer_offset": 1, "num_experts": 4},
        (4, 2, (1, 4), 6),
    ),
    "laguna": ({"num_hidden_layers": 3, "mlp_layer_types": ["sparse", "dense", "sparse"]}, (256, 8, (0, 2), 3)),
    "lfm2_moe": ({"num_hidden_layers": 6, "num_dense_layers": 4, "layer_types": LFM2}, (32, 4, (4, 5), 6)),
    "llama4_text": ({"num_hidden_layers": 6, "interleave_moe_layer_step": 2}, (16, 1, (1, 3, 5), 6)),
    "minimax": ({"num_hidden_layers": 3}, (8, 2, (0, 1, 2), 3)),
    "mixtral": ({"num_hidden_layers": 2, "num_local_experts": 5}, (5, 2, (0, 1), 2)),
    "nemotron_h": ({"hybrid_override_pattern": "M-E*ME"}, (8, 2, (2, 5), 6)),
    "olmoe": ({"num_hidden_layers": 2}, (64, 8, (0, 1), 2)),
    "phimoe": ({"num_hidden_layers": 2}, (16, 2, (0, 1), 2)),
    "qwen2_moe": ({"num_hidden_layers": 4, "decoder_sparse_step": 2}, (60, 4, (1, 3), 4)),
    "qwen3_moe": ({"num_hidden_layers": 4, "mlp_only_layers": [1]}, (128, 8, (0, 2, 3), 4)),
    "qwen3_next": ({"num_hidden_layers": 4, "mlp_only_layers": [0]}, (512, 10, (1, 2, 3), 4)),
}

REFUSED = {
    # Several routed parts in a layer, experts that compute nothing, layers that differ, forms that are not known.
    "ernie4_5_vl_moe": ({}, "layer 1 has routed experts in mlp.text_moe and mlp.vision_moe"),
    "jetmoe": ({}, "layer 0 has routed experts in mlp and self_attention.experts"),
    "longcat_flash": ({}, "layer 0: experts of 512 and 768: which is not known"),
    "doge": ({"is_moe": True}, "layer 0 has experts of a form that is not known"),
    "nllb-moe": ({}, "an encoder with a decoder"),
    "switch_transformers": ({}, "an encoder with a decoder"),
    "hunyuan_v1_moe": (
        {"num_hidden_layers": 2, "num_experts": 8, "moe_topk": [2, 3], "head_dim": 8},
        "its layers differ, 8 experts with top-2 and 8 experts with top-3",
    ),
    "lfm2_moe": ({}, "transformers cannot build it: TypeError"),
    "qwen3_omni_moe_talker_text": ({}, "transformers has no decoder for it"),
    "my_own": ({"num_hidden_layers": 4, "num_experts": 8, "num_experts_per_tok": 2}, "'my_own' is not known to"),
}


@cache
def moe_families():
    """Return each model_type of transformers in whose modeling file there is a class of experts or of a router."""
    auto = importlib.import_module("transformers.models.auto.configuration_auto")
    root, found = Path(transformers.__file__).parent / "models", []
    for family in auto.CONFIG_MAPPING_NAMES:
        files = (root / auto.model_type_to_module_name(family)).glob("modeling_*.py")
        if any(re.search(r"^class \w*(Expert|MoE|Moe|Router)\w*\(", path.read_text(), re.M) for path in files):
            found.append(family)
    return found


def counted(config):
    """Return the config that the routers of a model make, found by other marks than those that are tested."""
    auto = importlib.import_module("transformers.models.auto.modeling_auto")
    text = config.get_text_config()
    parts = [text, config, *(getattr(config, name, None) for name in config.sub_configs)]
    mappings = (auto.MODEL_FOR_CAUSAL_LM_MAPPING, auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, auto.MODEL_MAPPING)
    kind, part = next((each[type(part)], part) for each in mappings for part in parts if type(part) in each)
    with torch.device("meta"):
        model = kind(part)
    found, prefix = {}, ""
    for name, module in model.named_modules():
        place = re.search(r"^(.*\.|)layers\.(\d+)\.(.*)$", name)
        if place and re.search(r"(^|\.)experts$|sparse_moe\.input_linear$", place[3]):
            sizes = {each.shape[0] for each in module.parameters() if each.dim() == 3}
            prefix = place[1]
            found.setdefault(int(place[2]), set()).update(sizes)
    topk = [getattr(text, name, None) for name in ("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts")]
    num_layers = len(
        [name for name, _ in model.named_modules() if re.fullmatch(re.escape(prefix) + r"layers\.\d+", name)]
    )
    return found, {each for each in topk if each is not None}, num_layers


@pytest.mark.parametrize("family", moe_families())
def test_config_of_every_family_is_that_of_its_modules_or_is_refused(family):
    try:
        moe = MoEConfig.from_config({"model_type": family})
    except CaptureError as error:
        refused = isinstance(error, UnknownModelError) or "none of its" in str(error)
        assert refused and family in str(error)
        return
    found, topk, num_layers = counted(transformers.AutoConfig.for_model(family))
    assert tuple(found) == moe.layer_ids
    assert {moe.num_experts} in (each for each in found.values()) and len(set(map(frozenset, found.values()))) == 1
    assert {moe.topk} == topk
    assert moe.num_layers == num_layers


def test_most_families_are_known():
    def known(family):
        try:
            return bool(MoEConfig.from_config({"model_type": family} | KNOWN.get(family, ({},))[0]).layer_ids)
        except CaptureError:
            return False

    assert sum(map(known, moe_families())) >= 45


@pytest.mark.parametrize("family", KNOWN)
def test_config_is_the_one_that_a_reader_of_the_modules_finds(family, tmp_path):
    changes, want = KNOWN[family]
    config = {"model_type": family} | MAX | changes
    assert MoEConfig.from_config(config) == MoEConfig(*want)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert MoEConfig.from_checkpoint(tmp_path) == MoEConfig.if_known(tmp_path) == MoEConfig(*want)


@pytest.mark.parametrize("family", REFUSED)
def test_what_is_not_known_is_no_number(family, tmp_path):
    changes, message = REFUSED[family]
    config = {"model_type": family} | (SMALL | MAX if family == "hunyuan_v1_moe" else {}) | changes
    with pytest.raises(UnknownModelError, match=re.escape(message)):
        MoEConfig.from_config(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert MoEConfig.if_known(tmp_path) is None


def test_config_of_a_multimodal_model_is_that_of_its_text():
    text = {"num_hidden_layers": 4, "interleave_moe_layer_step": 2}
    config = {"model_type": "llama4", "text_config": text}
    assert MoEConfig.from_config(config) == MoEConfig(16, 1, (1, 3), 4)
    text = {"num_hidden_layers": 4, "num_experts": 16, "num_experts_per_tok": 4}
    assert MoEConfig.from_config({"model_type": "qwen3_5_moe", "text_config": text}) == MoEConfig(
        16, 4, (0, 1, 2, 3), 4
    )


def test_a_family_that_only_its_models_name_is_known():
    config = {"model_type": "kimi_k2", "architectures": ["DeepseekV3ForCausalLM"], "n_routed_experts": 384}
    assert MoEConfig.from_config(config | {"num_hidden_layers": 4, "n_group": 1}) == MoEConfig(384, 8, (3,), 4)


def test_a_dense_model_has_no_moe_config(tmp_path):
    config = {"model_type": "qwen3", "num_hidden_layers": 2}
    with pytest.raises(CaptureError, match="config: qwen3: none of its 2 layers has routed experts") as raised:
        MoEConfig.from_config(config)
    assert not isinstance(raised.value, UnknownModelError)
    with pytest.raises(CaptureError, match=r"config\.json: cannot be read"):
        MoEConfig.if_known(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "config: model_type None is not known"),
        ({"num_hidden_layers": 4, "num_experts": 8, "num_experts_per_tok": 2}, "config: model_type None is not known"),
        ({"model_type": "qwen3_moe", "num_experts": "8"}, "num_experts"),
        ({"model_type": "qwen3_moe", "num_experts_per_tok": 0}, "topk 0 outside 1 to 128 experts"),
        ({"model_type": "qwen3_moe", "num_experts_per_tok": 129}, "topk 129 outside 1 to 128 experts"),
        ({"model_type": "qwen3_moe", "num_hidden_layers": 20_000}, r"num_hidden_layers \(20000\) > 1024"),
        ({"model_type": "qwen3_moe", "num_experts": 100_000}, "experts of 100000: which is not known"),
        ([], "list is no configuration"),
    ],
)
def test_configurations_that_are_none_are_refused(config, message):
    with pytest.raises(CaptureError, match=message):
        MoEConfig.from_config(config)


def test_config_does_not_depend_on_the_kernels_of_this_machine():
    config = {"model_type": "qwen3_moe", "num_hidden_layers": 2}
    expected = MoEConfig.from_config(config)
    for name in ("attn_implementation", "_attn_implementation"):
        assert MoEConfig.from_config({**config, name: "flash_attention_2"}) == expected


def test_reading_leaves_the_generator_of_random_numbers_alone():
    before = torch.get_rng_state()
    MoEConfig.from_config({"model_type": "mixtral", "num_hidden_layers": 1})
    assert torch.equal(before, torch.get_rng_state())


def test_without_transformers_nothing_is_known(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "transformers", None)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_moe", "num_hidden_layers": 3}))
    with pytest.raises(UnknownModelError, match="qwen3_moe: layers are not known without transformers"):
        MoEConfig.from_checkpoint(tmp_path)
    assert MoEConfig.if_known(tmp_path) is None
