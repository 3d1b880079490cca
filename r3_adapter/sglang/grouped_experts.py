"""Let SGLang's experts compute together in bfloat16 on a CPU: by itself it takes one after the other."""

from typing import Any

import torch
from torch.nn.functional import silu

from r3_adapter.grouped_rows import GroupedRows


def group_native_experts() -> None:
    """Change SGLang's experts of a CPU in this process; other dtypes, activations and biases stay as they are.

    Source: sglang@0.5.20: srt/layers/moe/fused_moe_native.py:moe_forward_native
    """
    from sglang.srt.layers.moe import fused_moe_native

    before = fused_moe_native.moe_forward_native

    def run(layer: Any, x: torch.Tensor, topk_output: Any, config: Any) -> Any:
        topk_weights, topk_ids, _ = topk_output
        if not len(x) or not _is_plain(layer, x, config):
            return before(layer, x, topk_output, config)
        ids = topk_ids.flatten().long()
        order = ids.argsort()
        rows = GroupedRows(torch.bincount(ids, minlength=layer.num_experts).tolist())
        w13, w2 = (each[rows.experts].transpose(1, 2) for each in (layer.w13_weight, layer.w2_weight))
        gate, up = rows.through(rows.padded(x[order // topk_ids.shape[1]]), w13).chunk(2, dim=1)
        found = torch.empty(len(ids), x.shape[1], dtype=x.dtype)
        found[order] = rows.through(rows.padded(silu(gate) * up), w2)
        weighted = found.view(*topk_ids.shape, -1).type(topk_weights.dtype).mul_(topk_weights.unsqueeze(-1))
        return weighted.sum(dim=1).type(x.dtype)

    fused_moe_native.moe_forward_native = run


def _is_plain(layer: Any, x: torch.Tensor, config: Any) -> bool:
    return (
        x.dtype == torch.bfloat16
        and config.activation == "silu"
        and getattr(config, "gemm1_alpha", None) is None
        and not config.apply_router_weight_on_input
        and all(getattr(layer, name, None) is None for name in ("w13_weight_bias", "w2_weight_bias"))
    )
