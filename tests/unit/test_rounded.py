"""Weights rounded as for a rollout in FP8: what is rounded, by how much, and in which blocks."""

from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from r3_adapter.ray.rounded import fp8_rounded, write_rounded


@settings(deadline=None, max_examples=30)
@given(
    rows=st.integers(1, 300),
    columns=st.integers(1, 300),
    seed=st.integers(0, 99),
    scale=st.sampled_from([1e-6, 1, 1e4]),
)
def test_error_is_that_of_three_bits_below_the_blocks_largest(rows: int, columns: int, seed: int, scale: float) -> None:
    """Whatever a block's range, a normal number of e4m3 is off by a sixteenth at most; bfloat16 adds its own."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * scale
    found = fp8_rounded(weight)
    assert found.shape == weight.shape and found.dtype == torch.bfloat16
    largest = torch.stack([part.abs().max() for block in weight.split(128) for part in block.split(128, 1)]).max()
    error = (found.float() - weight).abs()
    assert torch.all(error <= weight.abs() * (1 / 16 + 1 / 256) + largest / 448 / 512)


def test_a_block_has_a_scale_of_its_own() -> None:
    """What is far too small for a scale of the whole matrix keeps its digits in another block."""
    weight = torch.ones(256, 256)
    weight[128:, 128:] = 1e-6
    assert torch.equal(fp8_rounded(weight), weight.bfloat16())
    weight[0, 0] = 1e9
    assert fp8_rounded(weight)[1, 1] == 0 and torch.equal(fp8_rounded(weight)[:, 128:], weight[:, 128:].bfloat16())
    assert torch.equal(fp8_rounded(torch.zeros(3, 5)), torch.zeros(3, 5, dtype=torch.bfloat16))


def test_checkpoint_keeps_all_but_its_linear_weights(tmp_path: Path) -> None:
    """Routers, norms, embeddings and the head are as trained; a folder that is there is replaced."""
    layer = "model.layers.0"
    linear = [f"{layer}.self_attn.q_proj.weight", f"{layer}.mlp.experts.0.down_proj.weight"]
    kept = [
        "model.embed_tokens.weight",
        "lm_head.weight",
        f"{layer}.mlp.gate.weight",
        f"{layer}.input_layernorm.weight",
    ]
    before = {name: torch.randn(16) if "norm" in name else torch.randn(16, 8) for name in (*linear, *kept)}
    for name in ("from", "to"):
        (tmp_path / name).mkdir()
    save_file(before, tmp_path / "from" / "model.safetensors")
    (tmp_path / "from" / "config.json").write_text("{}")
    for other in ("from/optimizer.0.pt", "to/model-old.safetensors"):
        (tmp_path / other).write_bytes(b"old")
    assert write_rounded(tmp_path / "from", tmp_path / "to") == tmp_path / "to"
    assert sorted(path.name for path in (tmp_path / "to").iterdir()) == ["config.json", "model.safetensors"]
    after = load_file(tmp_path / "to" / "model.safetensors")
    assert all(after[name].dtype == tensor.dtype for name, tensor in before.items())
    assert {name for name in before if not torch.equal(before[name], after[name])} == set(linear)
