"""Kernels that Megatron's layers take from packages for a GPU, in plain torch, for machines without one.

Slow and readable: a step of the recurrence after the other. Layers, their parameters and how these are cut stay
Megatron's own; r3_adapter/megatron/cpu.py puts these in where the package is missing.

B: samples; S: tokens of a sample; H: heads; P: width of a head; G: groups; N: size of the state; D: channels of a
convolution; W: its taps.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch.nn.functional import silu, softplus


class ZeroCenteredRMSNorm(torch.nn.RMSNorm):
    """Root mean square norm whose weight is what it has beyond one."""

    def reset_parameters(self) -> None:
        """Begin as the identity, but for the norm."""
        torch.nn.init.zeros_(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Norm x over its last dimension."""
        return torch.nn.functional.rms_norm(x, self.normalized_shape, self.weight + 1, self.eps)


class GroupedRMSNorm(torch.nn.Module):
    """Root mean square norm of each group of channels; takes the arguments of mamba-ssm's, which also has a gate.

    Source: mamba_ssm/ops/triton/layernorm_gated.py@2.2.6:RMSNorm.
    """

    def __init__(self, hidden_size: int, eps: float, group_size: int, dtype: torch.dtype, **_: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=dtype))
        self.eps, self.group_size = eps, group_size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Norm x, [..., hidden_size]."""
        groups = x.float().reshape(*x.shape[:-1], -1, self.group_size)
        groups = groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + self.eps)
        return (groups.reshape(x.shape) * self.weight).to(x.dtype)


class DuplicatedLinear(torch.nn.Linear):
    """A layer that every tensor-parallel rank has whole; takes the arguments of TransformerEngine's TELinear.

    Source: megatron/core/extensions/transformer_engine.py@0.19.2:TELinear.
    """

    def __init__(self, input_size: int, output_size: int, *, config: Any, init_method: Any, bias: bool, **_: Any):
        super().__init__(input_size, output_size, bias=bias, dtype=config.params_dtype)
        init_method(self.weight)
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> Any:
        """Return the output, and no bias to be added later."""
        return super().forward(x), None


def l2norm(x: torch.Tensor, dim: int = -1, eps: float = 1e-6) -> torch.Tensor:
    """Return x at length one.

    Source: fla/modules/l2norm.py@0.4.1:l2norm.
    """
    return x * torch.rsqrt(x.square().sum(dim, keepdim=True) + eps)


def convolve(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, sequences: Any = None) -> torch.Tensor:
    """Return silu of each channel's causal convolution.

    x: [B, S, D]; weight: [D, W]; bias: [D] or None.
    sequences: [B, S], equal where tokens are of one sequence; None for one a sample. No tap reaches across.
    """
    out = x * weight[:, -1]
    for back in range(1, min(weight.shape[1], x.shape[1])):
        before = x[:, :-back] * weight[:, -1 - back]
        if sequences is not None:
            before = before * (sequences[:, back:] == sequences[:, :-back])[..., None]
        out = out + torch.nn.functional.pad(before, (0, 0, back, 0))
    return silu(out if bias is None else out + bias)


def mamba_split_conv1d_scan_combined(
    zxbcdt: torch.Tensor,
    conv1d_weight: torch.Tensor,
    conv1d_bias: torch.Tensor,
    dt_bias: torch.Tensor,
    A: torch.Tensor,
    D: torch.Tensor,
    *,
    headdim: int,
    ngroups: int,
    seq_idx: torch.Tensor | None = None,
    **_: Any,
) -> torch.Tensor:
    """Return [B, S, H * P] of Mamba-2: convolution, selective scan and gate; takes the arguments of mamba-ssm's.

    zxbcdt: [B, S, gate, x, B and C of each group, step]; dt_bias, A, D: [H].
    seq_idx: [B, S] number of each token's sequence; the state starts anew with each.

    Source: mamba_ssm/ops/triton/ssd_combined.py@2.2.6:mamba_split_conv1d_scan_ref.
    """
    heads = len(A)
    inner, states = heads * headdim, conv1d_weight.shape[0] - heads * headdim
    gate, conv, step = torch.split(zxbcdt, [inner, inner + states, heads], dim=-1)
    conv = convolve(conv, conv1d_weight, conv1d_bias, seq_idx)
    x, b, c = torch.split(conv, [inner, states // 2, states // 2], dim=-1)
    x = x.reshape(*x.shape[:-1], heads, headdim).float()
    b, c = (
        part.reshape(*part.shape[:-1], ngroups, -1).repeat_interleave(heads // ngroups, dim=2).float()
        for part in (b, c)
    )
    step = softplus(step.float() + dt_bias)
    decay, fed = torch.exp(step * A), step[..., None] * x
    if seq_idx is not None:
        decay = decay * torch.nn.functional.pad(seq_idx[:, 1:] == seq_idx[:, :-1], (1, 0))[..., None]
    state, found = torch.zeros_like(fed[:, 0, :, :, None] * b[:, 0, :, None]), []
    for at in range(x.shape[1]):
        state = state * decay[:, at, :, None, None] + fed[:, at, :, :, None] * b[:, at, :, None]
        found.append((state * c[:, at, :, None]).sum(-1))
    out = (torch.stack(found, dim=1) + x * D[:, None]).flatten(2)
    return (out * silu(gate.float())).to(zxbcdt.dtype)


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    cu_seqlens: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Return `convolve`, and no state; takes the arguments of fla's.

    cu_seqlens: [sequences + 1], bounds of the sequences in the one sample.

    Source: fla/modules/convolution.py@0.4.1:causal_conv1d.
    """
    sequences = None
    if cu_seqlens is not None:
        lengths = cu_seqlens.diff()
        sequences = torch.repeat_interleave(torch.arange(len(lengths)), lengths)[None]
    return convolve(x, weight, bias, sequences), None


def by_sequence(rule: Callable[..., tuple[torch.Tensor, Any]]) -> Callable[..., tuple[torch.Tensor, Any]]:
    """Return Megatron's gated delta rule in torch, which knows no packed sequences, for packed ones too.

    The result takes the arguments of fla's chunk_gated_delta_rule.
    """

    def chunk_gated_delta_rule(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        g: torch.Tensor,
        beta: torch.Tensor,
        cu_seqlens: torch.Tensor | None = None,
        **options: Any,
    ) -> tuple[torch.Tensor, Any]:
        if cu_seqlens is None:
            return rule(q, k, v, g=g, beta=beta, **options)
        parts = []
        for start, stop in pairwise(cu_seqlens.tolist()):
            if start < stop:
                own = [each[:, start:stop] for each in (q, k, v, g, beta)]
                parts.append(rule(*own[:3], g=own[3], beta=own[4], **options)[0])
        return torch.cat(parts, dim=1), None

    return chunk_gated_delta_rule
