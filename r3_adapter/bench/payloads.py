"""What a payload of captured routes takes to make, and its way through shared memory: parts of `r3 bench capture`."""

import statistics
import tempfile
import time
from array import array
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from r3_adapter.proof.tiny import TinyModel
from r3_adapter.sglang.capture import trace_from_reply
from r3_adapter.sglang.shared import fetch_payload
from r3_adapter.watchdog import MEMORY

LONG = 8192


def time_payload(model: TinyModel, rounds: int = 30) -> dict[str, float]:
    """Time the payload of a long request against SGLang's gather of the same rows."""
    from sglang.srt.state_capturer.base import BaseTopkCapturer
    from sglang.srt.state_capturer.routed_experts_safetensors import routed_experts_to_safetensors
    from sglang.srt.state_capturer.routed_experts_work import HostCopy

    patched, native, pool = _captured(model, LONG)
    slots = HostCopy(pool.req_to_token[0, : LONG - 1])
    tokens, seconds = array("q", [7] * LONG), dict[str, list[float]](patched=[], native=[])
    makers: dict[str, Callable[[], object]] = {
        "patched": lambda: routed_experts_to_safetensors(patched, slots, tokens),
        "native": lambda: BaseTopkCapturer.get_topk(native, 0, LONG, pool),
    }
    for _ in range(rounds):
        for name, make in makers.items():
            start = time.perf_counter()
            make()
            seconds[name].append(time.perf_counter() - start)
    ratios = [own / other for own, other in zip(seconds["patched"], seconds["native"], strict=True)]
    return {
        "payload_over_native_gather": statistics.median(ratios),
        "seconds_payload": statistics.median(seconds["patched"]),
        "seconds_native_gather": statistics.median(seconds["native"]),
    }


def time_shared_memory(model: TinyModel, requests: int = 1000, num_tokens: int = 2000) -> dict[str, float]:
    """Time the way of captured rows through shared memory: payload, file, mapping, a trace that is checked and kept."""
    from sglang.srt.state_capturer.routed_experts_files import PayloadFolder
    from sglang.srt.state_capturer.routed_experts_safetensors import routed_experts_to_safetensors
    from sglang.srt.state_capturer.routed_experts_work import HostCopy

    patched, _, pool = _captured(model, num_tokens)
    slots = HostCopy(pool.req_to_token[0, : num_tokens - 1])
    tokens = array("q", [i % model.vocab_size for i in range(num_tokens)])
    info, num_bytes = {"finish_reason": {"type": "length"}}, 0
    with tempfile.TemporaryDirectory(dir=MEMORY) as path:
        folder, traces = PayloadFolder(path), []
        start = time.perf_counter()
        for _ in range(requests):
            payload = routed_experts_to_safetensors(patched, slots, tokens)
            num_bytes += payload.numel()
            handle = folder.put(payload).numpy().tobytes()
            reply = {"output_ids": list(tokens[-1:]), "meta_info": {**info, "routed_experts": handle}}
            traces.append(trace_from_reply(fetch_payload(reply, Path(path), "reply"), tokens[:-1]))
        seconds = time.perf_counter() - start
        assert len({trace.digest() for trace in (traces[0], traces[-1])}) == 1
    return {"seconds_shared_memory": seconds, "bytes_shared_memory": num_bytes}


def _captured(model: TinyModel, num_tokens: int) -> tuple[Any, Any, Any]:
    """Return the patched capturer and SGLang's own after a request whose rows lie anywhere, and its pool."""
    import torch
    from sglang.srt.state_capturer.routed_experts_links import ROOT, RowLinks

    num_slots = 2 * num_tokens
    locs, links = torch.randperm(num_slots)[: num_tokens - 1], RowLinks(num_slots)
    links.write(locs, torch.cat([torch.tensor([ROOT]), locs[:-1]]))
    # An odd step makes the ids of a route distinct.
    first, step = torch.randint(model.num_experts, (2, num_slots, model.num_layers, 1))
    rows = (first + (2 * step + 1) * torch.arange(model.topk)) % model.num_experts
    patched, native = (
        SimpleNamespace(host_cache=SimpleNamespace(buffer=rows.to(dtype)), links=links)
        for dtype in (torch.uint8, torch.int32)
    )
    patched.version_ids, patched.version_index = np.zeros(num_slots, dtype=np.int32), {"default": 0}
    patched.layer_ids, patched.num_experts = list(range(model.num_layers)), model.num_experts
    patched.model_shape = {name: getattr(model, name) for name in ("num_layers", "hidden_size", "vocab_size")}
    return patched, native, SimpleNamespace(req_to_token=torch.cat([locs, locs[:1]]).int()[None])
