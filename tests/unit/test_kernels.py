"""Kernels in plain torch: the formula that they stand for, and packed sequences as each alone."""

from itertools import pairwise
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from torch.nn.functional import silu, softplus  # noqa: E402

from r3_adapter.megatron import kernels  # noqa: E402

HEADS, WIDTH, GROUPS, STATE, TAPS = 4, 3, 2, 5, 4
BOUNDS = [0, 1, 8, 8, 10, 17]


def drawn(*shape: int, seed: int) -> Any:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mamba(tokens: Any, seq_idx: Any = None) -> Any:
    channels = HEADS * WIDTH + 2 * GROUPS * STATE
    return kernels.mamba_split_conv1d_scan_combined(
        tokens,
        drawn(channels, TAPS, seed=1),
        drawn(channels, seed=2),
        drawn(HEADS, seed=3),
        -drawn(HEADS, seed=4).exp(),
        drawn(HEADS, seed=5),
        headdim=WIDTH,
        ngroups=GROUPS,
        seq_idx=seq_idx,
        chunk_size=128,
        activation="silu",
    )


def inputs(length: int, batch: int = 1) -> Any:
    return drawn(batch, length, 2 * HEADS * WIDTH + 2 * GROUPS * STATE + HEADS, seed=6)


def test_the_scan_is_the_sum_over_all_tokens_before() -> None:
    tokens = inputs(9, batch=2)
    inner, states = HEADS * WIDTH, GROUPS * STATE
    gate, x, b, c, step = tokens.split([inner, inner, states, states, HEADS], dim=-1)
    weight, bias = drawn(inner + 2 * states, TAPS, seed=1), drawn(inner + 2 * states, seed=2)
    padded = torch.nn.functional.pad(torch.cat([x, b, c], dim=-1).transpose(1, 2), (TAPS - 1, 0))
    mixed = silu(torch.nn.functional.conv1d(padded, weight[:, None], bias, groups=len(bias))).transpose(1, 2)
    x, b, c = mixed.split([inner, states, states], dim=-1)
    step, decay = softplus(step + drawn(HEADS, seed=3)), -drawn(HEADS, seed=4).exp()
    want = torch.zeros(2, 9, HEADS, WIDTH)
    for head in range(HEADS):
        of_group = slice(head // 2 * STATE, (head // 2 + 1) * STATE)
        own = x[..., head * WIDTH : (head + 1) * WIDTH]
        for at in range(9):
            want[:, at, head] = drawn(HEADS, seed=5)[head] * own[:, at]
            for before in range(at + 1):
                left = torch.exp(decay[head] * step[:, before + 1 : at + 1, head].sum(1)) * step[:, before, head]
                alike = (c[:, at, of_group] * b[:, before, of_group]).sum(-1)
                want[:, at, head] += (left * alike)[:, None] * own[:, before]
    torch.testing.assert_close(mamba(tokens), want.flatten(2) * silu(gate), rtol=1e-4, atol=1e-5)


def test_sequences_of_a_packed_batch_are_each_as_alone() -> None:
    tokens, sequences = inputs(BOUNDS[-1]), list(pairwise(BOUNDS))
    numbers = torch.repeat_interleave(torch.arange(len(sequences)), torch.tensor(BOUNDS).diff())[None]
    alone = [mamba(tokens[:, start:stop]) for start, stop in sequences if start < stop]
    torch.testing.assert_close(mamba(tokens, numbers), torch.cat(alone, dim=1))
    assert not torch.allclose(mamba(tokens), torch.cat(alone, dim=1), atol=1e-2)
    x, weight = drawn(1, BOUNDS[-1], 6, seed=7), drawn(6, TAPS, seed=8)
    packed, none = kernels.causal_conv1d(x, weight, cu_seqlens=torch.tensor(BOUNDS), activation="silu")
    parts = [kernels.causal_conv1d(x[:, start:stop], weight)[0] for start, stop in sequences if start < stop]
    torch.testing.assert_close(packed, torch.cat(parts, dim=1))
    assert none is None


def test_a_delta_rule_starts_anew_with_each_packed_sequence() -> None:
    def rule(q: Any, k: Any, v: Any, *, g: Any, beta: Any, scale: float) -> tuple[Any, None]:
        return scale * (q + k + v + g[..., None] + beta[..., None]).cumsum(1), None

    q, k, v = (drawn(1, BOUNDS[-1], HEADS, WIDTH, seed=seed) for seed in range(3))
    g, beta = (drawn(1, BOUNDS[-1], HEADS, seed=seed) for seed in range(3, 5))
    found, _ = kernels.by_sequence(rule)(q, k, v, g=g, beta=beta, cu_seqlens=torch.tensor(BOUNDS), scale=2.0)
    for start, stop in pairwise(BOUNDS):
        own = [each[:, start:stop] for each in (q, k, v, g, beta)]
        want = rule(*own[:3], g=own[3], beta=own[4], scale=2.0)[0]
        torch.testing.assert_close(found[:, start:stop], want)
    whole, _ = kernels.by_sequence(rule)(q, k, v, g=g, beta=beta, scale=2.0)
    assert torch.equal(whole, rule(q, k, v, g=g, beta=beta, scale=2.0)[0])


def test_norms_are_those_of_their_formulas() -> None:
    x = drawn(3, 12, seed=9)
    centered = kernels.ZeroCenteredRMSNorm(12, eps=1e-6)
    plain = torch.nn.functional.rms_norm(x, (12,), eps=1e-6)
    torch.testing.assert_close(centered(x), plain)
    centered.weight.data.fill_(0.5)
    torch.testing.assert_close(centered(x), 1.5 * plain)
    grouped = kernels.GroupedRMSNorm(12, eps=1e-6, group_size=4, dtype=torch.float32)
    want = torch.nn.functional.rms_norm(x.unflatten(-1, (3, 4)), (4,), eps=1e-6).flatten(-2)
    torch.testing.assert_close(grouped(x), want)
