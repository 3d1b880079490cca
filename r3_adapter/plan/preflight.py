"""What a run must have before anything is started: its model, its task, and the packages that its report needs."""

import argparse
import importlib.util
import warnings
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from r3_adapter.arguments import add_layout_arguments, add_plan_arguments, add_rl_arguments, layout_of
from r3_adapter.errors import LayoutError, R3Error, ReplayError
from r3_adapter.layout import ParallelLayout
from r3_adapter.megatron.config_fields import NATIVE_REFUSED, refusals
from r3_adapter.megatron.policy_trainer.checkpoint import Checkpoint
from r3_adapter.megatron.policy_trainer.options import TrainerOptions
from r3_adapter.plan.checks import checks_of_model
from r3_adapter.plan.model import ModelShape
from r3_adapter.plan.request import PlanRequest
from r3_adapter.rl.tasks import Task


def check_report() -> None:
    """Refuse a run whose report could not be written at its end.

    Raises:
        R3Error: Bokeh is not installed.
    """
    if importlib.util.find_spec("bokeh") is None:
        raise R3Error("the run's report is drawn with Bokeh, which is not installed: pip install 'r3-adapter[report]'")


def check_model(args: argparse.Namespace, folder: Path, task: Task) -> None:
    """Refuse a checkpoint that the flags or the task do not fit.

    args: flags of the loop.

    Raises:
        R3Error: the first thing that does not fit, with both operands.
    """
    with Checkpoint(folder) as checkpoint:
        config = checkpoint.config
    if config.get("model_type") != "qwen3_moe":
        raise R3Error(f"{folder}: model_type {config.get('model_type')!r} != 'qwen3_moe', the one that is trained here")
    _check_tokens(folder, config, task)
    _check_plan(vars(args), folder, layout_of(args))
    check_megatron_arguments(args.megatron_args)


def check_gpus(layout: ParallelLayout) -> None:
    """Refuse more ranks than this machine has GPUs, since NCCL lets no two share one; without any, ranks use CPUs.

    Raises:
        LayoutError: with both numbers.
    """
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else layout.world_size
    if layout.world_size > gpus:
        raise LayoutError(
            f"a layout of {layout.world_size} ranks > {gpus} GPUs of this machine, of which each rank needs one: take "
            "a smaller layout, such as --ep 1"
        )


def check_trainer(folder: Path, layout: ParallelLayout, options: TrainerOptions) -> None:
    """Refuse a layout or options of the trainer that a checkpoint's model does not fit.

    Raises:
        R3Error: the first thing that does not fit, with both operands.
    """
    check_megatron_arguments(options.megatron_arguments)
    if options.attach == "native":
        for name, found, wanted, why in refusals(NATIVE_REFUSED, options.megatron_arguments):
            raise ReplayError(f"backend 'native': {name} ({found!r}) != {wanted}: {why}")
    flags = {
        "pipeline_model_parallel_layout": options.pipeline_model_parallel_layout,
        "megatron_args": options.megatron_arguments,
    }
    _check_plan(flags, folder, layout)


def _check_plan(flags: Mapping[str, Any], folder: Path, layout: ParallelLayout) -> None:
    """Ask what `r3 plan` asks of a model; flags: those that are not the default."""
    parser = add_rl_arguments(add_layout_arguments(add_plan_arguments(argparse.ArgumentParser())))
    defaults = parser.parse_args(["--model-config", str(folder)])
    given = argparse.Namespace(**{**vars(defaults), **flags})
    for check in checks_of_model(PlanRequest.from_args(given, ModelShape.from_file(folder), layout)):
        if not check.passed:
            raise R3Error(f"{check.name}: {check.says}")


def _check_tokens(folder: Path, config: Mapping[str, Any], task: Task) -> None:
    rng = np.random.default_rng(0)
    prompts = [task.prompt(rng) for _ in range(32)]
    turns = [turn for prompt in prompts for turn in task.answer(prompt)]
    largest = max(token for tokens in (*prompts, *turns) for token in tokens)
    if largest >= config["vocab_size"]:
        raise R3Error(f"{folder}: vocab_size ({config['vocab_size']}) <= token {largest} of the task")


def check_megatron_arguments(arguments: Mapping[str, Any]) -> None:
    """Refuse arguments that are no fields of Megatron's TransformerConfig.

    Raises:
        R3Error: names the first one.
    """
    if not arguments:
        return
    with warnings.catch_warnings():
        # Of what is not installed.
        warnings.simplefilter("ignore")
        from megatron.core.transformer.transformer_config import TransformerConfig

    known = {field.name for field in fields(TransformerConfig)}
    if unknown := sorted(arguments.keys() - known):
        raise R3Error(f"--megatron-args {unknown[0]!r} is no field of TransformerConfig")
