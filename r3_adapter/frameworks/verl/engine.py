"""The trainer's side: the actor's passes replay the routes of their micro-batches, cut as verl's engine packs them.

S: tokens of a sample; L: decoder layers; K: experts a token; P: layers of `sealed`.
"""

import functools
import inspect
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import Any

from r3_adapter.arena import Arena
from r3_adapter.errors import ReplayError
from r3_adapter.frameworks.verl.options import Options
from r3_adapter.frameworks.verl.packing import checked_engine, step_input
from r3_adapter.frameworks.verl.report import Report
from r3_adapter.megatron.agreement import agreed
from r3_adapter.megatron.attach import Attached, attach
from r3_adapter.megatron.replay import prepare_step
from r3_adapter.megatron.replay_batch import StepInput
from r3_adapter.sglang.moe_config import MoEConfig

ROUTES = "routed_experts"
_PASSES = ("compute_log_prob", "update_actor")
"""Of the actor's worker: the reference, critics and teachers route live."""

_WANTED: ContextVar[bool] = ContextVar("r3_verl_wanted", default=False)
_CURRENT: ContextVar["_Pass | None"] = ContextVar("r3_verl_current", default=None)


def change_workers(module: ModuleType) -> None:
    """Let the actor's passes replay.

    Raises:
        ReplayError: The class is not as it was read.

    Source: verl/workers/engine_workers.py@0.9.1:ActorRolloutRefWorker
    """
    worker = getattr(module, "ActorRolloutRefWorker", None)
    for name in _PASSES:
        method = getattr(worker, name, None)
        if not callable(method) or inspect.iscoroutinefunction(method):
            raise ReplayError(
                f"{module.__name__}: no ActorRolloutRefWorker.{name}: this version of verl is not supported"
            )
        setattr(worker, name, _replaying(method))


def _replaying(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def replaying(self: Any, *args: Any, **kwargs: Any) -> Any:
        token = _WANTED.set(wanted(self))
        try:
            return method(self, *args, **kwargs)
        finally:
            _WANTED.reset(token)

    return replaying


def wanted(worker: Any) -> bool:
    """Tell whether a worker's actor is to replay the rollout's routes.

    Raises:
        ReplayError: It is to, and cannot: another engine than Megatron's, or verl's own replay is on as well.
    """
    if not worker.config.rollout.enable_rollout_routing_replay:
        return False
    if (strategy := worker.config.actor.strategy) != "megatron":
        raise ReplayError(
            f"actor.strategy ({strategy!r}) != 'megatron', and rollout.enable_rollout_routing_replay is on"
        )
    if getattr(worker, "enable_routing_replay", False):
        raise ReplayError(
            "actor.megatron.router_replay.mode != 'disabled': verl's own replay and this plug-in's exclude each other"
        )
    return True


def change_engine(module: ModuleType) -> None:
    """Let MegatronEngine.forward_backward_batch replay.

    Raises:
        ReplayError: The module is not as it was read.

    Source: verl/workers/engine/megatron/transformer_impl.py@0.9.1:MegatronEngine.forward_backward_batch
    """
    engine, generator = getattr(module, "MegatronEngine", None), getattr(module, "make_batch_generator", None)
    original = getattr(engine, "forward_backward_batch", None)
    if original is None or generator is None:
        raise ReplayError(
            f"{module.__name__}: no MegatronEngine.forward_backward_batch that makes its micro-batches with "
            "make_batch_generator: this version of verl is not supported"
        )

    @functools.wraps(original)
    def replayed(self: Any, data: Any, loss_function: Any, forward_only: bool = False) -> Any:
        if not _WANTED.get():
            return original(self, data, loss_function, forward_only=forward_only)
        with _replayed_pass(self, forward_only) as current:
            output = original(self, data, loss_function, forward_only=forward_only)
        return current.reported(output, data)

    @functools.wraps(generator)
    def begun(batches: Any, *args: Any, **kwargs: Any) -> Any:
        current = _CURRENT.get()
        return generator(batches if current is None else current.begin(batches), *args, **kwargs)

    engine.forward_backward_batch = replayed  # type: ignore[union-attr]
    module.make_batch_generator = begun  # type: ignore[attr-defined]


class _Replayer:
    """What an engine keeps from pass to pass."""

    def __init__(self, engine: Any) -> None:
        self.options = Options.from_environment()
        self.moe = MoEConfig.from_config(engine.model_config.hf_config.to_dict(), place="hf_config")
        self.attached: Attached = attach(list(engine.module), backend=self.options.backend)
        self.arena, self.report = Arena(), Report()


_REPLAYERS: "weakref.WeakKeyDictionary[Any, _Replayer]" = weakref.WeakKeyDictionary()


@contextmanager
def _replayed_pass(engine: Any, forward_only: bool) -> Iterator["_Pass"]:
    """Replay in the pass inside, from where its micro-batches are known."""
    with ExitStack() as stack:
        current = _Pass(engine, forward_only, stack)
        token = _CURRENT.set(current)
        stack.callback(_CURRENT.reset, token)
        yield current
        if not current.begun:
            raise ReplayError(
                "verl's engine has made a pass without make_batch_generator: this version of verl is not supported"
            )


class _Pass:
    """One forward_backward_batch of the actor's engine."""

    def __init__(self, engine: Any, forward_only: bool, stack: ExitStack) -> None:
        self.engine, self.forward_only, self.begun = engine, forward_only, False
        self._stack = stack

    def begin(self, batches: Sequence[Any]) -> list[Any]:
        """Prepare the routes of all micro-batches, on all ranks or on none; return them without their routes.

        Raises:
            ReplayError: On every rank, what each that refuses has said.
        """
        own, inputs = agreed(lambda: self._inputs(batches))
        chunks = list(self.engine.module)
        steps = prepare_step(
            chunks,
            inputs,
            arena=own.arena,
            last_row=own.options.last_row,
            backend=own.attached.backend,
            plan=own.options.dispatch_plan == "on",
        )
        self._stack.enter_context(own.attached.replaying(steps))
        self._stack.enter_context(own.report.watched(chunks, steps, self.forward_only))
        self.begun = True
        # Otherwise each micro-batch would take the routes of all layers to the device.
        return [batch.exclude(ROUTES) for batch in batches]

    def _inputs(self, batches: Sequence[Any]) -> tuple[_Replayer, list[StepInput]]:
        if self.engine not in _REPLAYERS:
            checked_engine(self.engine)
            _REPLAYERS[self.engine] = _Replayer(self.engine)
        own = _REPLAYERS[self.engine]
        return own, [
            step_input(self.engine, batch, own.moe, f"micro-batch {index}") for index, batch in enumerate(batches)
        ]

    def reported(self, output: Any, data: Any) -> Any:
        """Add this pass's metrics to those of a training pass; those of log-probabilities wait for it."""
        _REPLAYERS[self.engine].report.add(output, data, self.forward_only)
        return output
