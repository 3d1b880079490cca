"""Dense layers, and rows without a route; the rollout is Hugging Face's, as SGLang takes all layers for MoE layers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from r3_adapter.layout import ParallelLayout, QkvFormat
from r3_adapter.megatron.policy_trainer.options import PASSES, TrainerOptions
from r3_adapter.proof.damage import damage
from r3_adapter.proof.scoring import score
from r3_adapter.proof.verdict import judge
from r3_adapter.rollout import Sample
from r3_adapter.trace import RoutingTrace

pytestmark = [pytest.mark.engine, pytest.mark.megatron]

VOCAB, EXPERTS, TOPK, LAYERS = 256, 8, 2, 6
DENSE = {"first layers": [0, 1], "a pattern": [1, 2, 4]}


def _model(folder: Path, dense: list[int]) -> Any:
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256}
    experts = {"num_experts": EXPERTS, "num_experts_per_tok": TOPK, "moe_intermediate_size": 32}
    more = {"norm_topk_prob": True, "mlp_only_layers": dense, "initializer_range": 0.2, "dtype": torch.float32}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **heads, **experts, **more)).eval()
    model.save_pretrained(folder)
    return model


def _roll_out(model: Any, moe_layers: list[int], unrecorded: range = range(0)) -> list[Sample]:
    """Score random tokens with a fifth of the rows perturbed, and record what was used.

    unrecorded: positions that are not perturbed and not recorded, like a tool's output that no engine has computed.
    """
    import torch

    generator, used = torch.Generator().manual_seed(0), list[torch.Tensor]()

    def route(module: Any, args: Any, output: Any) -> Any:
        probs, ids = output[0].softmax(dim=-1), output[2].clone()
        chosen = torch.rand(len(ids), generator=generator) < 0.2
        chosen[list(unrecorded)] = False
        ids[chosen] = torch.rand(len(ids), EXPERTS, generator=generator).argsort(dim=1)[chosen, :TOPK]
        used.append(ids)
        weights = probs.gather(1, ids)
        return output[0], weights / weights.sum(dim=-1, keepdim=True), ids

    for layer in moe_layers:
        model.model.layers[layer].mlp.gate.register_forward_hook(route)
    rng, samples = np.random.default_rng(0), []
    for length in (12, 31, 7, 24):
        tokens = rng.integers(0, VOCAB, length)
        used.clear()
        with torch.no_grad():
            logprobs = model(torch.from_numpy(tokens)[None]).logits[0].log_softmax(dim=-1).numpy()
        topk_ids = torch.stack(used, dim=1).numpy().astype(np.uint8)
        missing = [*unrecorded, length - 1]
        topk_ids[missing] = 0
        versions = np.zeros(length, np.int32)
        versions[missing] = -1
        layer_ids = np.array(moe_layers, np.int32)
        trace = RoutingTrace(topk_ids, tokens.astype(np.int32), versions, layer_ids, EXPERTS, ("first",))
        samples.append(Sample(trace, 4, logprobs[np.arange(3, length - 1), tokens[4:]]))
    return samples


@pytest.mark.parametrize("dense", DENSE.values(), ids=DENSE)
def test_routes_find_the_moe_layers_among_dense_ones(tmp_path: Path, dense: list[int]) -> None:
    samples = _roll_out(_model(tmp_path, dense), [layer for layer in range(LAYERS) if layer not in dense])
    layout, options = ParallelLayout.smallest(pp=2), TrainerOptions(recompute="full")
    scores = score(tmp_path, samples, layout, options, passes=PASSES)
    assert judge(samples, scores, layout, options).failures == []
    assert list(scores["replay"].layers) == samples[0].trace.layer_ids.tolist()


@pytest.mark.parametrize("qkv_format", ["sbhd", "thd"])
def test_rows_without_a_route_between_others_are_routed_live(tmp_path: Path, qkv_format: QkvFormat) -> None:
    """Routed to any other experts, or their neighbours live too, they would move the tokens after them."""
    tool = range(2, 6)
    samples = _roll_out(_model(tmp_path, []), list(range(LAYERS)), unrecorded=tool)
    layout, options = ParallelLayout.smallest(ep=2), TrainerOptions(qkv_format=qkv_format)
    scores = score(tmp_path, samples, layout, options, passes=PASSES)
    verdict = judge(samples, scores, layout, options)
    assert verdict.failures == []
    assert verdict.routes_expected == sum(LAYERS * (s.trace.num_tokens - 1 - len(tool)) for s in samples)


def test_swapped_layers_are_noticed(tmp_path: Path) -> None:
    dense = DENSE["a pattern"]
    samples = _roll_out(_model(tmp_path, dense), [layer for layer in range(LAYERS) if layer not in dense])
    damaged = damage(samples, "swap-layers")
    scores = score(tmp_path, damaged, ParallelLayout(), passes=PASSES)
    assert judge(damaged, scores, ParallelLayout()).max_abs_dlogp_replay > 1e-2
