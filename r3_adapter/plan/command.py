"""From the flags of `r3 plan` to a plan: what is said of the flags, the checkpoint and the model beside the sizes."""

import argparse
import importlib.util
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

from r3_adapter.arguments import layout_of
from r3_adapter.errors import R3Error
from r3_adapter.plan.checks import Check
from r3_adapter.plan.loads import loads_of
from r3_adapter.plan.model import ModelShape
from r3_adapter.plan.plan import Plan, make_plan
from r3_adapter.plan.preflight import check_megatron_arguments
from r3_adapter.plan.request import PlanRequest
from r3_adapter.rl.checks import check_flags
from r3_adapter.rl.tasks import task_named
from r3_adapter.rollout import sample_folders
from r3_adapter.sglang.sampling import checked_params

_WEIGHTS = "*.safetensors"


def plan_of(args: argparse.Namespace) -> Plan:
    """Check the flags and compute what they take.

    Raises:
        R3Error: a model that is not known, a layout that is none, or a number below 1.
    """
    model = ModelShape.from_file(args.model_config)
    request = PlanRequest.from_args(args, model, layout_of(args))
    checks = [
        _passes("flags", lambda: check_flags(args), "none is out of its range or contradicts another"),
        _passes(
            "sampling", lambda: check_sampling(args), "tokens are scored in a distribution that the trainer has too"
        ),
    ]
    if ":" not in args.task:
        checks.append(_passes("task", lambda: task_named(args.task), f"{args.task!r} is one of this package"))
    if args.megatron_args and importlib.util.find_spec("megatron") is not None:
        says = f"all {len(args.megatron_args)} are fields of TransformerConfig"
        checks.append(_passes("Megatron's arguments", lambda: check_megatron_arguments(args.megatron_args), says))
    if args.hf_checkpoint is not None:
        says = f"{args.hf_checkpoint} has the model of {args.model_config}"
        checks.append(_passes("checkpoint", lambda: check_checkpoint(args, model), says))
    plan = make_plan(request, checks)
    if plan.figures is None or not (args.traces or args.skew):
        return plan
    loads = loads_of(
        request,
        traces=sample_folders(args.traces or []),
        skew=args.skew,
        expert_share=args.expert_share,
        recompute=args.recompute_granularity is not None,
    )
    return replace(plan, loads=loads)


def check_sampling(args: argparse.Namespace) -> None:
    """Refuse sampling parameters that the loop refuses.

    Raises:
        R3Error: names the parameter.
    """
    checked_params({"temperature": args.rollout_temperature, "max_new_tokens": args.rollout_max_response_len})


def check_checkpoint(args: argparse.Namespace, model: ModelShape) -> None:
    """Refuse a checkpoint that is not there, or is of another model than --model-config.

    Raises:
        R3Error: names the folder, and the size that differs with both operands.
    """
    folder = args.hf_checkpoint
    if not folder.is_dir():
        raise R3Error(f"--hf-checkpoint {folder}: no such folder")
    if not any(folder.glob(_WEIGHTS)):
        raise R3Error(f"--hf-checkpoint {folder}: no {_WEIGHTS} in it")
    found = ModelShape.from_file(folder)
    for field in fields(ModelShape):
        have, want = getattr(found, field.name), getattr(model, field.name)
        # The configuration of a script says nothing of what weights are stored in.
        if have != want and field.name != "dtype_size":
            raise R3Error(
                f"--hf-checkpoint {folder}: {_difference(field.name, have, want)} of --model-config {args.model_config}"
            )


def _difference(name: str, have: Any, want: Any) -> str:
    if name == "moe":
        for part in ("num_layers", "num_experts", "topk", "layer_ids"):
            if getattr(have, part) != getattr(want, part):
                return f"{part} ({getattr(have, part)}) != {getattr(want, part)}"
    if name == "layers":
        at = next(at for at, pair in enumerate(zip(have, want, strict=True)) if pair[0] != pair[1])
        return f"layer {at}: {dict(have[at]._asdict())} != {dict(want[at]._asdict())}"
    return f"{name} ({have!r}) != {want!r}"


def _passes(name: str, do: Callable[[], object], says: str) -> Check:
    try:
        do()
    except R3Error as error:
        return Check(name, False, str(error))
    return Check(name, True, says)
