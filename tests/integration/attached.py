"""Replay through hooks on the model, in loops that know nothing of routes; print what each case says, as JSON.

python attached.py BACKEND
"""

import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import megatron_tiny as tiny
import numpy as np
import torch

from r3_adapter.layout import ParallelLayout
from r3_adapter.megatron.attach import attach, takes_routes
from r3_adapter.megatron.backends import Backend
from r3_adapter.megatron.reach import routed_live
from r3_adapter.megatron.replay import ReplayBatch, StepInput, prepare_step
from r3_adapter.trace import RoutingTrace

BACKEND: Backend = sys.argv[1]  # type: ignore[assignment]
NUM = 3
said, told = tiny.said, tiny.told
tiny.start()


class Wrapper(torch.nn.Module):
    """Hands on what it knows, as data parallelism or a value head of a framework's own does."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, tokens: Any, positions: Any, mask: Any, labels: Any = None) -> Any:
        return self.module(tokens, positions, mask, labels=labels)


class Vision(torch.nn.Module):
    """A model of another kind, with the language model somewhere inside."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.tower, self.language_model = torch.nn.Linear(2, 2), model
        self.config, self.model_type, self.set_input_tensor = model.config, model.model_type, model.set_input_tensor

    def forward(self, tokens: Any, positions: Any, mask: Any, labels: Any = None) -> Any:
        return self.language_model(input_ids=tokens, position_ids=positions, attention_mask=mask, labels=labels)


def inputs(*, live: bool = False) -> list[StepInput]:
    """Return micro-batches with random routes. live: in some rows none was captured."""
    found = []
    for number in range(NUM):
        rng = np.random.default_rng(number)
        tokens = rng.integers(0, tiny.VOCAB, (tiny.BATCH, tiny.SEQ))
        traces = []
        for each in tokens:
            noise = rng.random((tiny.SEQ, tiny.MOE_LAYERS, tiny.EXPERTS))
            ids = np.argsort(noise, axis=2)[..., : tiny.TOPK].astype(np.uint8)
            versions = np.where(rng.random(tiny.SEQ) < 0.2 * live, -1, 0).astype(np.int32)
            ids[versions < 0] = 0
            layers = np.arange(1, 4, dtype=np.int32)
            traces.append(RoutingTrace(ids, each.astype(np.int32), versions, layers, tiny.EXPERTS, ("v",)))
        found.append(StepInput(traces, torch.from_numpy(tokens)))
    return found


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return all gradients by parameter."""
    return {name: each.grad for name, each in model.named_parameters() if each.grad is not None}


def explicit(options: dict[str, Any], micro_batches: list[StepInput]) -> dict[str, torch.Tensor]:
    """Return the gradients of a model that is handed its routes as an argument."""
    model = tiny.build(**options)
    (steps,) = prepare_step([model], micro_batches, layout=ParallelLayout())
    model.register_forward_pre_hook(partial(argued, iter(steps)), with_kwargs=True)
    tiny.loop([model], micro_batches)
    return gradients(model)


def argued(steps: Iterator[ReplayBatch], _: Any, args: Any, kwargs: Any) -> Any:
    """Add the argument, by the caller's own means."""
    return args, {**kwargs, **next(steps).model_arguments}


def state(model: torch.nn.Module) -> list[Any]:
    """Return what attaching changes in a model: hooks, methods of instances, and what routers replay with."""
    return [
        (
            len(each._forward_pre_hooks),
            len(each._forward_hooks),
            sorted(vars(each)),
            vars(each).get("router_replay"),
        )
        for each in model.modules()
    ]


def same_bits(name: str, wrap: Callable[[Any], Any], options: dict[str, Any], live: bool = False) -> None:
    """Compare a loop's gradients through hooks with those of the argument, and say whether the model is left alone."""
    model = tiny.build(**options)
    chunk, micro_batches = wrap(model), inputs(live=live)
    # Megatron, too, leaves attributes in the layers of a model that has been used.
    tiny.loop([chunk], micro_batches, forward_only=True)
    before = state(model)
    if takes_routes(model):
        # What is seen of it then is forgotten.
        prepare_step([model], micro_batches, layout=ParallelLayout())
    attached = attach([chunk], BACKEND)
    # A pass for log-probabilities first, as a loop makes them.
    for forward_only in (True, False):
        steps = prepare_step([chunk], micro_batches, layout=ParallelLayout(), backend=attached.backend)
        with attached.replaying(steps):
            tiny.loop([chunk], micro_batches, forward_only)
    attached.detach()
    found = gradients(model)
    # Without our patches no model takes the argument; then the bits are to be those of one that does.
    want = explicit(options, micro_batches) if takes_routes(model) else found
    equal = {*want} == {*found} and all(torch.equal(want[key], found[key]) for key in want)
    digest = hashlib.sha256(b"".join(found[key].numpy().tobytes() for key in sorted(found))).hexdigest()
    said[name] = [attached.backend, equal, before == state(model), digest]


for recompute, options in tiny.RECOMPUTE.items():
    same_bits(f"recompute {recompute}", lambda model: model, dict(options))
    same_bits(f"recompute {recompute}, live rows", lambda model: model, dict(options), live=True)
same_bits("wrapper that drops the argument", lambda model: Wrapper(Wrapper(model)), {})
same_bits("model of another kind", Vision, {})

# A pass that goes wrong.
model, data = tiny.build(), inputs()
told("two models in a chunk", lambda: attach([torch.nn.ModuleList([model, tiny.build()])], BACKEND))
told("no model", lambda: attach([torch.nn.Linear(1, 1)], BACKEND))
told("no sequence", lambda: attach(model, BACKEND))  # type: ignore[arg-type]
told("a word", lambda: attach([model], "nativ"))  # type: ignore[arg-type]
attached = attach([Wrapper(model)], BACKEND, outside="refuse")
told("attached twice", lambda: attach([model], BACKEND))
other: Backend = "native" if attached.backend == "patch" else "patch"
told("another back end", lambda: prepare_step([model], data, layout=ParallelLayout(), backend=other))
steps = prepare_step([model], data, layout=ParallelLayout(), backend="auto")


def replayed(steps: Any, micro_batches: list[StepInput]) -> None:
    """Run a pass of some micro-batches with the routes of some."""
    with attached.replaying(steps):
        tiny.loop([model], micro_batches)


told("a pass too many", lambda: replayed(steps, [*data, data[0]]))
told("after it", lambda: replayed(steps, data))
told("a pass too few", lambda: replayed(steps, data[:2]))
told("no batch", lambda: replayed([[None]], data))
told("two chunks", lambda: replayed([*steps, *steps], data))


def failing() -> None:
    """Raise inside of a pass, when routes are left over."""
    with attached.replaying(steps):
        tiny.loop([model], data[:1])
        raise KeyError("the loop's own")


def nested() -> None:
    """Open a pass inside of another."""
    with attached.replaying(steps):
        attached.replaying(steps).__enter__()


def detached_inside() -> None:
    """Detach where routes are under way."""
    with attached.replaying(steps):
        attached.detach()


told("an error of the loop", failing)
told("nested", nested)
told("detach inside", detached_inside)
told("outside", lambda: tiny.loop([model], data))
with routed_live([model]):
    told("outside, on purpose", lambda: tiny.loop([model], data))


def argument_too() -> None:
    """Hand the model routes twice."""
    with attached.replaying(steps):
        tiny.forward(model, routed_experts=steps[0][0].routed_experts)


told("an argument too", argument_too)
attached.detach()
told("after detach", lambda: replayed(steps, data))
told("live after detach", lambda: tiny.loop([model], data))
print(json.dumps(said))
