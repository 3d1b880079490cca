"""Which token each router of a real model has at which row, and the experts that it uses there.  python replay_rows.py

The model's layers add nothing to the embeddings, so that the rows of a router's input are those of its tokens.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import megatron_tiny as tiny
import numpy as np
import torch

from r3_adapter.errors import R3Error
from r3_adapter.layout import Packing
from r3_adapter.megatron.attach import attach
from r3_adapter.megatron.layers import moe_routers
from r3_adapter.megatron.replay import ReplayBatch, StepInput, prepare, prepare_step
from r3_adapter.trace import RoutingTrace

SAMPLES, SEQ, LAYER_IDS = 3, tiny.SEQ, [1, 2, 3]
TOKENS = torch.randperm(tiny.VOCAB, generator=torch.Generator().manual_seed(1))[: SAMPLES * SEQ].view(SAMPLES, SEQ)
PACKED = Packing.packed(range(0, (SAMPLES + 1) * SEQ, SEQ))


def make_trace(sample: int) -> RoutingTrace:
    """Return random routes of a sample's tokens."""
    rng = np.random.default_rng(sample)
    ids = np.argsort(rng.random((SEQ, len(LAYER_IDS), tiny.EXPERTS)), axis=2)[..., : tiny.TOPK].astype(np.uint8)
    layers = np.array(LAYER_IDS, np.int32)
    return RoutingTrace(
        ids, TOKENS[sample].numpy().astype(np.int32), np.zeros(SEQ, np.int32), layers, tiny.EXPERTS, ("v",)
    )


TRACES = [make_trace(sample) for sample in range(SAMPLES)]


def build() -> Any:
    """Build the model, and let no layer add anything."""
    model: Any = tiny.build()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "linear_proj" in name or "linear_fc2" in name:
                parameter.zero_()
    return model


@contextmanager
def watched(model: Any) -> Iterator[list[dict[str, Any]]]:
    """Note of each router, in the passes inside, the token of each row and the experts that it uses there."""
    table = torch.nn.functional.normalize(model.embedding.word_embeddings.weight.detach(), dim=1)
    found: list[dict[str, Any]] = []

    def note(_: Any, args: Any, kwargs: Any, output: Any) -> None:
        hidden = args[0].detach().flatten(0, 1)
        tokens = (torch.nn.functional.normalize(hidden, dim=1) @ table.T).argmax(1)
        used = [sorted(row.nonzero().flatten().tolist()) for row in output[1]]
        found.append({"tokens": tokens.tolist(), "used": used})

    hooks = [router.register_forward_hook(note, with_kwargs=True) for _, router in moe_routers(model)]
    yield found
    for hook in hooks:
        hook.remove()


def run(model: Any, input_ids: torch.Tensor, batch: ReplayBatch | None) -> None:
    """Run a forward pass as a loop does."""
    length = input_ids.shape[1]
    mask = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
    arguments = {} if batch is None else batch.model_arguments
    model(input_ids, torch.arange(length).expand_as(input_ids), mask, **arguments)


def refusal(model: Any, input_ids: torch.Tensor, batch: ReplayBatch | None) -> str:
    """Return what a pass raises; nothing if it does not."""
    try:
        run(model, input_ids, batch)
    except R3Error as error:
        return str(error)
    return ""


tiny.start()
said: dict[str, Any] = {"tokens": TOKENS.tolist(), "ids": [trace.topk_ids.tolist() for trace in TRACES]}
model = build()
with watched(model) as said["argument"]:
    run(model, TOKENS, prepare(model, TRACES, TOKENS))
flat = TOKENS.reshape(1, -1)
# The rows of the one are as many as those of the other.
said["sample by sample, as an argument"] = refusal(
    model := build(), TOKENS, prepare(model, TRACES, flat, packing=PACKED)
)
attached = attach([model := build()], backend="patch")
with watched(model) as said["attached"], attached.replaying(prepare_step([model], [StepInput(TRACES, TOKENS)])):
    run(model, TOKENS, None)
try:
    with attached.replaying(prepare_step([model], [StepInput(TRACES, flat, PACKED)])):
        run(model, TOKENS, None)
except R3Error as error:
    said["sample by sample, attached"] = str(error)
print(json.dumps(said))
