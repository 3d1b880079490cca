"""Checkpoints of the self-test: families, and a real checkpoint's shape cut to a few layers."""

import json
from pathlib import Path
from typing import Any

import pytest

from r3_adapter.errors import R3Error
from r3_adapter.proof.models import FAMILIES, families, model_config, write_model
from r3_adapter.proof.shrink import cut, small
from r3_adapter.sglang.moe_config import MoEConfig

transformers = pytest.importorskip("transformers")

# Shapes as they are published.
PUBLISHED: dict[str, tuple[dict[str, Any], tuple[int, int, tuple[int, ...], int]]] = {
    "Moonlight": (
        {"model_type": "deepseek_v3", "hidden_size": 2048, "intermediate_size": 11264, "vocab_size": 163840}
        | {"num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16, "moe_intermediate_size": 1408}
        | {"n_routed_experts": 64, "num_experts_per_tok": 6, "n_shared_experts": 2, "first_k_dense_replace": 1}
        | {"q_lora_rank": None, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "v_head_dim": 128, "qk_nope_head_dim": 128}
        | {
            "n_group": 1,
            "topk_group": 1,
            "num_nextn_predict_layers": 1,
            "eos_token_id": [163585],
            "bos_token_id": 163584,
        },
        (64, 6, (1, 2), 3),
    ),
    "Qwen3-Next": (
        {"model_type": "qwen3_next", "num_hidden_layers": 48, "vocab_size": 151936, "eos_token_id": 151645}
        | {"num_experts": 512, "num_experts_per_tok": 10},
        (512, 10, (0, 1), 2),
    ),
    "Nemotron-3-Nano": (
        {"model_type": "nemotron_h", "hybrid_override_pattern": "MEMEM*EMEM-", "hidden_size": 2688, "n_groups": 8}
        | {"n_routed_experts": 128, "num_experts_per_tok": 6, "vocab_size": 131072, "moe_intermediate_size": 1856},
        (128, 6, (1, 3), 4),
    ),
}


def write_config(folder: Path, config: dict[str, Any]) -> str:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return str(folder)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_real_shape_keeps_what_its_routers_choose_from(name: str, tmp_path: Path) -> None:
    config, (num_experts, topk, layer_ids, num_layers) = PUBLISHED[name]
    folder = write_config(tmp_path / name, config)
    write_model(folder, tmp_path / "out", dtype="float32", seed=0)
    assert MoEConfig.from_checkpoint(tmp_path / "out") == MoEConfig(num_experts, topk, layer_ids, num_layers)
    written = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert written < 64 << 20
    with pytest.raises(R3Error, match="num_layers"):
        model_config(folder, num_layers=1 + MoEConfig.from_config(config).num_layers)


def test_a_cut_leaves_no_layer_of_experts_out_of_sight(tmp_path: Path) -> None:
    folder = write_config(tmp_path / "model", PUBLISHED["Moonlight"][0])
    with pytest.raises(R3Error, match=r"num_layers \(1\) <= 1, its first MoE layer"):
        model_config(folder, num_layers=1)


@pytest.mark.parametrize("family", families())
def test_a_seed_says_which_weights(family: str, tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("first", "again", "other")]
    for path, seed in zip(paths, (0, 0, 1), strict=True):
        write_model(family, path, dtype="float32", seed=seed)
    first, again, other = ((path / "model.safetensors").read_bytes() for path in paths)
    assert first == again != other


def test_real_weights_of_the_first_layers_are_the_checkpoint_s(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    whole, part = tmp_path / "whole", tmp_path / "part"
    write_model("olmoe", whole, dtype="float32", seed=0)
    write_model(str(whole), part, dtype="float32", seed=1, num_layers=1, real_weights=True)
    all_of_it, first = load_file(whole / "model.safetensors"), load_file(part / "model.safetensors")
    assert first.keys() == {name for name in all_of_it if ".layers.1." not in name}
    assert all((all_of_it[name] == value).all() for name, value in first.items())
    lost = next(name for name in all_of_it if ".layers.0." in name)
    save_file({name: value for name, value in all_of_it.items() if name != lost}, whole / "model.safetensors")
    with pytest.raises(R3Error, match="missing"):
        write_model(str(whole), tmp_path / "other", dtype="float32", seed=1, num_layers=1, real_weights=True)


@pytest.mark.parametrize(
    ("model", "options", "said"),
    [
        ("qwen5", {}, "neither one of qwen3_moe, qwen2_moe"),
        ("olmoe", {"num_layers": 3}, r"num_layers \(3\) > 2 of olmoe"),
        ("olmoe", {"num_layers": 0}, "num_layers"),
        ("olmoe", {"dtype": "float8"}, "dtype 'float8' is none of"),
        ("olmoe", {"real_weights": True}, "has no weights of its own"),
    ],
)
def test_what_cannot_be_written_is_refused(model: str, options: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(R3Error, match=said):
        write_model(model, tmp_path, **{"dtype": "float32", "seed": 0, **options})


@pytest.mark.parametrize("family", FAMILIES)
def test_small_models_are_small_already(family: str) -> None:
    config = model_config(family)
    shrunk = small(config)
    assert {name: value for name, value in config.items() if shrunk[name] != value} in (
        {},
        # Its yarn wants the longer context.
        {"max_position_embeddings": 131072},
    )
    assert cut(config, 2)["model_type"] == family
