"""Routes of other model families: those that Hugging Face's own model takes for the same tokens, row for row."""

import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from r3_adapter.processes import run_together
from r3_adapter.proof.tiny import ENGINE
from r3_adapter.rollout import Sample, load_samples
from r3_adapter.sglang.settings import EngineSettings

SPEC = importlib.util.spec_from_file_location("sglang_server", Path(__file__).with_name("sglang_server.py"))
sglang = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(sglang)

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

SIZES = {
    "vocab_size": sglang.VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass(frozen=True)
class Family:
    """A shape, where its MoE layers are, and how a gate's output names the experts."""

    name: str
    config: dict[str, Any]
    layer_ids: tuple[int, ...]
    experts: Callable[[Any, Any], Any]


GLM4 = Family(
    # A dense first layer, a shared expert, sigmoid scores with a bias, experts from two of four groups.
    "Glm4Moe",
    {
        "num_key_value_heads": 2,
        "head_dim": 16,
        "n_routed_experts": 16,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 32,
        "n_shared_experts": 1,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
    },
    (1, 2, 3),
    lambda mlp, logits: mlp.route_tokens_to_experts(logits)[0],
)
OLMOE = Family(
    "Olmoe",
    {"num_key_value_heads": 4, "num_experts": 8, "num_experts_per_tok": 2},
    (0, 1, 2, 3),
    lambda mlp, found: found[2],
)


def write_family(folder: Path, family: Family) -> Path:
    import torch
    import transformers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = getattr(transformers, f"{family.name}Config")(**SIZES, **family.config, dtype=torch.float32)
        model = getattr(transformers, f"{family.name}ForCausalLM")(config)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.1 * torch.randn(buffer.shape))
    model.save_pretrained(folder)
    return folder


RUNS = ((GLM4, "safetensors"), (OLMOE, "safetensors"), (GLM4, "exact-flat"))
Samples = dict[tuple[str, str], tuple[Path, list[Sample]]]


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Samples:
    """Greedy samples of each family, of engines that run side by side."""
    folder = tmp_path_factory.mktemp("families")
    environment = sglang.environment_of(folder)
    prompts = sglang.make_prompts(0, [5, 40, 300])
    commands, environments, found = [], [], {}
    for core, (family, form) in enumerate(RUNS):
        path, name = folder / family.name, f"{family.name}-{form}"
        if not path.exists():
            write_family(path, family)
        settings = EngineSettings(str(path), dtype="float32", radix_cache=True, routed_experts_format=form, **ENGINE)
        params = {"temperature": 0.0, "max_new_tokens": 16, "ignore_eos": True}
        request = {"settings": settings.to_json(), "input_ids": prompts, "sampling_params": params}
        (folder / f"{name}.json").write_text(json.dumps(request), encoding="utf-8")
        commands.append(sglang.worker(folder / f"{name}.json", folder / f"{name}-samples"))
        environments.append(sglang.on_cores(environment, [core]))
        found[family.name, form] = path, folder / f"{name}-samples"
    run_together(commands, env=environments, timeout=sglang.TIMEOUT)
    return {run: (path, load_samples(out)) for run, (path, out) in found.items()}


@pytest.mark.parametrize(("family", "form"), RUNS, ids=lambda of: getattr(of, "name", of))
def test_every_row_is_the_one_of_the_reference(family: Family, form: str, samples: Samples) -> None:
    import torch
    import transformers

    folder, found = samples[family.name, form]
    model = getattr(transformers, f"{family.name}ForCausalLM").from_pretrained(folder, dtype=torch.float32).eval()
    own: dict[int, Any] = {}
    for layer in family.layer_ids:
        mlp = model.model.layers[layer].mlp
        mlp.gate.register_forward_hook(
            lambda gate, args, output, mlp=mlp, layer=layer: own.update({layer: family.experts(mlp, output)})
        )
    for sample in found:
        trace = sample.trace
        assert trace.layer_ids.tolist() == list(family.layer_ids)
        assert trace.captured.tolist() == [True] * (trace.num_tokens - 1) + [False]
        tokens = torch.from_numpy(trace.token_ids.astype(np.int64))[None]
        with torch.no_grad():
            logprobs = model(tokens).logits[0].log_softmax(dim=-1)
        want = np.stack([own[layer].numpy() for layer in family.layer_ids], axis=1)[:-1]
        assert np.array_equal(np.sort(trace.topk_ids[:-1], axis=2), np.sort(want, axis=2))
        first = sample.num_prompt_tokens
        picked = logprobs[first - 1 : -1].gather(1, tokens[0, first:, None])[:, 0].numpy()
        np.testing.assert_allclose(sample.logprobs, picked, atol=sglang.EXACT, rtol=0)
