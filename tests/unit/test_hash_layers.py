"""Layers whose experts follow from the token id: what is filled in is what routers of SGLang and transformers do."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from r3_adapter.errors import CaptureError, TraceError
from r3_adapter.hash_layers import HashTables
from r3_adapter.sglang.capture import check_computations
from r3_adapter.sglang.computation import Computation
from r3_adapter.sglang.moe_config import MoEConfig
from r3_adapter.trace import NOT_CAPTURED, RoutingTrace

VOCAB, EXPERTS, TOPK, TOKENS = 64, 16, 3, 9
HASHED, CAPTURED = (0, 1), (2, 4)


def table(seed: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).permuted(np.tile(np.arange(EXPERTS), (VOCAB, 1)), axis=1)[:, :TOPK]


TABLES = HashTables({layer: table(layer) for layer in HASHED}, "model")


def captured() -> RoutingTrace:
    """Routes of the layers that route, of which the last token and one in between have none."""
    rng = np.random.default_rng(3)
    topk_ids = rng.permuted(np.tile(np.arange(EXPERTS, dtype=np.uint8), (TOKENS, len(CAPTURED), 1)), axis=2)[..., :TOPK]
    version_ids = np.zeros(TOKENS, np.int32)
    version_ids[[4, -1]] = NOT_CAPTURED
    topk_ids[version_ids < 0] = 0
    layers, tokens = np.array(CAPTURED, np.int32), rng.integers(0, VOCAB, TOKENS).astype(np.int32)
    return RoutingTrace(topk_ids.copy(), tokens, version_ids, layers, EXPERTS, ("w",))


def test_experts_of_the_tokens_are_filled_in() -> None:
    trace = captured()
    found = TABLES.fill(trace)
    assert found.layer_ids.tolist() == [0, 1, 2, 4]
    assert np.array_equal(found.topk_ids[:, 2:], trace.topk_ids)
    assert np.array_equal(found.version_ids, trace.version_ids)
    for at, layer in enumerate(HASHED):
        want = np.where(trace.captured[:, None], TABLES.tables[layer][trace.token_ids], 0)
        assert np.array_equal(found.topk_ids[:, at], want)
    # Once more changes nothing, and a row that is not its token's is found.
    assert np.array_equal(TABLES.fill(found).topk_ids, found.topk_ids)
    wrong = found.topk_ids.copy()
    wrong[[5, 6], 1] = wrong[[6, 5], 1]
    with pytest.raises(TraceError, match=r"model: layer 1: experts .* at token 5 != .* of token id \d+ in the table"):
        TABLES.fill(replace(found, topk_ids=wrong))


@pytest.mark.parametrize(
    ("tables", "said"),
    [
        ({0: table(0)[:, :2]}, r"layer 0: table of experts: int64 \[64, 2\] != integers \[vocabulary, 3\]"),
        ({0: table(0)[:5]}, r"layer 0: table of experts: token id \d+ outside 0 to 4"),
        ({0: table(0) + EXPERTS}, r"expert \d+ of token id \d+ outside 0 to 15"),
        ({0: np.zeros_like(table(0))}, "model: experts of token ids: topk_ids at token 0, layer 0: .* distinct ids"),
        ({0: table(0).astype(np.float32)}, "layer 0: table of experts: float32"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(tables: dict[int, Any], said: str) -> None:
    with pytest.raises(TraceError, match=said):
        HashTables(tables, "model").fill(captured())


def test_replies_are_held_against_the_layers_that_are_captured() -> None:
    moe = MoEConfig(EXPERTS, TOPK, (*HASHED, *CAPTURED), 5, HASHED)
    assert moe.captured_layer_ids == CAPTURED
    trace = captured().rows(5, TOKENS)
    computation = Computation(trace, 0, 1, trace.num_tokens, "c")
    tokens = trace.token_ids.tolist()
    check_computations([computation], tokens, 1, moe=moe, place="reply")
    with pytest.raises(CaptureError, match=r"layer_ids \[2, 4\] != \[0, 1, 2, 4\] of the model"):
        check_computations([computation], tokens, 1, moe=replace(moe, hash_layer_ids=()), place="reply")


ROUTER = """
import json, sys
from r3_adapter.sglang.cpu import enable_cpu
enable_cpu()
import inspect
import torch
from sglang.srt.layers.moe.hash_topk import HashTopK
table, tokens, experts = json.load(sys.stdin)
found = []
known = "num_fused_shared_experts" in inspect.signature(HashTopK).parameters
for shared in (0, 1) if known else (0,):
    more = {"num_fused_shared_experts": 0} if known else {}
    router = HashTopK(topk=len(table[0]), num_experts=experts, vocab_size=len(table), **more)
    if shared:
        # Made with one it asks the engine's settings.
        router.num_fused_shared_experts, router.topk = shared, router.topk + shared
    router.tid2eid.copy_(torch.tensor(table))
    _, ids = router._forward_torch(torch.randn(len(tokens), experts), torch.tensor(tokens))
    found.append(ids.tolist())
print(json.dumps(found))
"""


@pytest.mark.engine
def test_the_engine_s_own_router_takes_the_same_experts() -> None:
    pytest.importorskip("torch")
    trace = captured()
    request = json.dumps([TABLES.tables[0].tolist(), trace.token_ids.tolist(), EXPERTS])
    run = subprocess.run([sys.executable, "-c", ROUTER], input=request, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    want = TABLES.fill(trace).topk_ids[trace.captured, 0]
    for ids in json.loads(run.stdout.splitlines()[-1]):
        # Fused shared experts come behind the routed ones.
        assert np.array_equal(np.array(ids)[trace.captured, :TOPK], want)


def test_transformers_deepseek_v4_takes_the_same_experts(tmp_path: Path) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from r3_adapter.proof.hf_rollout import Request, hf_rollout

    config = transformers.DeepseekV4Config(
        **{"vocab_size": VOCAB, "hidden_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 3},
        **{"num_attention_heads": 4, "head_dim": 32, "qk_rope_head_dim": 8, "q_lora_rank": 32, "o_groups": 2},
        **{"o_lora_rank": 16, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 8, "n_routed_experts": EXPERTS},
        **{"num_experts_per_tok": TOPK, "mlp_layer_types": ["hash_moe", "hash_moe", "moe"], "initializer_range": 0.2},
        **{"layer_types": ["heavily_compressed_attention"] * 3, "bos_token_id": 0, "eos_token_id": 1},
    )
    torch.manual_seed(0)
    model = transformers.DeepseekV4ForCausalLM(config).float()
    for name, buffer in model.named_buffers():
        if name.endswith("tid2eid"):
            buffer.copy_(torch.from_numpy(table(int(name.split(".")[2]))))
    model.save_pretrained(tmp_path)
    moe = MoEConfig.from_checkpoint(tmp_path)
    assert moe == MoEConfig(EXPERTS, TOPK, (0, 1, 2), 3, (0, 1))
    rng = np.random.default_rng(0)
    samples = hf_rollout(tmp_path, [Request(rng.integers(2, VOCAB, 7).tolist(), 6) for _ in range(3)], seed=0)
    tables = HashTables.from_checkpoint(tmp_path)
    assert tables.tables.keys() == set(HASHED)
    for sample in samples:
        whole = sample.trace
        found = tables.fill(whole.at_layers(moe.captured_layer_ids))
        assert found.layer_ids.tolist() == whole.layer_ids.tolist()
        assert np.array_equal(np.sort(found.topk_ids), np.sort(whole.topk_ids))
