"""Let SGLang's torch_native attention compute requests of one length together: by itself it takes one at a time.

PyTorch's kernel computes each request's heads by themselves, so that every number is the same, but for the rounding of
float32 on some processors.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

_MOST_TOKENS = 1 << 16
"""Tokens whose keys and values are copied at once."""


def group_native_attention() -> None:
    """Change SGLang's torch_native attention in this process; what is not plain causal attention stays as it is.

    Source: sglang@0.5.20: srt/layers/attention/torch_native_backend.py:TorchNativeAttnBackend
    """
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend as Backend

    Backend._run_sdpa_forward_decode = _or_as_before(_decode, Backend._run_sdpa_forward_decode)
    Backend._run_sdpa_forward_extend = _or_as_before(_extend, Backend._run_sdpa_forward_extend)


def _or_as_before(grouped: Callable[..., torch.Tensor], before: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    def run(self: Any, query: torch.Tensor, output: torch.Tensor, *caches: Any, **options: Any) -> torch.Tensor:
        # The last positional argument is the lengths of an encoder's sequences.
        *own, encoder_lens = caches
        is_plain = encoder_lens is None and query.dtype == own[0].dtype == own[1].dtype
        if not is_plain or options.get("is_cross_attn") or options.get("sliding_window_size") is not None:
            return before(self, query, output, *caches, **options)
        return grouped(query, output, *own, **options)

    return run


def _decode(
    query: torch.Tensor,
    output: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    req_to_token: torch.Tensor,
    requests: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    scaling: float | None,
    enable_gqa: bool,
    causal: bool,
    **_: Any,
) -> torch.Tensor:
    """Attend with one query a request; query, output: [requests, heads, head_dim]."""
    for length, group in _groups(seq_lens.tolist(), lambda length: length):
        at = req_to_token[requests[group], :length]
        found = _attend(query[group].unsqueeze(2), keys[at], values[at], scaling, enable_gqa, causal)
        output[group] = found.squeeze(2)
    return output


def _extend(
    query: torch.Tensor,
    output: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    req_to_token: torch.Tensor,
    requests: torch.Tensor,
    seq_lens: torch.Tensor,
    prefix_lens: torch.Tensor,
    extend_lens: torch.Tensor,
    *,
    scaling: float | None,
    enable_gqa: bool,
    causal: bool,
    **_: Any,
) -> torch.Tensor:
    """Attend with the queries behind each request's prefix; query, output: [tokens, heads, head_dim]."""
    starts = extend_lens.cumsum(0) - extend_lens
    lens = zip(seq_lens.tolist(), prefix_lens.tolist(), strict=True)
    for (length, prefix), group in _groups(lens, lambda lens: lens[0]):
        own = starts[group][:, None] + torch.arange(length - prefix)
        # Causal places are those of the whole sequence; nobody looks at what the prefix's queries give.
        whole = query.new_zeros(len(group), query.shape[1], length, query.shape[2])
        whole[:, :, prefix:] = query[own].movedim(1, 2)
        at = req_to_token[requests[group], :length]
        found = _attend(whole, keys[at], values[at], scaling, enable_gqa, causal)
        output[own] = found[:, :, prefix:].movedim(2, 1)
    return output


def _attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scaling: float | None,
    enable_gqa: bool,
    causal: bool,
) -> torch.Tensor:
    """Attend; query: [requests, heads, tokens, head_dim]; keys, values: [requests, tokens, heads, head_dim]."""
    return scaled_dot_product_attention(
        query,
        keys.movedim(1, 2),
        values.movedim(1, 2),
        enable_gqa=enable_gqa,
        scale=scaling,
        is_causal=causal,
    )


def _groups(keys: Iterable[Any], length_of: Callable[[Any], int]) -> Iterator[tuple[Any, torch.Tensor]]:
    """Yield each key and [requests] int64 those that have it, no more at once than have _MOST_TOKENS tokens."""
    found: dict[Hashable, list[int]] = {}
    for request, key in enumerate(keys):
        found.setdefault(key, []).append(request)
    for key, group in found.items():
        size = max(1, _MOST_TOKENS // max(1, length_of(key)))
        for first in range(0, len(group), size):
            yield key, torch.tensor(group[first : first + size])
