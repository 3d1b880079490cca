"""Kernels of other packages on a GPU compute what ours in plain torch do, packed sequences too."""

from typing import Any

import pytest

torch = pytest.importorskip("torch")
from r3_adapter.megatron import kernels  # noqa: E402
from r3_adapter.sglang.cpu import has_gpu  # noqa: E402

pytestmark = [pytest.mark.megatron, pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]

BOUNDS = [0, 70, 71, 135, 256]
HEADS, WIDTH, GROUPS, STATE, TAPS = 4, 64, 2, 64, 4


def drawn(*shape: int, seed: int) -> Any:
    found = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return found.to("cuda" if has_gpu() else "cpu")


def agree(found: Any, want: Any) -> None:
    """Kernels multiply in TF32."""
    assert torch.nn.functional.cosine_similarity(found.flatten(), want.flatten(), dim=0) > 0.9999
    assert float((found - want).abs().max()) < 2e-2 * float(want.abs().max())


def test_mamba_is_mamba_ssm() -> None:
    theirs = kernels.mamba_split_conv1d_scan_combined
    if has_gpu():
        from mamba_ssm.ops.triton.ssd_combined import mamba_split_conv1d_scan_combined as theirs
    channels = HEADS * WIDTH + 2 * GROUPS * STATE
    numbers = torch.repeat_interleave(torch.arange(len(BOUNDS) - 1), torch.tensor(BOUNDS).diff())[None]
    numbers = numbers.to(device="cuda" if has_gpu() else "cpu", dtype=torch.int32)
    given = (
        drawn(1, BOUNDS[-1], 2 * HEADS * WIDTH + 2 * GROUPS * STATE + HEADS, seed=0),
        drawn(channels, TAPS, seed=1),
        drawn(channels, seed=2),
        drawn(HEADS, seed=3),
        -drawn(HEADS, seed=4).exp(),
    )
    words = {"headdim": WIDTH, "ngroups": GROUPS, "seq_idx": numbers, "chunk_size": 64, "norm_before_gate": False}
    agree(
        theirs(*given, D=drawn(HEADS, seed=5), activation="silu", **words),
        kernels.mamba_split_conv1d_scan_combined(*given, D=drawn(HEADS, seed=5), **words),
    )


def test_a_gated_delta_net_is_flash_linear_attention() -> None:
    common = pytest.importorskip("megatron.core.ssm.gated_delta_net.common")
    ours = kernels.by_sequence(common.torch_chunk_gated_delta_rule)
    # In a rehearsal ours stand for themselves.
    convolution, norm, theirs = kernels.causal_conv1d, kernels.l2norm, ours
    if has_gpu():
        convolution, norm, theirs = common.causal_conv1d, common.l2norm, common.chunk_gated_delta_rule
    bounds = torch.tensor(BOUNDS, dtype=torch.int32, device="cuda" if has_gpu() else "cpu")
    x, weight = drawn(1, BOUNDS[-1], 2 * HEADS * WIDTH, seed=0), drawn(2 * HEADS * WIDTH, TAPS, seed=1)
    packed = {"bias": None, "activation": "silu", "cu_seqlens": bounds}
    agree(convolution(x=x, weight=weight, **packed)[0], kernels.causal_conv1d(x=x, weight=weight, **packed)[0])
    q, k, v = (drawn(1, BOUNDS[-1], HEADS, WIDTH, seed=seed) for seed in (2, 3, 4))
    q, k = norm(q), norm(k)
    agree(k, kernels.l2norm(drawn(1, BOUNDS[-1], HEADS, WIDTH, seed=3)))
    g, beta = -drawn(1, BOUNDS[-1], HEADS, seed=5).exp(), drawn(1, BOUNDS[-1], HEADS, seed=6).sigmoid()
    words = {"g": g, "beta": beta, "initial_state": None, "output_final_state": False, "cu_seqlens": bounds}
    agree(theirs(q, k, v, **words)[0], ours(q, k, v, **words)[0])
