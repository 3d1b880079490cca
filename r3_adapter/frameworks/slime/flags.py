"""Check slime's command line before it starts: it has the flags that replay needs, and none that would defeat it.

python -m r3_adapter.frameworks.slime.flags FLAGS...; exits 2 and says what is wrong. It needs neither slime nor a GPU.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from r3_adapter.errors import LayoutError, ReplayError, show
from r3_adapter.frameworks.rows import moe_of_arguments
from r3_adapter.frameworks.slime.rollout import refuse_own_replay
from r3_adapter.layout import ParallelLayout
from r3_adapter.signals import run_command

PLUG_INS = {
    "custom_convert_samples_to_train_data_path": ("convert", "convert_packed"),
    "custom_megatron_init_path": ("init",),
}
"""The flags without which nothing is replayed; requests may be sent by a function of the user's own."""

_REQUESTS = ("custom_generate_function_path", "rollout_function_path")
_SIZES = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "cp": "context_parallel_size",
    "ep": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
}
_REPLY = {"enable_return_routed_experts": (True,), "routed_experts_format": ("exact-flat", None)}


def check_flags(argv: Sequence[str]) -> dict[str, Any]:
    """Check a command line of slime's; return the layout and the MoE layers that it asks for.

    Raises:
        R3Error: Names the flag and what it should be.
    """
    args = _read(argv)
    refuse_own_replay(args)
    for name, functions in PLUG_INS.items():
        known, found = [f"r3_adapter.frameworks.slime.{function}" for function in functions], getattr(args, name)
        if found is None:
            raise ReplayError(f"{_flag(name)} is missing: give it {' or '.join(known)}")
        if found not in known:
            raise ReplayError(f"{_flag(name)} {found} != {' or '.join(known)}")
    _check_requests(args)
    packed = args.custom_convert_samples_to_train_data_path.endswith("convert_packed")
    if packed and not args.use_dynamic_batch_size:
        raise ReplayError("--use-dynamic-batch-size is off: convert_packed composes micro-batches of no fixed size")
    moe = moe_of_arguments(args)
    engines = _engines(args)
    return {"layout": _layout(args), "moe": moe, "engines": engines}


def _check_requests(args: argparse.Namespace) -> None:
    """Refuse requests that would not ask for routes, as far as the flags say: a whole rollout would be lost."""
    name, ours = "custom_generate_function_path", "r3_adapter.frameworks.slime.generate"
    found = getattr(args, name)
    if found is None and args.rollout_function_path is None:
        raise ReplayError(f"{_flag(name)} is missing: give it {ours}, or a function of your own that asks for routes")
    if found is not None and found.startswith("r3_adapter.") and found != ours:
        raise ReplayError(f"{_flag(name)} {found} != {ours}")


def _read(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in (*PLUG_INS, "sglang_config", "sglang_routed_experts_format", *_REQUESTS):
        parser.add_argument(_flag(name))
    for name in (*_SIZES.values(), "actor_num_nodes", "actor_num_gpus_per_node"):
        parser.add_argument(_flag(name), type=int, default=1)
    for name in ("num_layers", "num_experts", "moe_router_topk"):
        parser.add_argument(_flag(name), type=int)
    parser.add_argument("--moe-layer-freq", type=json.loads, default=1)
    for name in ("use_rollout_routing_replay", "use_routing_replay", "allgather_cp", "use_dynamic_batch_size"):
        parser.add_argument(_flag(name), action="store_true")
    args, _ = parser.parse_known_args(argv)
    return args


def _layout(args: argparse.Namespace) -> ParallelLayout:
    """Return the trainer's layout; the rest of its GPUs are data parallel."""
    sizes = {name: getattr(args, flag) for name, flag in _SIZES.items()}
    gpus, dense = args.actor_num_nodes * args.actor_num_gpus_per_node, sizes["tp"] * sizes["pp"] * sizes["cp"]
    if dense < 1 or gpus % dense:
        raise LayoutError(f"tp * pp * cp ({dense}) does not divide the trainer's {gpus} GPUs")
    return ParallelLayout(**sizes, dp=gpus // dense)


def _engines(args: argparse.Namespace) -> list[str]:
    """Return the groups of engines that answer with routes.

    Raises:
        ReplayError: One does not, is part of a disaggregated deployment, or the file cannot be read.
    """
    if args.sglang_config is None:
        raise ReplayError("--sglang-config is missing: slime has no flag for enable_return_routed_experts")
    path = Path(args.sglang_config)
    try:
        models = _parse(path.read_text(encoding="utf-8"))["sglang"]
        groups = [
            (f"{path}: {model['name']}, group {number}", group)
            for model in models
            if model.get("update_weights") is not False
            for number, group in enumerate(model["server_groups"])
            if group["worker_type"] != "placeholder"
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ReplayError(f"{path}: not slime's configuration of engines: {type(error).__name__}: {error}") from error
    if not groups:
        raise ReplayError(f"{path}: no engines of the actor")
    for place, group in groups:
        if group["worker_type"] != "regular":
            raise ReplayError(
                f"{place}: worker_type {show(group['worker_type'])} != 'regular': it has half of the rows"
            )
        given = {"routed_experts_format": args.sglang_routed_experts_format, **group.get("overrides", {})}
        for name, known in _REPLY.items():
            if given.get(name) not in known:
                raise ReplayError(f"{place}: {name} {show(given.get(name))} != {show(known[0])}")
    return [place for place, _ in groups]


def _parse(text: str) -> Any:
    """Read JSON, or YAML where a reader of that is installed; slime reads either as YAML."""
    try:
        return json.loads(text)
    except ValueError:
        try:
            import yaml  # type: ignore[import-untyped]
        except ImportError as error:
            raise ValueError("it is no JSON, and no reader of YAML is installed") from error
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(str(error)) from error


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def main(argv: Sequence[str]) -> None:
    """Say what was found, or how to call it.

    Raises:
        R3Error: as check_flags.
    """
    if not argv or {"-h", "--help"} & set(argv):
        print("usage: python -m r3_adapter.frameworks.slime.flags FLAGS...: those that you give to train.py")
        return
    found = check_flags(argv)
    layout, moe = found["layout"], found["moe"]
    print(f"layout    {layout}")
    experts = f"{moe.topk} of {moe.num_experts} experts"
    print(f"routes    {len(moe.layer_ids)} MoE layers of {moe.num_layers}, {experts}")
    for place in found["engines"]:
        print(f"engines   {place}")


if __name__ == "__main__":
    sys.exit(run_command("slime", lambda: main(sys.argv[1:])))
