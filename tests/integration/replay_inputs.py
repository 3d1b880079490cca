"""Use replay wrongly on a real model, and print what each use says, as one JSON object.  python replay_inputs.py"""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import megatron_tiny as tiny
import numpy as np
import torch

from r3_adapter.layout import Packing, ParallelLayout
from r3_adapter.megatron.agreement import agree
from r3_adapter.megatron.layers import moe_routers
from r3_adapter.megatron.replay import StepInput, prepare, prepare_step
from r3_adapter.repack import LastRow
from r3_adapter.trace import ModelId, RoutingTrace

SEQ, BATCH, LAYER_IDS = tiny.SEQ, tiny.BATCH, [1, 2, 3]
said: dict[str, Any] = {}


def attempt(name: str, use: Callable[[], Any]) -> None:
    """Note what a use raises; nothing else may escape."""
    try:
        use()
        said[name] = None
    except Exception as error:
        said[name] = f"{type(error).__name__}: {error}"


def trace(sample: int, layer_ids: list[int], **fields: Any) -> RoutingTrace:
    """Return routes of the sample's tokens, which are 16 * sample and on."""
    rng = np.random.default_rng(sample)
    ids = np.argsort(rng.random((SEQ, len(layer_ids), tiny.EXPERTS)), axis=2)[..., : tiny.TOPK].astype(np.uint8)
    tokens = np.arange(SEQ * sample, SEQ * (sample + 1), dtype=np.int32)
    layers = np.array(layer_ids, np.int32)
    return RoutingTrace(ids, tokens, np.zeros(SEQ, np.int32), layers, tiny.EXPERTS, ("v",), **fields)


attempt("no process group", lambda: prepare(None, [trace(0, [1])], torch.zeros(1, SEQ).long(), layout=ParallelLayout()))  # type: ignore[arg-type]
attempt("agree without one", lambda: agree(""))
tiny.start()
model = tiny.build()
config = dict(moe_routers(model))[1].config
traces = [trace(sample, LAYER_IDS) for sample in range(BATCH)]
tokens = torch.arange(SEQ * BATCH).view(BATCH, SEQ)
two = ParallelLayout(cp=2)


def use(chunk: Any = model, traces: Any = traces, tokens: Any = tokens, **options: Any) -> Callable[[], Any]:
    """Return a call of `prepare`."""
    return lambda: prepare(chunk, traces, tokens, **options)


def check_last_rows(last_row: LastRow, dtype: torch.dtype) -> None:
    """Feed a last token without a route: only a live row makes the batch signed."""
    fed = [without_last_route(each) for each in traces]
    batch = prepare(model, fed, tokens, last_row=last_row)
    assert batch.routed_experts.dtype == dtype
    live, padding = (BATCH, 0) if last_row == "live" else (0, BATCH)
    assert (batch.routes.num_live, batch.routes.num_padding) == (live, padding)


def without_last_route(whole: RoutingTrace) -> RoutingTrace:
    """Return a trace whose last token was sampled and not fed."""
    ids, versions = whole.topk_ids.copy(), whole.version_ids.copy()
    ids[-1], versions[-1] = 0, -1
    return replace(whole, topk_ids=ids, version_ids=versions)


CASES: dict[str, Callable[[], Any]] = {
    "right": use(),
    "packed": use(tokens=tokens.reshape(1, -1), packing=Packing.packed([0, SEQ, 2 * SEQ])),
    "no traces": use(traces=None),
    "one trace": use(traces=traces[0]),
    "bytes": use(traces=[traces[0].to_bytes()]),
    "empty": use(traces=[]),
    "no token": use(tokens=tokens[:, :0]),
    "list of tokens": use(tokens=tokens.tolist()),
    "1-d": use(tokens=tokens.reshape(-1)),
    "1-d packed": use(tokens=tokens.reshape(-1), packing=Packing.packed([0, SEQ, 2 * SEQ])),
    "3-d": use(tokens=tokens[None]),
    "float": use(tokens=tokens.float()),
    "bool": use(tokens=tokens.bool()),
    "device": use(tokens=tokens.to("meta")),
    "transposed": use(tokens=tokens.T),
    "fewer traces": use(traces=traces[:1]),
    "padded for packed": use(packing=Packing.packed([0, SEQ, 2 * SEQ])),
    "packed for padded": use(tokens=tokens.reshape(1, -1), packing=Packing.padded(BATCH, SEQ)),
    "order of rows": use(tokens=tokens.T.reshape(BATCH, SEQ)),
    "last_row": use(last_row="padding"),
    "last row live": lambda: check_last_rows("live", torch.int16),
    "last row balanced": lambda: check_last_rows("balanced", torch.uint16),
    "lengths for packing": use(packing=[0, SEQ, 2 * SEQ]),
    "number for version": use(weight_version=3),
    "another token": use(tokens=tokens + (tokens == 5)),
    "not a model": use(chunk=torch.nn.Linear(1, 1)),
    "list of chunks": use(chunk=[model]),
    "chunk for chunks": lambda: prepare_step(model, [StepInput(traces, tokens)]),
    "no chunks": lambda: prepare_step([], [StepInput(traces, tokens)]),
    "no micro-batches": lambda: prepare_step([model], []),
    "tuple for StepInput": lambda: prepare_step([model], [(traces, tokens)]),  # type: ignore[list-item]
    "StepInput for a list": lambda: prepare_step([model], StepInput(traces, tokens)),  # type: ignore[arg-type]
    "contiguous": use(tokens=tokens[:, : SEQ // 2], layout=two),
    "contiguous stream": use(
        tokens=tokens.reshape(1, -1)[:, :SEQ], packing=Packing.packed([0, SEQ, 2 * SEQ]), layout=two
    ),
    "uncut": use(packing=Packing.padded(BATCH, SEQ), layout=two),
    "deeper": use(traces=[trace(sample, [1, 2, 3, 4, 5]) for sample in range(BATCH)]),
    "dense": use(traces=[trace(sample, [0, 1, 2, 3]) for sample in range(BATCH)]),
    "shallower": use(traces=[trace(sample, [1, 2]) for sample in range(BATCH)]),
    "its model": use(traces=[replace(each, model=ModelId(4, 32, tiny.VOCAB)) for each in traces]),
    "padded vocabulary": use(traces=[replace(each, model=ModelId(4, 32, tiny.VOCAB - 3)) for each in traces]),
    "more layers": use(traces=[traces[0], replace(traces[1], model=ModelId(94, 32, tiny.VOCAB))]),
    "wider": use(traces=[replace(each, model=ModelId(4, 64, tiny.VOCAB)) for each in traces]),
    "larger vocabulary": use(traces=[replace(each, model=ModelId(4, 32, tiny.VOCAB + 1)) for each in traces]),
}
for name, call in CASES.items():
    attempt(name, call)

MOE_LAYER_FREQ: dict[str, Any] = {
    "list": [0, 1, 1, 1],
    "tuple": (0, 1, 1, 1),
    "text": "[0]*1+[1]*3",
    "text of a number": "1",
    "number": 1,
    "short": [0, 1, 1],
    "zero": 0,
    "true": True,
    "twos": [0, 2, 2, 2],
    "code": "__import__('os').getpid()",
    "huge": "[1]*10000000000",
    "deep": "[" * 2000,
    "nothing": None,
}
for name, frequency in MOE_LAYER_FREQ.items():
    vars(config).update(moe_layer_freq=frequency)
    attempt(f"moe_layer_freq, {name}", use())
vars(config).update(moe_layer_freq=[0, 1, 1, 1])
attempt("right after all", use())
print(json.dumps(said))
