"""A micro-batch of verl as `prepare_step` takes it: traces of its samples, and its tokens as the engine packs them.

b: samples of a micro-batch; S: tokens of one; L: decoder layers; K: experts a token; P: layers of `sealed`.
"""

from typing import Any

import torch

from r3_adapter.errors import ReplayError, TraceError
from r3_adapter.frameworks.verl.sealed import unseal
from r3_adapter.layout import Packing
from r3_adapter.megatron.layers import unwrapped
from r3_adapter.megatron.replay_batch import StepInput
from r3_adapter.sglang.moe_config import MoEConfig
from r3_adapter.trace import RoutingTrace

_FP8 = ("e4m3", "hybrid")
"""Recipes for which verl pads samples further."""


def checked_engine(engine: Any) -> None:
    """Refuse what this plug-in does not cut routes for.

    Raises:
        ReplayError: Names the option.
    """
    config = engine.engine_config
    if (mode := config.router_replay.mode) != "disabled":
        raise ReplayError(f"router_replay.mode ({mode!r}) != 'disabled': verl's own replay is on as well")
    if getattr(config, "dynamic_context_parallel", False):
        raise ReplayError("dynamic_context_parallel: micro-batches there have groups of their own")
    if hasattr(engine.model_config.hf_config, "vision_config"):
        raise ReplayError("a model with a vision tower packs its tokens itself: their order is not known here")


def step_input(engine: Any, batch: Any, moe: MoEConfig, place: str) -> StepInput:
    """Return the traces of a micro-batch, and its tokens on this rank.

    batch: with `input_ids` and `routed_experts`, nested [b, S] and [b, S, L + P, K].

    Raises:
        R3Error: Routes that are missing, or not of these tokens; names micro-batch, sample and position.

    Source: verl/models/mcore/model_forward.py@0.9.1:gptmodel_forward_model_engine
    """
    from verl.models.mcore.util import preprocess_bshd_engine, preprocess_thd_engine
    from verl.utils import tensordict_utils
    from verl.utils.device import get_device_id

    traces = batch_traces(batch, moe, place)
    config, model = engine.engine_config, unwrapped(engine.module[0])
    fp8 = model.config.fp8 in _FP8
    input_ids = batch["input_ids"].to(get_device_id())
    if not config.use_remove_padding:
        longest = tensordict_utils.get_non_tensor_data(batch, key="forced_max_seqlen", default=None)
        tokens, *_ = preprocess_bshd_engine(input_ids, use_fp8_padding=fp8, forced_max_seqlen=longest)
        return StepInput(traces, tokens)
    layout = engine._get_context_parallel_layout(model)
    bucket = config.pad_to_length_bucket if config.pad_to_length else None
    tokens, packed, _ = preprocess_thd_engine(
        input_ids, use_fp8_padding=fp8, pad_to_length_bucket=bucket, cp_layout=layout
    )
    return StepInput(traces, tokens, Packing.packed(packed.cu_seqlens_q_padded.tolist(), cp_cut=layout))


def batch_traces(batch: Any, moe: MoEConfig, place: str) -> list[RoutingTrace]:
    """Return the trace of each sample of a micro-batch.

    Raises:
        ReplayError: No routes, or not one row for each token.
        TraceError: Routes that are not of these tokens or of this model.
    """
    routes, input_ids = batch.get("routed_experts", None), batch["input_ids"]
    if routes is None:
        raise ReplayError(
            f"{place}: no routed_experts in the batch: the rollout gave none, or they were lost on their way"
        )
    for name, each in (("routed_experts", routes), ("input_ids", input_ids)):
        if not isinstance(each, torch.Tensor) or not each.is_nested:
            raise ReplayError(f"{place}: {name}: not a nested tensor, as a batch without padding has")
    rows, tokens = (each.offsets().diff().tolist() for each in (routes, input_ids))
    if rows != tokens:
        sample = next(index for index, pair in enumerate(zip(rows, tokens, strict=False)) if pair[0] != pair[1])
        raise TraceError(f"{place}, sample {sample}: {rows[sample]} rows != {tokens[sample]} tokens")
    parts = zip(routes.values().cpu().split(rows), input_ids.values().cpu().split(tokens), strict=True)
    return [unseal(own.numpy(), fed.numpy(), moe, f"{place}, sample {index}") for index, (own, fed) in enumerate(parts)]
