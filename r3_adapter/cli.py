"""The `r3` command.

Exit codes: 0 done; 1 a check said no (`patch verify`, `prove`, `plan`, `doctor`); 2 refused or used wrongly, with the
reason on stderr.

A subcommand is a function that adds its parser and sets `run`; list it in COMMANDS. Import engines and torch inside
`run` only: `r3 patch` has to work before they can be imported.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r3_adapter import arguments, patching, source
from r3_adapter.errors import LayoutError, PatchError, R3Error
from r3_adapter.patching import Outcome, State
from r3_adapter.processes import guarded
from r3_adapter.rebase.command import add_arguments
from r3_adapter.signals import AFTER, run_command, say

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[arguments.OneCommandParser]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; return the exit code."""
    parser = arguments.OneCommandParser(
        prog="r3", description="Rollout Routing Replay between SGLang and Megatron-core."
    )
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in COMMANDS:
        add(subparsers)
    args = parser.parse_args(argv)
    return run_command("r3", lambda: args.run(args), getattr(args, "after", AFTER))


def add_patch(subparsers: "Subparsers") -> None:
    """Add `r3 patch`."""
    parser = subparsers.add_parser("patch", help="patch the engines, or take the patches back")
    parser.set_defaults(after="`r3 patch status` says how everything stands")
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    for name, run, text in (
        ("apply", _apply, "patch all or nothing; does nothing where it is done already"),
        ("revert", _revert, "restore the released files byte for byte"),
        ("status", _status, "show what is installed, what is pinned and how they stand"),
        ("verify", _verify, "exit 0 only if every distribution is patched exactly"),
    ):
        verb = verbs.add_parser(name, help=text, description=text)
        verb.add_argument("distributions", nargs="*", metavar="DISTRIBUTION", help="default: all installed ones")
        _add_site(verb)
        source.add_source(verb, name)
        verb.set_defaults(run=_installed_or_source(name, run))
    text = "for maintainers: recompute the hashes of a series from a released installation"
    verb = verbs.add_parser("lock", help=text, description=text)
    verb.add_argument("distribution", metavar="DISTRIBUTION")
    verb.add_argument("version", metavar="VERSION")
    _add_site(verb)
    verb.set_defaults(run=_lock)
    text = "for maintainers: bring a series to another release, and say what conflicts or breaks"
    verb = verbs.add_parser("rebase", help=text, description=text)
    add_arguments(verb)


def add_prove(subparsers: "Subparsers") -> None:
    """Add `r3 prove`."""
    text = "self-test: perturb the rollout's experts, replay them in Megatron on a layout, compare log-probabilities"
    parser = subparsers.add_parser("prove", help=text, description=text)
    count = arguments.whole(1)
    for name in ("tp", "pp", "vpp", "cp", "ep", "dp"):
        parser.add_argument(f"--{name}", type=count, default=1, metavar="N")
    parser.add_argument("--etp", type=count, default=None, metavar="N", help="default: as tp")
    parser.add_argument("--dispatcher", choices=("alltoall", "allgather"), default="alltoall")
    parser.add_argument("--recompute", choices=("none", "full", "moe"), default="none")
    parser.add_argument("--qkv-format", choices=("sbhd", "thd"), default="sbhd", help="padded batch, or packed")
    text = "how context parallelism cuts: two chunks of each sample a rank, or one interval"
    parser.add_argument("--cp-cut", choices=("zigzag", "contiguous"), default="zigzag", help=text)
    parser.add_argument("--distributed-optimizer", action="store_true")
    parser.add_argument(
        "--dispatch-plan",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="exchange token counts once a step, and not in each MoE layer; default: on",
    )
    parser.add_argument("--attach", action="store_true", help="hand routes over by hooks, not as an argument")
    text = "by which hooks do so: the patched Megatron's argument, or Megatron's own RouterReplay; implies --attach"
    parser.add_argument("--backend", choices=("auto", "patch", "native"), help=text)
    parser.add_argument("--pipeline-model-parallel-layout", metavar="LAYOUT", help='as Megatron has it: "Ett|tttttt|L"')
    parser.add_argument("--seed", type=arguments.whole(0, arguments.LARGEST_SEED), default=0)
    parser.add_argument("--group", type=count, default=1, metavar="N", help="samples of each prompt, in one batch")
    parser.add_argument("--turns", type=count, default=1, metavar="N", help="of each conversation")
    parser.add_argument("--retract", action="store_true", help="a KV pool too small for the batch")
    parser.add_argument("--inject", metavar="DAMAGE", help="shift-token, swap-layers or swap-samples: must then fail")
    parser.add_argument("--json", type=arguments.output_file, metavar="FILE", help="write the verdict here too")
    parser.set_defaults(run=_prove)


def add_plan(subparsers: "Subparsers") -> None:
    """Add `r3 plan`."""
    text = "without a GPU: check a layout for a model, and say what routes, weights and buffers take where"
    parser = subparsers.add_parser("plan", help=text, description=text)
    arguments.add_plan_arguments(parser)
    arguments.add_r3_arguments(parser)
    arguments.add_layout_arguments(parser)
    arguments.add_rl_arguments(parser)
    arguments.add_run_arguments(parser)
    parser.set_defaults(run=_plan)


def add_bench(subparsers: "Subparsers") -> None:
    """Add `r3 bench`."""
    parser = subparsers.add_parser("bench", help="measure what this project costs, on this machine")
    verbs = parser.add_subparsers(required=True, metavar="WHAT")
    text = "a training step with replay over the same step routed live"
    verb = verbs.add_parser("replay", help=text, description=text)
    verb.add_argument("--pairs", type=arguments.whole(2), default=20, metavar="N", help="steps of each kind, in turns")
    verb.add_argument("--json", type=arguments.output_file, metavar="FILE", help="write the figures here too")
    arguments.add_shape_arguments(verb)
    verb.set_defaults(run=_bench_replay)
    text = "three engines, capture off, as released and patched, taking turns: time, bytes and host memory"
    verb = verbs.add_parser("capture", help=text, description=text)
    verb.add_argument("--pairs", type=arguments.whole(2), default=9, metavar="N", help="turns that are compared")
    verb.add_argument("--json", type=arguments.output_file, metavar="FILE", help="write the figures here too")
    verb.set_defaults(run=_bench_capture)
    text = "repack beside memcpy, numpy and torch on the same routes; set coding"
    verb = verbs.add_parser("repack", help=text, description=text)
    verb.add_argument(
        "--max-mib", type=arguments.whole(1), default=4096, metavar="N", help="routes of the largest step timed"
    )
    verb.add_argument("--json", type=arguments.output_file, metavar="FILE", help="write the figures here too")
    verb.set_defaults(run=_bench_repack)


def add_report(subparsers: "Subparsers") -> None:
    """Add `r3 report`."""
    text = "write one HTML page that compares runs; seeds of one variant are taken together"
    parser = subparsers.add_parser("report", help=text, description=text)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, also one under way")
    parser.add_argument(
        "--out", type=arguments.output_file, default="report.html", metavar="FILE", help="default: report.html"
    )
    parser.set_defaults(run=_report_runs)


def add_doctor(subparsers: "Subparsers") -> None:
    """Add `r3 doctor`."""
    text = "say how this machine and installation stand, a line each with what to do: quote it when you report a fault"
    parser = subparsers.add_parser("doctor", help=text, description=text)
    parser.add_argument("--json", type=arguments.output_file, metavar="FILE", help="write the findings here too")
    parser.set_defaults(run=_doctor)


def add_balance(subparsers: "Subparsers") -> None:
    """Add `r3 balance`."""
    text = "how even the loads of expert-parallel ranks are, and what placing experts and packing samples would give"
    parser = subparsers.add_parser("balance", help=text, description=text)
    parser.add_argument(
        "traces", nargs="*", type=Path, metavar="TRACES", help="folders that --save-rollouts has written"
    )
    parser.add_argument("--simulate", metavar="SKEW", help="in place of traces: mild, medium or strong")
    parser.add_argument(
        "--ep", type=arguments.whole(1), required=True, metavar="N", help="ranks that share experts out"
    )
    text = "of a micro-step of all these ranks together; default: 32768"
    parser.add_argument("--max-tokens", type=arguments.whole(1), default=32768, metavar="N", help=text)
    text = "of a router that is limited to groups; default: 1"
    parser.add_argument("--groups", type=arguments.whole(1), default=1, metavar="N", help=text)
    parser.add_argument("--seed", type=arguments.whole(0, arguments.LARGEST_SEED), default=0)
    parser.add_argument("--json", type=arguments.output_file, metavar="FILE", help="write the figures here too")
    parser.set_defaults(run=_balance)


COMMANDS: tuple[Callable[["Subparsers"], None], ...] = (
    add_patch,
    add_prove,
    add_plan,
    add_bench,
    add_report,
    add_balance,
    add_doctor,
)


def _add_site(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--site", type=Path, metavar="DIR", help="site-packages folder (default: this interpreter's)")


def _installed_or_source(name: str, run: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """Return what runs a verb of `r3 patch` on the installed engines, or on the git tree that --source names."""

    def either(args: argparse.Namespace) -> int:
        source.check_options(args)
        return source.run_source(name, args) if args.source else run(args)

    return either


def _apply(args: argparse.Namespace) -> int:
    return _report(*patching.each(patching.apply, args.distributions, site=args.site), "applied")


def _revert(args: argparse.Namespace) -> int:
    return _report(*patching.each(patching.revert, args.distributions, site=args.site), "reverted")


def _report(outcomes: Sequence[Outcome], refusals: Sequence[PatchError], done: str) -> int:
    for outcome in outcomes:
        did = f"{done}, {len(outcome.changed)} files changed" if outcome.changed else f"already {done}, nothing to do"
        print(f"{outcome.distribution} {outcome.version}".rstrip() + f": {did}")
    for refusal in refusals:
        print(f"r3: {refusal}", file=sys.stderr)
    return 2 if refusals else 0


def _status(args: argparse.Namespace) -> int:
    for found in patching.status(args.distributions, site=args.site):
        installed, pinned = found.installed or "-", ", ".join(found.pinned) or "-"
        said = f"{found.distribution}: {found.state} (installed: {installed}; pinned: {pinned})"
        todo = found.reason or patching.advice(found)
        print(f"{said}: {todo}" if todo else said)
    return 0


def _verify(args: argparse.Namespace) -> int:
    found = patching.status(args.distributions, site=args.site)
    missing = State.NOT_INSTALLED
    checked = found if args.distributions else [status for status in found if status.state is not missing] or found
    for status in checked:
        print(patching.explain(status))
    return 0 if checked and all(status.state is State.APPLIED for status in checked) else 1


def _lock(args: argparse.Namespace) -> int:
    series = patching.lock(args.distribution, args.version, site=args.site)
    print(f"{series.distribution} {series.version}: locked {len(series.files)} files")
    return 0


@guarded()
def _prove(args: argparse.Namespace) -> int:
    from r3_adapter.layout import ParallelLayout
    from r3_adapter.megatron.checks import check_layout
    from r3_adapter.megatron.request import TrainerOptions
    from r3_adapter.prove import INJECTIONS, Scene, check_fits, prove
    from r3_adapter.report import progress_bars

    if args.inject not in (None, *INJECTIONS):
        raise R3Error(f"--inject {args.inject!r} is none of {', '.join(INJECTIONS)}")
    sizes = {name: getattr(args, name) for name in ("tp", "pp", "vpp", "cp", "ep", "etp", "dp")}
    layout = ParallelLayout.smallest(**sizes)
    check_layout(layout)
    options = TrainerOptions(
        dispatcher=args.dispatcher,
        recompute=args.recompute,
        qkv_format=args.qkv_format,
        cp_cut=args.cp_cut,
        distributed_optimizer=args.distributed_optimizer,
        dispatch_plan=args.dispatch_plan,
        attach=args.backend or ("auto" if args.attach else None),
        pipeline_model_parallel_layout=args.pipeline_model_parallel_layout,
    )
    scene = Scene(group=args.group, retract=args.retract, turns=args.turns)
    # Before the bars are shown.
    check_fits(layout, options)
    with progress_bars(("rollout", "trainer")) as ticks:
        verdict = prove(layout, options, seed=args.seed, scene=scene, injection=args.inject, ticks=ticks)
    _print_json(verdict.to_json(), args.json)
    say(f"r3 prove: {verdict.sentence}")
    return 0 if verdict.passed else 1


def _plan(args: argparse.Namespace) -> int:
    from rich.console import Console

    from r3_adapter.plan.command import plan_of
    from r3_adapter.plan.tables import print_plan
    from r3_adapter.rl.checks import check_flags

    try:
        plan = plan_of(args)
    except LayoutError as error:
        print(f"r3 plan: does not fit: {error}", file=sys.stderr)
        return 1
    print_plan(plan, Console(width=None if sys.stdout.isatty() else 120))
    if args.json:
        args.json.write_text(json.dumps(plan.to_json(), indent=2) + "\n", encoding="utf-8")
    try:
        check_flags(args)
    except R3Error as error:
        print(f"r3 plan: does not fit: {error}", file=sys.stderr)
        return 1
    return 0 if plan.passed else 1


@guarded()
def _bench_replay(args: argparse.Namespace) -> int:
    if args.shape is not None:
        # Without what the rollout and the bar need: the machine with the GPU may have Megatron-core alone.
        from r3_adapter.bench.shape import bench_shape

        sizes = {"num_layers": args.layers, "num_tokens": args.tokens, "router_tokens": args.router_tokens}
        figures = bench_shape(args.shape, device=args.device, rounds=args.pairs, parts=args.parts, **sizes)
        _print_json(figures, args.json)
        return 0
    if args.device != "cpu":
        raise R3Error(f"--device {args.device} needs --shape: the step that is measured without one runs on a CPU")
    from r3_adapter.bench.replay import bench_replay
    from r3_adapter.report import progress_bars

    with progress_bars(("steps",)) as (tick,):
        figures = bench_replay(pairs=args.pairs, progress=tick)
    _print_json(figures, args.json)
    return 0


@guarded()
def _bench_capture(args: argparse.Namespace) -> int:
    from r3_adapter.bench.capture import bench_capture
    from r3_adapter.report import progress_bars

    with progress_bars(("turns",)) as (tick,):
        figures = bench_capture(pairs=args.pairs, progress=tick)
    _print_json(figures, args.json)
    return 0


@guarded()
def _bench_repack(args: argparse.Namespace) -> int:
    from r3_adapter.bench.repack import bench_repack

    _print_json(bench_repack(max_mib=args.max_mib), args.json)
    return 0


def _report_runs(args: argparse.Namespace) -> int:
    from r3_adapter.report import last_line
    from r3_adapter.runs.page import write_page
    from r3_adapter.runs.verdict import verdicts

    runs = write_page(args.out, args.runs)
    for said in verdicts(runs):
        print(said)
    for run in runs:
        print(last_line(run.summary, args.out))
    return 0


def _balance(args: argparse.Namespace) -> int:
    from rich.console import Console

    from r3_adapter.balance.command import balance, table_of

    found = balance(args)
    Console(width=None if sys.stdout.isatty() else 120).print(table_of(found, args.ep))
    if args.json:
        args.json.write_text(json.dumps(found.to_json(), indent=2) + "\n", encoding="utf-8")
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from r3_adapter.doctor import Grade, examine, summary, to_json

    findings = examine()
    for each in findings:
        print(each, flush=True)
    print(summary(findings))
    if args.json:
        args.json.write_text(to_json(findings) + "\n", encoding="utf-8")
    return 1 if any(each.grade is Grade.BAD for each in findings) else 0


def _print_json(report: Mapping[str, Any], path: Path | None) -> None:
    text = json.dumps(report, indent=2)
    # First where nothing can be lost: the disk may be full by now.
    print(text, flush=True)
    if path:
        path.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
