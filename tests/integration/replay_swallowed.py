"""Replay in models that somebody else has changed, and print what each says, as one JSON object.

python replay_swallowed.py
"""

import functools
import json
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import megatron_tiny as tiny
import numpy as np
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe import router as router_module
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_layer import TransformerLayer

from r3_adapter.layout import ParallelLayout
from r3_adapter.megatron.reach import routed_live
from r3_adapter.megatron.replay import ReplayBatch, prepare
from r3_adapter.trace import RoutingTrace

SEQ, BATCH = tiny.SEQ, tiny.BATCH
STAGES: dict[str, tuple[type, str]] = {
    "model": (GPTModel, "forward"),
    "block": (TransformerBlock, "forward"),
    "layer": (TransformerLayer, "forward"),
    "layer's MLP": (TransformerLayer, "_forward_mlp"),
    "MoE layer": (MoELayer, "forward"),
    "route": (MoELayer, "route"),
    "router": (TopKRouter, "forward"),
    "routing": (TopKRouter, "routing"),
}
said: dict[str, Any] = {}
tiny.start()
torch.manual_seed(11)
TOKENS = torch.randint(0, tiny.VOCAB, (BATCH, SEQ))  # Those of megatron_tiny.forward.


def traces() -> list[RoutingTrace]:
    """Return random routes of the micro-batch's samples."""
    found = []
    for sample in range(BATCH):
        noise = np.random.default_rng(sample).random((SEQ, tiny.MOE_LAYERS, tiny.EXPERTS))
        ids = np.argsort(noise, axis=2)[..., : tiny.TOPK].astype(np.uint8)
        tokens = TOKENS[sample].numpy().astype(np.int32)
        layers = np.arange(1, 4, dtype=np.int32)
        found.append(RoutingTrace(ids, tokens, np.zeros(SEQ, np.int32), layers, tiny.EXPERTS, ("v",)))
    return found


def ready(model: torch.nn.Module) -> ReplayBatch:
    """Prepare the micro-batch."""
    return prepare(model, traces(), TOKENS, layout=ParallelLayout())


def drop(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments without the routes."""
    return {name: value for name, value in arguments.items() if name != "routed_experts"}


def swallower(method: Callable[..., Any], *, named: bool = False) -> Callable[..., Any]:
    """Return a method that takes any argument and drops the routes, as verl's patched_routing does."""
    # MoELayer.route gets them third.
    most = 2 if method.__name__ == "route" else None

    def patched(self: Any, *args: Any, **kwargs: Any) -> Any:
        return method(self, *args[:most], **drop(kwargs))

    return functools.wraps(method)(patched) if named else patched


def narrow(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method with the signature of a release that knows no routes."""

    def released(self: Any, first: Any, padding_mask: Any = None, *args: Any) -> Any:
        return method(self, first, padding_mask, *args)

    return released


def honest(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return a wrapper that hands everything on, as a profiler's does."""

    @functools.wraps(method)
    def timed(*args: Any, **kwargs: Any) -> Any:
        return method(*args, **kwargs)

    return timed


@contextmanager
def replaced(owner: Any, name: str, change: Callable[[Any], Any]) -> Iterator[None]:
    """Replace an attribute for as long as the context lasts."""
    before, own = getattr(owner, name), name in vars(owner)
    setattr(owner, name, change(before))
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


def attempt(name: str, model: torch.nn.Module, call: torch.nn.Module | None = None) -> None:
    """Prepare, run forward and backward, and prepare again; say where it stopped and why."""
    place = "prepare"
    try:
        batch = ready(model)
        place = "forward"
        tiny.forward(call or model, routed_experts=batch.routed_experts).mean().backward()
        place = "next prepare"
        ready(model)
        hooks = sum(len(each._forward_hooks) + len(each._forward_pre_hooks) for each in model.modules())
        said[name] = f"done, {hooks} hooks"
    except Exception as error:
        said[name] = f"{place}: {type(error).__name__}: {error}"


class Wrapper(torch.nn.Module):
    """What frameworks put around a model; drops the routes if asked to."""

    def __init__(self, module: torch.nn.Module, drops: bool) -> None:
        super().__init__()
        self.module, self.drops = module, drops

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **(drop(kwargs) if self.drops else kwargs))


class NamedWrapper(Wrapper):
    """Names the argument, and does not hand it on."""

    def forward(self, *args: Any, routed_experts: Any = None, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


class NarrowWrapper(Wrapper):
    """Takes what it knows."""

    def forward(self, tokens: Any, positions: Any, mask: Any, labels: Any = None) -> Any:
        return self.module(tokens, positions, mask, labels=labels)


class OwnRouter(TopKRouter):
    """A router of somebody's own."""

    def routing(self, logits: Any, *args: Any, **kwargs: Any) -> Any:
        return super().routing(logits, *args, **drop(kwargs))


class Shifted(TopKRouter):
    """Uses the rows of the token before."""

    def forward(self, *args: Any, routed_experts: Any = None, **kwargs: Any) -> Any:
        return super().forward(*args, routed_experts=routed_experts.roll(1, 0), **kwargs)


for recompute, options in tiny.RECOMPUTE.items():
    attempt(f"right, recompute {recompute}", tiny.build(**options))
attempt("right, jitter", tiny.build(moe_input_jitter_eps=0.05, moe_z_loss_coeff=0.01))
attempt("right, bias", tiny.build(**tiny.BIAS_AND_AUX))
attempt("right, wrapped", Wrapper(Wrapper(tiny.build(), False), False))
for stage, (owner, method) in STAGES.items():
    with replaced(owner, method, swallower):
        attempt(f"swallowed, {stage}", tiny.build())
    with replaced(owner, method, functools.partial(swallower, named=True)):
        attempt(f"swallowed by wraps, {stage}", tiny.build())
    with replaced(owner, method, honest):
        attempt(f"honest, {stage}", tiny.build())
for stage in ("model", "router", "routing"):
    with replaced(*STAGES[stage], narrow):
        attempt(f"released, {stage}", tiny.build())
with replaced(router_module, "topk_routing_with_score_function", lambda f: lambda *a, **k: f(*a, **drop(k))):
    attempt("swallowed, selection", tiny.build())

for module in ("router", "block", "model"):
    model = tiny.build()
    target = {"router": tiny.routers(model)[1], "block": model.decoder, "model": model}[module]
    target.forward = types.MethodType(swallower(type(target).forward), target)
    attempt(f"on the instance, {module}", model)
for kind in (OwnRouter, Shifted):
    model = tiny.build()
    for router in tiny.routers(model):
        router.__class__ = kind
    attempt(kind.__name__, model)

attempt("wrapper drops", Wrapper(tiny.build(), True))
attempt("named wrapper drops", NamedWrapper(tiny.build(), True))
attempt("narrow wrapper", NarrowWrapper(tiny.build(), True))
model = tiny.build()
attempt("wrapper outside drops", model, Wrapper(model, True))

model = tiny.build()
attempt("before it is replaced", model)
with replaced(TopKRouter, "routing", swallower):
    attempt("after it is replaced", model)
attempt("after it is put back", model)
model.decoder.forward = types.MethodType(swallower(TransformerBlock.forward), model.decoder)
attempt("replaced on the instance later", model)

model = tiny.build()
batch = ready(model)
with torch.no_grad():
    tiny.forward(model)
with routed_live([model]):
    tiny.forward(model)
attempt("live on purpose", model)
# A pass that shows nothing wrong is a pass of evaluation too.
model = tiny.build().eval()
batch = ready(model)
with torch.no_grad():
    first = tiny.forward(model, routed_experts=batch.routed_experts)
    second = tiny.forward(model, routed_experts=batch.routed_experts)
said["bits after the first pass"] = torch.equal(first, second)

state = torch.get_rng_state()
model = tiny.build(moe_input_jitter_eps=0.05)
state = torch.get_rng_state()
ready(model)
said["generator"] = torch.equal(state, torch.get_rng_state())
said["mode"] = all(router.training for router in tiny.routers(model))
print(json.dumps(said))
