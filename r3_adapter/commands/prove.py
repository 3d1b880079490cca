"""`r3 prove`: the self-test of an installation."""

import argparse

from r3_adapter.arguments import (
    RECOMPUTE,
    add_engine_arguments,
    add_parallel_arguments,
    add_seed_argument,
    layout_of,
)
from r3_adapter.commands.output import print_verdict
from r3_adapter.commands.prove_url import add_url_arguments, check_url_arguments, prove_url
from r3_adapter.errors import R3Error
from r3_adapter.flag_values import output_file_or_stdout, whole
from r3_adapter.parsers import OneCommandParser, Subparsers
from r3_adapter.processes import guarded
from r3_adapter.proof.models import add_model_arguments, model_of

EXAMPLES = (
    "r3 prove --tp 2 --ep 2 --json verdict.json",
    "r3 prove --group 8 --turns 3",
    "r3 prove --model deepseek_v3 --ep 2",
    "r3 prove --ep 2 --inject shift-token",
    "r3 prove --url http://127.0.0.1:30000 --model ~/Qwen3-30B-A3B",
)


def add_prove(subparsers: Subparsers) -> None:
    """Add `r3 prove`."""
    text = "self-test: perturb the rollout's experts, replay them in Megatron on a layout, compare log-probabilities"
    parser = subparsers.add_parser("prove", help=text, description=text, examples=EXAMPLES)
    add_parallel_arguments(parser)
    _add_trainer_arguments(parser)
    add_model_arguments(parser.add_argument_group("model", "a small one with random weights, or a checkpoint's"))
    _add_rollout_arguments(parser)
    group = parser.add_argument_group("damage")
    text = "damage the routes before replay: shift-token, swap-layers or swap-samples; the self-test must then fail"
    group.add_argument("--inject", metavar="DAMAGE", help=text)
    group = parser.add_argument_group("output")
    text = "write the verdict to this file, as JSON; -: to stdout, in place of the summary"
    group.add_argument("--json", type=output_file_or_stdout, metavar="FILE", help=text)
    add_url_arguments(parser)
    parser.set_defaults(run=_prove)


def _add_trainer_arguments(parser: OneCommandParser) -> None:
    group = parser.add_argument_group("trainer", "how it takes tokens and routes")
    text = "Megatron's token dispatcher"
    group.add_argument("--dispatcher", choices=("alltoall", "allgather"), default="alltoall", help=text)
    text = "form of a micro-batch: padded (sbhd) or packed (thd)"
    group.add_argument("--qkv-format", choices=("sbhd", "thd"), default="sbhd", help=text)
    text = "which tokens of a sample a context-parallel rank has: two chunks, or one interval"
    group.add_argument("--cp-cut", choices=("zigzag", "contiguous"), default="zigzag", help=text)
    text = "exchange token counts once a step, and not in each MoE layer; default: on"
    group.add_argument("--dispatch-plan", action=argparse.BooleanOptionalAction, default=True, help=text)
    text = "give routes to the model by hooks, and not as an argument"
    group.add_argument("--attach", action="store_true", help=text)
    text = "what the hooks use: the patched argument, or Megatron's own RouterReplay; implies --attach"
    group.add_argument("--backend", choices=("auto", "patch", "native"), help=text)
    text = "order of the experts in the trainer: random; default: the checkpoint's"
    group.add_argument("--place", choices=("random",), help=text)


def _add_rollout_arguments(parser: OneCommandParser) -> None:
    group = parser.add_argument_group("rollout", "the engine, and what it is asked for")
    text = "dtype of the engine and of its checkpoint; auto: bfloat16 weights, and SGLang chooses"
    group.add_argument("--dtype", choices=("float32", "bfloat16", "auto"), default="float32", help=text)
    add_engine_arguments(group)
    text = "responses to each prompt, in one batch"
    group.add_argument("--group", type=whole(1), default=1, metavar="N", help=text)
    group.add_argument("--turns", type=whole(1), default=1, metavar="N", help="turns of each conversation")
    text = "use a KV pool that is too small for the batch, so that SGLang preempts requests and recomputes them"
    group.add_argument("--retract", action="store_true", help=text)
    add_seed_argument(group, "seed of weights, prompts, sampling and perturbation")


@guarded()
def _prove(args: argparse.Namespace) -> int:
    from r3_adapter.megatron.checks import check_layout
    from r3_adapter.megatron.policy_trainer.options import TrainerOptions
    from r3_adapter.proof.damage import INJECTIONS
    from r3_adapter.proof.engine import ProofEngine
    from r3_adapter.proof.prove import Scene, check_fits, prove
    from r3_adapter.report import progress_bars

    if args.inject not in (None, *INJECTIONS):
        raise R3Error(f"--inject {args.inject!r} is none of {', '.join(INJECTIONS)}")
    check_url_arguments(args)
    layout = layout_of(args)
    check_layout(layout)
    options = TrainerOptions(
        dispatcher=args.dispatcher,
        recompute=RECOMPUTE[args.recompute_granularity],
        qkv_format=args.qkv_format,
        cp_cut=args.cp_cut,
        distributed_optimizer=args.use_distributed_optimizer,
        dispatch_plan=args.dispatch_plan,
        attach=args.backend or ("auto" if args.attach else None),
        pipeline_model_parallel_layout=args.pipeline_model_parallel_layout,
    )
    if args.url is not None:
        return prove_url(args, layout, options)
    scene = Scene(group=args.group, retract=args.retract, turns=args.turns)
    engine = ProofEngine(args.dtype, args.sglang_args)
    # Before the bars are shown.
    model = model_of(args)
    check_fits(layout, options, model, scene, engine)
    starts = "the engine starts" if model.engine == "sglang" else "the model is loaded"
    with progress_bars({"rollout": starts, "trainer": "after the rollout"}) as progress:
        verdict = prove(
            layout,
            options,
            model=model,
            seed=args.seed,
            scene=scene,
            engine=engine,
            injection=args.inject,
            place=args.place,
            progress=progress,
        )
    return print_verdict(verdict, args.json)
