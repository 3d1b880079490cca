"""Let Megatron's experts compute together in bfloat16 on a CPU: SequentialMLP takes one after the other.

Outputs and gradients are the same bits. On a GPU TransformerEngine does it.
"""

from collections.abc import Sequence
from typing import Any

import torch

from r3_adapter.grouped_rows import GroupedRows

_ODD = (
    "add_bias_linear",
    "use_te_activation_func",
    "bias_activation_fusion",
    "moe_apply_probs_on_input",
    "fp8",
    "fp4",
    "activation_func_clamp_value",
    "glu_linear_offset",
)
"""Fields of a TransformerConfig with which experts compute something else."""


def group_experts(chunks: Sequence[torch.nn.Module]) -> None:
    """Let the experts of model chunks compute together where they are plain; all others stay as they are.

    Source: megatron/core/transformer/moe/experts.py@0.16.1:SequentialMLP; mlp.py:MLP.forward
    """
    from megatron.core import parallel_state as ps
    from megatron.core.transformer.moe.experts import SequentialMLP

    if ps.get_expert_tensor_parallel_world_size() > 1:
        return
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, SequentialMLP) and _is_plain(module):
                module.forward = _Grouped(module)


def _is_plain(experts: Any) -> bool:
    config = experts.config
    return (
        experts.num_local_experts > 1
        and config.params_dtype == torch.bfloat16
        and config.gated_linear_unit
        and not any(getattr(config, name, None) for name in _ODD)
    )


class _Grouped:
    """The forward pass of a SequentialMLP, with its parameters."""

    def __init__(self, experts: Any) -> None:
        self._experts, self._activation = experts.local_experts, experts.config.activation_func

    def __call__(
        self, hidden: torch.Tensor, tokens_per_expert: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        """Compute; hidden: [rows, hidden], one expert after the other; tokens_per_expert: [experts]; probs: [rows]."""
        rows = GroupedRows(tokens_per_expert.tolist())
        gate, up = self._linear(hidden, rows, "linear_fc1").chunk(2, dim=-1)
        between = (self._activation(gate) * up * probs.unsqueeze(-1)).to(hidden.dtype)
        return self._linear(between, rows, "linear_fc2"), None

    def _linear(self, x: torch.Tensor, rows: GroupedRows, name: str) -> torch.Tensor:
        out: torch.Tensor = _Linear.apply(x, rows, *(getattr(each, name).weight for each in self._experts))  # type: ignore[no-untyped-call]
        return out


class _Linear(torch.autograd.Function):
    """x times each expert's weight, transposed; x: [rows, in]; weights: of each expert, [out, in]."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, rows: GroupedRows, *weights: torch.Tensor) -> torch.Tensor:
        if not rows.experts:
            stacked = torch.stack(weights)[:0]
        else:
            stacked = torch.stack([weights[expert] for expert in rows.experts])
        padded = rows.padded(x)
        ctx.save_for_backward(padded, stacked)
        ctx.rows, ctx.num_experts = rows, len(weights)
        return rows.through(padded, stacked.transpose(1, 2))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        padded, stacked = ctx.saved_tensors
        rows, grad = ctx.rows, ctx.rows.padded(grads[0])
        found = dict(zip(rows.experts, rows.products(grad, padded), strict=True))
        nothing = stacked.new_zeros(stacked.shape[1:])
        return rows.through(grad, stacked), None, *(found.get(expert, nothing) for expert in range(ctx.num_experts))
