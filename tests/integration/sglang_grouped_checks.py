"""What SGLang computes request by request and expert by expert on a CPU is the same when it is grouped."""

from types import SimpleNamespace
from typing import Any

import pytest

from r3_adapter.sglang import cpu
from r3_adapter.sglang.grouped_attention import group_native_attention
from r3_adapter.sglang.grouped_experts import group_native_experts

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.skipif(cpu.has_gpu(), reason="a GPU has kernels of its own"),
    # Of torch's own at import.
    pytest.mark.filterwarnings("ignore"),
]

HEADS, GROUPS, WIDTH, ROOM = 4, 2, 16, 512
LENGTHS, PREFIXES = [13, 40, 13, 7, 40, 13], [0, 8, 0, 0, 39, 12]


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Any:
    cpu.enable_cpu()
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    for name in ("_run_sdpa_forward_decode", "_run_sdpa_forward_extend"):
        monkeypatch.setattr(TorchNativeAttnBackend, name, getattr(TorchNativeAttnBackend, name))
    return TorchNativeAttnBackend


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("stage", ["decode", "extend"])
def test_attention_of_requests_of_all_lengths(backend: Any, stage: str, dtype: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    own = [length - prefix for length, prefix in zip(LENGTHS, PREFIXES, strict=True)]
    num_queries = len(LENGTHS) if stage == "decode" else sum(own)
    query = torch.randn(num_queries, HEADS, WIDTH, generator=generator).to(dtype)
    caches = [torch.randn(ROOM, GROUPS, WIDTH, generator=generator).to(dtype) for _ in range(2)]
    slots = torch.randint(ROOM, (9, max(LENGTHS)), generator=generator)
    lens = [torch.tensor(LENGTHS)] + ([torch.tensor(PREFIXES), torch.tensor(own)] if stage == "extend" else [])
    arguments = [*caches, slots, torch.tensor([8, 0, 3, 1, 7, 2]), *lens, None]
    found = []
    for group in (lambda: None, group_native_attention):
        group()
        run = getattr(backend, f"_run_sdpa_forward_{stage}")
        options = {"scaling": 0.25, "enable_gqa": True, "causal": stage == "extend"}
        found.append(run(None, query, torch.empty_like(query), *arguments, **options))
    assert run.__qualname__.startswith("_or_as_before")
    # Not always the same bits: some processors' kernels add a product up in another order where it is one of a batch.
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_experts_with_few_tokens_many_and_none(backend: Any, monkeypatch: pytest.MonkeyPatch, dtype: Any) -> None:
    from sglang.srt.layers.moe import fused_moe_native

    monkeypatch.setattr(fused_moe_native, "moe_forward_native", fused_moe_native.moe_forward_native)
    generator = torch.Generator().manual_seed(0)
    ids = (torch.rand(90, 16, generator=generator) * torch.arange(16)).topk(4).indices
    weights = torch.rand(90, 4, generator=generator)
    layer = SimpleNamespace(
        num_experts=16,
        w13_weight=torch.randn(16, 48, 32, generator=generator).to(dtype),
        w2_weight=torch.randn(16, 32, 24, generator=generator).to(dtype),
    )
    config = SimpleNamespace(
        activation="silu", gemm1_alpha=None, gemm1_clamp_limit=None, apply_router_weight_on_input=False
    )
    x = torch.randn(90, 32, generator=generator).to(dtype)
    monkeypatch.setattr("sglang.srt.layers.activation.SiluAndMul.__init__", torch.nn.Module.__init__)
    monkeypatch.setattr("sglang.srt.layers.activation.SiluAndMul.forward", lambda self, x: self.forward_native(x))
    found = []
    for group in (lambda: None, group_native_experts):
        group()
        found.append(fused_moe_native.moe_forward_native(layer, x, (weights, ids, None), config))
    assert 0 in torch.bincount(ids.flatten(), minlength=16)
    if dtype == torch.float32 or torch.cpu._is_avx512_bf16_supported():
        assert torch.equal(*found)
    else:
        torch.testing.assert_close(*found)
