"""Check that routed_experts reach the routers: before the first step by signatures, then by the experts they used.

A module that accepts any argument and drops it would let the routers select for themselves, without an error. So each
method on the way must name the argument, or pass unknown arguments on to a method that names it. Each router is tried
with two rows. The first pass that gets routes compares them once with what its routers used. If a method is replaced
later, the next `prepare` notices and checks again. After that pass no hook is left in the model.
"""

import inspect
import sys
import weakref
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from r3_adapter.errors import ReplayError
from r3_adapter.megatron.feeding import FEEDS, Feed, feeds_of
from r3_adapter.megatron.inputs import check_order
from r3_adapter.repack import RankRoutes

ARGUMENT = "routed_experts"
_SELECT = "topk_routing_with_score_function"

_LAYER, _MLP, _ROUTER = ("forward", "_forward_mlp"), ("forward", "route"), ("forward", "routing")

Way = list[tuple[Any, tuple[str, ...]]]
"""The modules that hand the argument on, outermost first, each with its methods that do."""


@dataclass
class _Known:
    """What is known of a model chunk. methods: those checked; watch: None once a pass has verified the chunk."""

    methods: list[Any]
    watch: "_Watch | None"


_KNOWN: "weakref.WeakKeyDictionary[torch.nn.Module, _Known]" = weakref.WeakKeyDictionary()

_ROUTES: MutableMapping[torch.Tensor, RankRoutes] = WeakTensorKeyDictionary()
"""What is known on the host of experts that were handed out, by their tensor."""


def note_routes(routed_experts: torch.Tensor, routes: RankRoutes) -> None:
    """Remember which routes a tensor holds, while it lives, for the first pass that gets it."""
    _ROUTES[routed_experts] = routes


def check_reach(chunk: torch.nn.Module, model: Any, routers: Mapping[int, Any]) -> None:
    """Refuse a model chunk in which the argument does not reach all routers; each chunk is checked once.

    model: the GPTModel or hybrid model of the chunk; routers: its MoE routers by global layer.

    Raises:
        ReplayError: Names the layer and the method that does not take it or does not use it, or the passes that were
            not handed any.
    """
    if not isinstance(chunk, torch.nn.Module) or not routers:
        return
    if model in FEEDS:
        # Hooks hand the routes over inside of all wrappers.
        chunk = model
    way = _way(chunk, model)
    methods = _methods(way, routers)
    known = _KNOWN.get(chunk)
    if known is not None and known.methods == methods:
        if known.watch is not None:
            known.watch.check_handed_over()
        return
    if known is not None and known.watch is not None:
        known.watch.close()
    feed = FEEDS.get(model)
    native = feed is not None and feed.channel == "native"
    for owner, names in way if not native else ():
        for name in names:
            _check_takes(owner, name)
    for layer_id, router in routers.items():
        _probe(layer_id, router, native)
    _KNOWN[chunk] = _Known(methods, _Watch(chunk, model, routers))


@contextmanager
def routed_live(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Declare that passes inside get no routes on purpose, though some were prepared for them."""
    feeds = feeds_of(chunks)
    attached = [model for model, feed in FEEDS.items() if feed in feeds]
    watches = [known.watch for chunk in [*chunks, *attached] if (known := _KNOWN.get(chunk)) and known.watch]
    open_ones: list[Feed | _Watch] = [*watches, *feeds]
    for each in open_ones:
        each.live += 1
    try:
        yield
    finally:
        for each in open_ones:
            each.live -= 1


def forget(model: torch.nn.Module) -> None:
    """Remove the hooks of a model's first pass, and check the model again when routes are next prepared for it."""
    known = _KNOWN.pop(model, None)
    if known is not None and known.watch is not None:
        known.watch.close()


def _way(chunk: torch.nn.Module, model: Any) -> Way:
    way: Way = []
    module: Any = chunk
    while module is not model:
        way.append((module, ("forward",)))
        if not hasattr(module, "module"):
            raise ReplayError(
                f"{type(module).__name__} has its {type(model).__name__} elsewhere than in `module`, and may not hand "
                f"{ARGUMENT} on to it: hand it over by r3_adapter.megatron.attach"
            )
        module = module.module
    # The overlapped expert-parallel schedule calls the second one, and then the routers' layers from a plan.
    overlapped = getattr(model.config, "overlap_moe_expert_parallel_comm", False)
    way += [(model, ("forward", "build_schedule_plan") if overlapped else ("forward",)), (model.decoder, ("forward",))]
    for layer in model.decoder.layers:
        if getattr(layer, "is_moe_layer", False):
            # Read as they are kept, which takes a fifth of the time: this is done for each micro-batch.
            mlp = layer._modules["mlp"]
            way += [(layer, _LAYER), (mlp, _MLP), (mlp._modules["router"], _ROUTER)]
    return way


def _methods(way: Way, routers: Mapping[int, Any]) -> list[Any]:
    """Return the way and its methods in a form that keeps no module alive, and equals itself until one is replaced."""
    kinds, found = {type(owner): names for owner, names in way}, list[Any]()
    for owner, names in way:
        found.append(weakref.ref(owner))
        own = owner.__dict__
        found += [weakref.ref(own[name]) for name in names if name in own]
    return found + [getattr(kind, name, None) for kind, names in kinds.items() for name in names] + _selects(routers)


def _selects(routers: Mapping[int, Any]) -> list[Any]:
    """Return the functions that select experts, which routers find in the modules of their classes."""
    modules = {base.__module__ for kind in {type(router) for router in routers.values()} for base in kind.__mro__}
    return [found for name in sorted(modules) if (found := getattr(sys.modules.get(name), _SELECT, None)) is not None]


def _check_takes(owner: Any, name: str) -> None:
    """Refuse a method that does not take the argument, or that takes any argument and does not pass it on."""
    layer = getattr(owner, "layer_number", None)
    place = f"{'' if layer is None else f'layer {layer - 1}: '}{type(owner).__name__}.{name}"
    method = getattr(owner, name, None)
    if method is None:
        raise ReplayError(f"{place}: there is none, and it should take {ARGUMENT}")
    chain = _unwrapped(method)
    where = f"{getattr(chain[0], '__module__', '?')}.{getattr(chain[0], '__qualname__', type(chain[0]).__name__)}"
    answers = [_takes(each) for each in chain]
    if False in answers:
        raise ReplayError(
            f"{place} ({where}) takes no {ARGUMENT}; is megatron-core patched (`r3 patch verify`), and by nothing else?"
        )
    # An override may hand it on to what it stands for, and a wrapper of models to what is inside.
    bases = [each for base in type(owner).__mro__ if name in vars(base) for each in _unwrapped(vars(base)[name])]
    if True not in answers and not any(_takes(each) for each in bases) and not hasattr(owner, "module"):
        raise ReplayError(
            f"{place} ({where}) does not name {ARGUMENT} and would swallow it, as any "
            "argument that it does not know: take that patch off, or let it name the argument and hand it on"
        )


def _unwrapped(method: Any) -> list[Any]:
    """Return a method and what it stands for, by functools.wraps and functools.partial."""
    chain: list[Any] = []
    waiting = [method]
    while waiting:
        found = waiting.pop(0)
        found = getattr(found, "__func__", found)
        if any(found is each for each in chain):
            continue
        chain.append(found)
        waiting += [each for name in ("func", "__wrapped__") if (each := getattr(found, name, None)) is not None]
    return [each for each in chain if not isinstance(each, partial)] or chain


def _takes(function: Any) -> bool | None:
    """Tell whether a function names the argument; None if it takes it among others, without a name."""
    function = getattr(function, "__func__", function)
    # A signature may be another's (functools.wraps, copy_signature); the code is its own.
    code = getattr(function, "__code__", None)
    if code is None:
        code = getattr(getattr(type(function), "__call__", None), "__code__", None)  # noqa: B004
    if code is None:
        return None
    named = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    if ARGUMENT in named:
        return True
    if not code.co_flags & inspect.CO_VARKEYWORDS:
        return False
    return True if ARGUMENT in code.co_consts else None


def _probe(layer_id: int, router: Any, native: bool) -> None:
    """Refuse a router that does not use the experts that it is given for two rows; nothing is changed by it."""
    by = "RouterReplay" if native else ARGUMENT
    weight, config = router.weight, router.config
    whole = (config.num_moe_experts, config.hidden_size)
    if tuple(weight.shape) != whole or (weight.device.type == "cpu" and torch.cuda.is_available()):
        # Shared out, or not where it works: the first pass tells.
        return
    last, topk = config.num_moe_experts - 1, router.topk
    given = torch.tensor([[last - i for i in range(topk)], list(range(topk))], dtype=torch.int16, device=weight.device)
    hidden = torch.zeros(2, 1, config.hidden_size, dtype=config.params_dtype, device=weight.device)
    before = {name: getattr(router, name) for name in ("training", "input_jitter") if hasattr(router, name)}
    devices = [weight.device] if weight.device.type == "cuda" else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            router.training = False
            if native:
                router.router_replay.aim(given)
            # Not by calling the module: its hooks are for real rows.
            output = router.forward(hidden, **({} if native else {ARGUMENT: given}))
        used = int(_rows_used(given, output[1]))
    except (TypeError, ValueError) as error:
        raise ReplayError(f"layer {layer_id}: its router refuses {by}: {type(error).__name__}: {error}") from error
    except RuntimeError:
        # Weights that are shared out otherwise: the first pass tells.
        return
    finally:
        if native:
            router.router_replay.aim(None)
        for name, value in before.items():
            setattr(router, name, value)
    if used != 2:
        raise ReplayError(
            f"layer {layer_id}: {type(router).__name__} used the experts given to it in {used} of 2 rows: "
            f"something between its forward and {_SELECT} drops {by}"
        )


def experts_given(router: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    """Return the experts that a router was called with or that its RouterReplay has, [T, K]; None if none."""
    given = kwargs.get(ARGUMENT, args[2] if len(args) > 2 else None)
    return given if given is not None else getattr(getattr(router, "router_replay", None), "target_topk_idx", None)


def _rows_used(given: torch.Tensor, routing_map: torch.Tensor) -> torch.Tensor:
    """Return the number of rows that use just the given experts, or are to be routed live; [] int64, on the device."""
    ids = given.to(torch.int64)
    live = ids[:, 0] < 0
    chosen = routing_map.to(torch.bool)
    hits = chosen.gather(1, ids.clamp(min=0)).all(1) & (chosen.sum(1) == ids.shape[1])
    return (hits | live).sum()


class _Watch:
    """Hooks on a chunk until a pass that got routes has shown that its routers used them.

    live: number of open `routed_live` contexts. unfed: number of training passes outside of them that got no routes.
    """

    def __init__(self, chunk: torch.nn.Module, model: torch.nn.Module, routers: Mapping[int, Any]) -> None:
        self.live, self.unfed = 0, 0
        self._name = type(chunk).__name__
        # What is known of a chunk must not keep it alive.
        self._routers = weakref.WeakValueDictionary(routers)
        self._given: torch.Tensor | None = None
        self._used: list[list[torch.Tensor]] = []
        self._on_routers: list[Any] = []
        self._on_chunk = [chunk.register_forward_pre_hook(self._begin), chunk.register_forward_hook(self._end)]
        # A wrapper may get routes in another form and hand them on by name.
        for module in {chunk, model}:
            self._on_chunk.append(module.register_forward_pre_hook(self._hand_over, with_kwargs=True))

    def check_handed_over(self) -> None:
        """Refuse to go on if the model was trained without the routes that were prepared for it."""
        if self.unfed:
            raise ReplayError(
                f"{self._name}: {self.unfed} training passes since its first routes were prepared were handed no "
                f"{ARGUMENT}: pass it on, also through wrappers; if it is left out on purpose, say so with routed_live"
            )

    def close(self) -> None:
        """Take all hooks away."""
        self._leave_routers()
        for hook in self._on_chunk:
            hook.remove()

    def _begin(self, *_: Any) -> None:
        self._leave_routers()
        self._given = None

    def _hand_over(self, module: torch.nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        given = kwargs.get(ARGUMENT)
        if given is None and (feed := FEEDS.get(module)) is not None:
            given = feed.given
        if given is None or self._given is not None:
            return
        if (routes := _ROUTES.get(given)) is not None:
            check_order(self._name, args[0] if args else kwargs.get("input_ids"), routes)
        self._given, self._used = given, [[] for _ in self._routers]
        for index, router in enumerate(self._routers.values()):
            self._on_routers.append(router.register_forward_hook(partial(self._note, index), with_kwargs=True))

    def _note(self, index: int, router: Any, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> None:
        assert self._given is not None
        # Live routers may select what was given: they count only if they were given it.
        passed = experts_given(router, args, kwargs)
        used = torch.zeros(()) if passed is None else _rows_used(self._given[index], output[1])
        self._used[index].append(used)

    def _end(self, *_: Any) -> None:
        if self._given is None:
            self.unfed += torch.is_grad_enabled() and not self.live
            return
        rows, wrong = self._given.shape[1], []
        for layer_id, counts in zip(self._routers, self._used, strict=True):
            used = [int(count) for count in counts]
            if used != [rows]:
                wrong.append(f"layer {layer_id}: {sum(used)} rows in {len(used)} calls")
        self._begin()
        if wrong:
            raise ReplayError(
                f"rank {torch.distributed.get_rank()}: {self._name} was handed {ARGUMENT} of {rows} rows, and its "
                f"routers used them otherwise ({'; '.join(wrong)}): something on the way drops or changes them"
            )
        self.close()
        for known in _KNOWN.values():
            if known.watch is self:
                known.watch = None

    def _leave_routers(self) -> None:
        for hook in self._on_routers:
            hook.remove()
        self._on_routers.clear()
