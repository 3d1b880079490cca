"""Hooks that hand a model the routes of each forward pass, so that a training loop need not be changed."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any

import torch

from r3_adapter.errors import ReplayError, check_choice
from r3_adapter.megatron.backends import Backend, Channel
from r3_adapter.megatron.dispatch import COUNTS
from r3_adapter.megatron.feeding import FEEDS, AuxLosses, Feed, Outside
from r3_adapter.megatron.layers import moe_layers, moe_routers, unwrapped
from r3_adapter.megatron.reach import ARGUMENT, forget
from r3_adapter.megatron.replay import check_chunks
from r3_adapter.megatron.replay_batch import ReplayBatch

_PLAN = "build_schedule_plan"


def attach(
    chunks: Sequence[torch.nn.Module],
    backend: Backend = "auto",
    *,
    outside: Outside = "live",
    aux_losses: AuxLosses | None = None,
) -> "Attached":
    """Put hooks on the GPTModel or HybridModel of each chunk, which hand its passes their routes.

    Once, when the model is built.

    A chunk may lie in wrappers that know no routes (a value head, a vision tower, data parallelism): the hooks are
    inside of them. Prepare routes with the `backend` of what is returned.

    chunks: this rank's model chunks, wrapped or not; more than one with VPP.
    backend: "auto" takes "patch" where Megatron-core is patched; the one that was taken is `Attached.backend`.
    outside: what a forward pass outside of `Attached.replaying` does.
    aux_losses: which experts auxiliary losses count. "native" can only count "live" ones, and wants to be told so;
        "patch" does as moe_router_replay_aux_loss says, and refuses other words.

    Raises:
        ReplayError: no chunks, one that has no such model or several, or one that is attached already; a back end that
            this Megatron has not, or options that it gets wrong.
    """
    check_choice("backend", backend, Backend, ReplayError)
    check_choice("outside", outside, Outside, ReplayError)
    if aux_losses is not None:
        check_choice("aux_losses", aux_losses, AuxLosses, ReplayError)
    check_chunks(chunks)
    models = [unwrapped(chunk) for chunk in chunks]
    for index, model in enumerate(models):
        if model in FEEDS or any(model is other for other in models[:index]):
            raise ReplayError(f"chunk {index}: its {type(model).__name__} is attached already: detach it first")
        if not hasattr(getattr(model, "decoder", None), "layers"):
            raise ReplayError(
                f"chunk {index}: a {type(model).__name__} has no GPTModel or HybridModel inside, or several"
            )
    channel = _chosen(backend, models)
    feeds = [_feed(index, chunk, channel, outside, aux_losses) for index, chunk in enumerate(chunks)]
    # What was checked of the chunks before they had hooks.
    for each in (*chunks, *models):
        forget(each)
    return Attached(channel, models, feeds)


def takes_routes(model: Any) -> bool:
    """Tell whether a model takes routes as an argument: whether Megatron-core is patched."""
    return ARGUMENT in inspect.signature(type(model).forward).parameters


class Attached:
    """Model chunks with hooks; made by `attach`.

    backend: "patch" or "native".
    """

    backend: Channel

    def __init__(self, backend: Channel, models: list[Any], feeds: list[Feed]) -> None:
        self.backend = backend
        self._models, self._feeds, self._undo = models, feeds, list[Callable[[], object]]()
        self._replaying = False
        for model, feed in zip(models, feeds, strict=True):
            self._undo += _hook(model, feed)
            FEEDS[model] = feed

    @contextmanager
    def replaying(self, steps: Sequence[Sequence[ReplayBatch]]) -> Iterator[None]:
        """Give the k-th forward pass inside, of each chunk, its k-th batch; `build_schedule_plan` counts as one.

        steps: by chunk and micro-batch, as `prepare_step` returns them.

        Raises:
            ReplayError: steps of other chunks or of another back end, one `replaying` in another, or after `detach`.
                A pass that finds no routes, or routes that are left over at the end, with chunk and micro-batch. An
                error of the passes themselves goes on as it is.
        """
        self._check(steps)
        self._replaying = True
        try:
            for feed, step in zip(self._feeds, steps, strict=True):
                feed.fill(list(step))
            yield
            left = [text for feed in self._feeds if (text := feed.left())]
        finally:
            self._replaying = False
            for feed in self._feeds:
                feed.clear()
        if left:
            raise ReplayError("; ".join(left))

    def detach(self) -> None:
        """Remove the hooks: the model is as it was before `attach`. A second call does nothing.

        Raises:
            ReplayError: inside of `replaying`.
        """
        if self._replaying:
            raise ReplayError("detach inside of `replaying`")
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()
        for model in self._models:
            FEEDS.pop(model, None)
            forget(model)
        self._models.clear()

    def _check(self, steps: Sequence[Sequence[ReplayBatch]]) -> None:
        if not self._models:
            raise ReplayError("`replaying` after `detach`")
        if self._replaying:
            raise ReplayError("`replaying` inside of `replaying`: a pass has routes of one step")
        if len(steps) != len(self._feeds):
            raise ReplayError(f"steps: those of {len(steps)} chunks != {len(self._feeds)} chunks that are attached")
        for index, (model, step) in enumerate(zip(self._models, steps, strict=True)):
            if len(step) != len(steps[0]):
                raise ReplayError(f"chunk {index}: {len(step)} micro-batches != {len(steps[0])} of chunk 0")
            own = sum(1 for _ in moe_layers(model))
            for number, batch in enumerate(step):
                place = f"chunk {index}, micro-batch {number}"
                if not isinstance(batch, ReplayBatch):
                    raise ReplayError(f"{place}: a {type(batch).__name__} is not a ReplayBatch")
                if batch.backend != self.backend:
                    raise ReplayError(
                        f"{place}: backend {batch.backend!r} of its routes != {self.backend!r}, the model's: "
                        f"prepare them with backend={self.backend!r}"
                    )
                if len(batch.routed_experts) != own:
                    raise ReplayError(
                        f"{place}: routes of {len(batch.routed_experts)} MoE layers != {own}, the chunk's"
                    )


def _chosen(backend: Backend, models: Sequence[Any]) -> Channel:
    patched = all(takes_routes(model) for model in models)
    if backend == "auto":
        backend = "patch" if patched else "native"
    if backend == "patch" and not patched:
        name = next(type(model).__name__ for model in models if not takes_routes(model))
        raise ReplayError(
            f"backend 'patch': {name}.forward takes no routed_experts; is megatron-core patched (`r3 patch verify`)?"
        )
    return backend


def _feed(index: int, chunk: torch.nn.Module, channel: Channel, outside: Outside, aux_losses: AuxLosses | None) -> Feed:
    routers = dict(moe_routers(chunk))
    if channel == "native":
        from r3_adapter.megatron.native import NativeFeed

        return NativeFeed(index, chunk, outside, routers, aux_losses or "replayed")
    for layer_id, router in routers.items():
        config: Any = router.config
        if (own := config.moe_router_replay_aux_loss) != (aux_losses or own):
            raise ReplayError(f"layer {layer_id}: aux_losses {aux_losses!r} != moe_router_replay_aux_loss ({own!r})")
    return Feed(index, chunk, channel, outside)


def _hook(model: Any, feed: Feed) -> list[Callable[[], object]]:
    """Add the hooks that hand a model its routes, before all others; return functions that undo it, in that order."""
    if feed.channel == "native":
        from r3_adapter.megatron import native

        assert isinstance(feed, native.NativeFeed)
        return native.hook(model, feed, partial(_refuse_explicit, feed))

    def hand_over(_: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        _refuse_explicit(feed, kwargs)
        batch = feed.take(args[0] if args else kwargs.get("input_ids"))
        return None if batch is None else (args, {**kwargs, **batch.model_arguments})

    undo: list[Callable[[], object]] = [
        model.register_forward_pre_hook(hand_over, prepend=True, with_kwargs=True).remove
    ]
    plan = getattr(model, _PLAN, None)
    if plan is not None:
        signature = inspect.signature(plan)

        @wraps(plan)
        def planned(*args: Any, **kwargs: Any) -> Any:
            arguments = signature.bind_partial(*args, **kwargs).arguments
            _refuse_explicit(feed, arguments)
            batch = feed.take(arguments.get("input_ids"))
            return plan(*args, **kwargs, **({} if batch is None else batch.model_arguments))

        undo.append(_replaced(model, _PLAN, planned))
    return undo


def _refuse_explicit(feed: Feed, arguments: Mapping[str, Any]) -> None:
    for name in (ARGUMENT, COUNTS):
        if arguments.get(name) is not None:
            raise ReplayError(
                f"{feed.place()}: {name} as an argument of a model that is attached: "
                "hand its routes to `replaying`, or detach it"
            )


def _replaced(model: Any, name: str, method: Any) -> Callable[[], None]:
    """Replace a method on an instance; return what puts back what was there."""
    own = vars(model).get(name)
    setattr(model, name, method)

    def put_back() -> None:
        if own is None:
            delattr(model, name)
        else:
            setattr(model, name, own)

    return put_back
