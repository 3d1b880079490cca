"""`r3 bench`: what this project costs, on this machine."""

import argparse
from collections.abc import Callable

from r3_adapter.arguments import add_capture_arguments, add_json_argument, add_shape_arguments
from r3_adapter.commands.output import print_json
from r3_adapter.errors import R3Error
from r3_adapter.flag_values import whole
from r3_adapter.parsers import OneCommandParser, Subparsers
from r3_adapter.processes import guarded

EXAMPLES = {
    "replay": (
        "r3 bench replay --json replay.json",
        "r3 bench replay --shape qwen3-30b-a3b --device cuda --pairs 10",
    ),
    "capture": (
        "r3 bench capture --json capture.json",
        "r3 bench capture --shape qwen3-30b-a3b --device cuda",
    ),
    "repack": ("r3 bench repack --max-mib 1024 --json repack.json",),
}


def add_bench(subparsers: Subparsers) -> None:
    """Add `r3 bench`."""
    text = "measure what this project costs, on this machine"
    parser = subparsers.add_parser("bench", help=text, description=text)
    verbs = parser.add_subparsers(required=True, metavar="WHAT", title="what")
    text = "a training step with replay over the same step routed live"
    verb = _add_verb(verbs, "replay", _bench_replay, text)
    verb.add_argument("--pairs", type=whole(2), default=20, metavar="N", help="steps of each kind, in turns")
    add_shape_arguments(verb)
    text = "three engines, capture off, as released and patched, taking turns: time, bytes and host memory"
    verb = _add_verb(verbs, "capture", _bench_capture, text)
    verb.add_argument("--pairs", type=whole(2), default=9, metavar="N", help="turns that are compared")
    add_capture_arguments(verb)
    text = "repack beside memcpy, numpy and torch on the same routes; set coding"
    verb = _add_verb(verbs, "repack", _bench_repack, text)
    text = "largest step that is timed, in MiB of routes"
    verb.add_argument("--max-mib", type=whole(1), default=4096, metavar="N", help=text)


def _add_verb(verbs: Subparsers, name: str, run: Callable[[argparse.Namespace], int], text: str) -> OneCommandParser:
    verb = verbs.add_parser(name, help=text, description=text, examples=EXAMPLES[name])
    add_json_argument(verb)
    verb.set_defaults(run=run)
    return verb


@guarded()
def _bench_replay(args: argparse.Namespace) -> int:
    if args.shape is not None:
        # Without what the rollout and the bar need: the machine with the GPU may have Megatron-core alone.
        from r3_adapter.bench.shape import bench_shape

        sizes = {"num_layers": args.layers, "num_tokens": args.tokens, "router_tokens": args.router_tokens}
        figures = bench_shape(args.shape, device=args.device, rounds=args.pairs, parts=args.parts, **sizes)
        print_json(figures, args.json)
        return 0
    if args.device != "cpu":
        raise R3Error(f"--device {args.device} needs --shape: the step that is measured without one runs on a CPU")
    from r3_adapter.bench.replay import bench_replay
    from r3_adapter.report import progress_bars

    with progress_bars({"steps": "the trainer starts"}) as (progress,):
        figures = bench_replay(pairs=args.pairs, progress=progress)
    print_json(figures, args.json)
    return 0


@guarded()
def _bench_capture(args: argparse.Namespace) -> int:
    from r3_adapter.bench.capture import bench_capture
    from r3_adapter.report import progress_bars

    with progress_bars({"turns": "the engine starts"}) as (progress,):
        shape = {"shape": args.shape, "num_layers": args.layers, "device": args.device, "extra": args.sglang_args}
        figures = bench_capture(pairs=args.pairs, progress=progress, **shape)
    print_json(figures, args.json)
    return 0


@guarded()
def _bench_repack(args: argparse.Namespace) -> int:
    from r3_adapter.bench.repack import bench_repack

    print_json(bench_repack(max_mib=args.max_mib), args.json)
    return 0
