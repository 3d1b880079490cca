"""Checkpoints of families through megatron-bridge: logits as Hugging Face's, and every tensor out as it went in."""

import importlib.util
import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from r3_adapter.layout import ParallelLayout
from r3_adapter.megatron.bridge.library import is_installed
from r3_adapter.processes import run_together
from r3_adapter.proof.families import NOT_ON_CPU
from r3_adapter.proof.models import Model

SPEC = importlib.util.spec_from_file_location("bridge_models", Path(__file__).with_name("bridge_models.py"))
assert SPEC and SPEC.loader
bridge_models: Any = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(bridge_models)

pytestmark = [
    pytest.mark.engine,
    pytest.mark.megatron,
    pytest.mark.skipif(not is_installed(), reason="megatron-bridge is not installed"),
]

LAYOUTS = {
    "tp2ep2": ParallelLayout.smallest(tp=2, ep=2, etp=1),
    "pp2": ParallelLayout.smallest(pp=2),
}


def run(folder: Path, checkpoints: list[Path], layout: ParallelLayout, tokens: Any, **request: Any) -> Path:
    """Let ranks read, run and export checkpoints; return the folder of what they wrote."""
    path = folder / "request.json"
    given = {
        "layout": asdict(layout),
        "tokens": tokens.tolist(),
        "rendezvous": f"file://{folder}/rendezvous",
        "checkpoints": [str(each) for each in checkpoints],
        "out": str(folder / "out"),
    }
    path.write_text(json.dumps({**given, **request}), encoding="utf-8")
    script, ranks = Path(__file__).with_name("bridge_rank.py"), range(layout.world_size)
    run_together(
        [[sys.executable, str(script), str(path), str(rank)] for rank in ranks],
        env=[{"OMP_NUM_THREADS": "1"} for _ in ranks],
        timeout=500,
    )
    return folder / "out"


def tensors(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    found: dict[str, Any] = {}
    for path in folder.glob("*.safetensors"):
        arrays = load_file(path)
        assert not found.keys() & arrays.keys(), "a tensor was written by two ranks"
        found |= arrays
    return found


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Mapping[str, Any]]:
    """A checkpoint of each family, tokens [2, 24], and what Hugging Face makes of them by family."""
    import torch

    folder = tmp_path_factory.mktemp("families")
    tokens = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(1))
    for name in bridge_models.FAMILIES:
        bridge_models.write(name, folder / name)
    # A layer of multi-token prediction, which transformers has not.
    bridge_models.change(folder / "glm4_moe", num_nextn_predict_layers=1)
    bridge_models.add(folder / "glm4_moe", "model.layers.2.eh_proj.weight", torch.randn(32, 64))
    return folder, tokens, {name: bridge_models.logits(folder / name, tokens) for name in bridge_models.FAMILIES}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_family_computes_as_hugging_face_and_comes_out_as_it_went_in(
    name: str, written: Any, tmp_path: Path
) -> None:
    import torch

    folder, tokens, made = written
    out = run(tmp_path, [folder / family for family in made], LAYOUTS[name], tokens)
    for family, (logits, gradient) in made.items():
        found = [torch.load(path) for path in (out / family).glob("logits.*")]
        assert found
        for each, _ in found:
            assert float((each - logits).abs().max()) < 1e-5, family
        if gradient is not None and LAYOUTS[name].tp > 1:
            summed = sum(part for _, part in found)
            assert float((summed - gradient).abs().max()) < 1e-5 * float(gradient.abs().max()) + 1e-7, family
        source, exported = tensors(folder / family), tensors(out / family / "export")
        assert exported.keys() == source.keys()
        assert all(torch.equal(exported[key], source[key]) for key in source), family


def test_what_would_be_lost_is_refused_by_name(written: Any, tmp_path: Path) -> None:
    import torch

    folder, tokens, _ = written
    source = tmp_path / "checkpoints"
    experts = "model.layers.1.mlp.experts"

    def spoilt(name: str, family: str = "qwen3_moe", **fields: Any) -> Path:
        shutil.copytree(folder / family, source / name)
        bridge_models.change(source / name, **fields)
        return source / name

    def spoilt_family(name: str) -> Path:
        spoilt(name, "qwen3_moe")
        Model(name).write_config(source / name)
        architecture = {"gemma4_text": "Gemma4ForCausalLM", "glm_moe_dsa": "GlmMoeDsaForCausalLM"}[name]
        bridge_models.change(source / name, dtype="float32", architectures=[architecture])
        return source / name

    nobody = {"architectures": ["NobodyForCausalLM"]}
    want = {
        spoilt("unknown", **nobody): "NobodyForCausalLM is no architecture that megatron-bridge",
        spoilt("quantized", quantization_config={"quant_method": "fp8"}): "its weights are quantized",
        spoilt("square", "gpt_oss", intermediate_size=16): "gpt_oss: hidden_size 32 == 2 * intermediate_size",
        spoilt("scores", "deepseek_v3", norm_topk_prob=False): "deepseek_v3: norm_topk_prob=False",
        spoilt("missing"): "no tensor of the checkpoint makes this parameter",
        spoilt("more"): f"1 of 36 tensors were read by no rank: '{experts}.4.gate_proj.weight'",
        spoilt("lost"): "1 of 36 tensors would not be written once: 'model.norm.bias' 0 times",
        spoilt("taps", "nemotron_h", conv_kernel=3): "nemotron_h: conv_kernel 3 != 4, which Megatron has",
        **{spoilt_family(family): f"{family}: its layers" for family in NOT_ON_CPU},
    }
    bridge_models.drop(source / "missing", f"{experts}.3.down_proj.weight")
    bridge_models.add(source / "more", f"{experts}.4.gate_proj.weight", torch.randn(2, 2))
    run(tmp_path, [], ParallelLayout(), tokens, refused=[str(path) for path in want])
    found = json.loads((tmp_path / "refused.json").read_text())
    for path, words in want.items():
        assert words in found[path.name], path.name
