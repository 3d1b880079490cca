"""In slime's rollout process: requests ask for routes, and samples become training data that carries them.

S: tokens of a sample; L: decoder layers; K: experts a token.
"""

import importlib
import inspect
import sys
from argparse import Namespace
from collections.abc import Sequence
from typing import Any, cast

from r3_adapter.errors import CaptureError, ReplayError
from r3_adapter.frameworks.rows import UNKNOWN_VERSION, moe_of_arguments, to_int32, trace_of_sample
from r3_adapter.trace import RoutingTrace

ROUTES = "rollout_routed_experts"
"""The one key for routes that slime hands on to its trainers; without its own replay nothing there reads it."""

FRAMEWORKS = ("slime", "miles")
_OWN_REPLAY = ("use_rollout_routing_replay", "use_routing_replay")


def framework_of(value: Any) -> str:
    """Return which of the frameworks an object's type belongs to.

    Raises:
        ReplayError: Neither.
    """
    name = type(value).__module__.partition(".")[0]
    if name not in FRAMEWORKS:
        raise ReplayError(f"a {type(value).__module__}.{type(value).__name__} is of none of {', '.join(FRAMEWORKS)}")
    return name


def refuse_own_replay(args: Namespace) -> None:
    """Refuse to replay where the framework's own replay is on.

    Raises:
        ReplayError: Names the flag.
    """
    for name in _OWN_REPLAY:
        if getattr(args, name, False):
            flag = name.replace("_", "-")
            raise ReplayError(f"--{flag} is on: experts would be replaced a second time; leave it off")


def refuse_released_engine() -> None:
    """Refuse SGLang without our patches: slime leaves out an argument of engines that SGLang does not know.

    Released SGLang would then answer, with rows of other requests where prompts are shared. slime's rollout process has
    imported SGLang's arguments already; a process that has not starts no engines.

    Raises:
        ReplayError: The SGLang of this process has no `routed_experts_format`.

    Source: slime/backends/sglang_utils/sglang_engine.py@0.3.1:_compute_server_args
    """
    module = sys.modules.get("sglang.srt.server_args")
    if module is not None and not hasattr(module.ServerArgs, "routed_experts_format"):
        raise ReplayError(
            f"{module.__file__}: this SGLang is not patched, and its rows may be those of other requests; "
            "run `r3 patch apply sglang` on each node"
        )


def ask_for_routes(args: Namespace) -> Namespace:
    """Return the arguments with which slime's own `generate` asks for routes, and keeps them with the sample.

    A `--custom-generate-function-path` of your own calls slime's functions with these.
    """
    refuse_own_replay(args)
    refuse_released_engine()
    return Namespace(**{**vars(args), _OWN_REPLAY[0]: True})


async def generate(args: Namespace, sample: Any, sampling_params: dict[str, Any]) -> Any:
    """Do as slime's `generate` does, and ask for routes.

    Raises:
        ReplayError: Its own replay is on, or SGLang is not patched.

    Source: slime/rollout/sglang_rollout.py@0.3.1:generate
    """
    theirs = importlib.import_module(f"{framework_of(sample)}.rollout.sglang_rollout")
    return await theirs.generate(ask_for_routes(args), sample, sampling_params)


def convert(args: Namespace, samples: Sequence[Any]) -> dict[str, Any]:
    """Convert samples as slime does; its key for routes then has a trace of each sample, bound to the sample's tokens.

    Raises:
        R3Error: A sample without routes, or whose routes are not its tokens' or the model's; names the sample.
    """
    return converted(args, samples)[0]


def converted(args: Namespace, samples: Sequence[Any]) -> tuple[dict[str, Any], list[RoutingTrace]]:
    """Return what `convert` does, and the traces of the samples."""
    refuse_own_replay(args)
    refuse_released_engine()
    if not samples:
        raise CaptureError("no samples to convert")
    traces = [_trace_of(args, sample, number) for number, sample in enumerate(samples)]
    routes = [sample.rollout_routed_experts for sample in samples]
    # The framework would read the routes as its own; what it converts has none.
    try:
        for sample in samples:
            sample.rollout_routed_experts = None
        data = _convert(args, samples)
    finally:
        for sample, theirs in zip(samples, routes, strict=True):
            sample.rollout_routed_experts = theirs
    _check_tokens(data, traces)
    data[ROUTES] = [to_int32(trace) for trace in traces]
    return data, traces


def _trace_of(args: Namespace, sample: Any, number: int) -> RoutingTrace:
    place = f"sample {number} (index {sample.index})"
    if sample.rollout_routed_experts is None:
        raise CaptureError(
            f"{place}: no routes; start the engines with enable_return_routed_experts, and ask for routes: "
            "--custom-generate-function-path r3_adapter.frameworks.slime.generate"
        )
    return trace_of_sample(
        sample.rollout_routed_experts,
        token_ids=list(sample.tokens),
        num_prompt_tokens=len(sample.tokens) - sample.response_length,
        moe=moe_of_arguments(args),
        # All rows come with the last reply, which does not say which weights computed each of them.
        weight_version=", ".join(dict.fromkeys(map(str, sample.weight_versions))) or UNKNOWN_VERSION,
        place=place,
    )


def _convert(args: Namespace, samples: Sequence[Any]) -> dict[str, Any]:
    """Run the framework's own conversion.

    Source: slime/ray/rollout.py@0.3.1:RolloutManager._convert_samples_to_train_data;
        miles/ray/rollout/train_data_conversion.py@0.1.0:convert_samples_to_train_data
    """
    name = framework_of(samples[0])
    path = getattr(args, "custom_reward_post_process_path", None)
    rewards = None if path is None else importlib.import_module(f"{name}.utils.misc").load_function(path)
    if name == "miles":
        theirs = importlib.import_module("miles.ray.rollout.train_data_conversion").convert_samples_to_train_data
        _check_miles(args)
        return cast(dict[str, Any], theirs(args, samples, {}, None, rewards))
    manager = _plain(importlib.import_module("slime.ray.rollout").RolloutManager)
    # A manager without engines: the method reads no more of it than these.
    own = manager.__new__(manager)
    own.args = args
    own.custom_convert_samples_to_train_data_func = None
    own.custom_reward_post_process_func = rewards
    return cast(dict[str, Any], own._convert_samples_to_train_data(samples))


def _plain(actor: Any) -> Any:
    """Return the class behind an actor's class of Ray."""
    if inspect.isclass(actor):
        return actor
    return actor.__ray_metadata__.modified_class


def _check_miles(args: Namespace) -> None:
    """Refuse what miles hands to its own conversion alone, and not to one that a flag names."""
    for name in ("use_dynamic_global_batch_size", "multi_lora_n_adapters"):
        if getattr(args, name, None):
            raise ReplayError(f"--{name.replace('_', '-')}: miles supports it in its own conversion only")


def _check_tokens(data: dict[str, Any], traces: Sequence[RoutingTrace]) -> None:
    for number, (tokens, trace) in enumerate(zip(data["tokens"], traces, strict=True)):
        if list(tokens) != trace.token_ids.tolist():
            raise CaptureError(f"sample {number}: the conversion changed its {trace.num_tokens} tokens ({len(tokens)})")


def loaded_framework() -> str:
    """Return the framework whose trainer this process is.

    Raises:
        ReplayError: None is, or both are.
    """
    found = [name for name in FRAMEWORKS if f"{name}.backends.megatron_utils.initialize" in sys.modules]
    if len(found) != 1:
        raise ReplayError(f"a trainer of {' and '.join(found) or 'none'} of {', '.join(FRAMEWORKS)} in this process")
    return found[0]
