"""GRPO with SGLang rollouts and Megatron training on Ray; --r3 replays the rollout's routes.

Without --hf-checkpoint a tiny model learns to sort digits on this machine, no GPU needed.
"""

import argparse
import shutil
import signal
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import FrameType

from r3_adapter.arguments import (
    add_layout_arguments,
    add_r3_arguments,
    add_rl_arguments,
    add_run_arguments,
    layout_of,
    make_folder,
)
from r3_adapter.errors import R3Error
from r3_adapter.megatron.policy import PolicyOptions
from r3_adapter.megatron.request import TrainerOptions
from r3_adapter.ray.cluster import cluster
from r3_adapter.ray.loop import Loop
from r3_adapter.ray.options import LoopOptions
from r3_adapter.ray.supervised import supervise
from r3_adapter.report import last_line, run_progress
from r3_adapter.rl.checks import check_flags
from r3_adapter.rl.losses import Objective
from r3_adapter.rl.preflight import check_model, check_report
from r3_adapter.rl.tasks import END, VOCABULARY, task_named
from r3_adapter.runs.page import write_page
from r3_adapter.sglang.settings import EngineSettings
from r3_adapter.tiny import ENGINE, TinyModel, write_checkpoint

TINY = TinyModel(num_layers=4, num_experts=16, topk=4, vocab_size=VOCABULARY, max_length=256, initializer_range=0.06)
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(BaseException):
    """A signal asks the run to end."""


class Signals:
    """Raises Stopped at the first signal that ends a process; later ones wait until everything has ended.

    came: the signal, once it has come. Ray's C++ code may raise something else in place of Stopped.
    """

    came: signal.Signals | None = None

    def arm(self) -> None:
        """Set the handlers, in place of those that somebody else has put there."""
        for number in SIGNALS:
            signal.signal(number, self._stop)

    def _stop(self, number: int, _: FrameType | None) -> None:
        for each in SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        self.came = signal.Signals(number)
        raise Stopped


def main() -> None:
    """Run it, or go on with the run that is in its folder."""
    args = parse()
    check_flags(args)
    check_report()
    task = task_named(args.task)
    loop = Loop(options_of(args, args.hf_checkpoint or args.save / "supervised"))
    signals = Signals()
    try:
        signals.arm()
        if args.hf_checkpoint:
            check_model(args, args.hf_checkpoint, task)
        make_folders(args)
        if not args.hf_checkpoint:
            check_model(args, random_checkpoint(args), task)
        if loop.first:
            say(f"{args.save} goes on from step {loop.first} ({loop.checkpoints.path(loop.first)})")
        with cluster(args.ray_address):
            signals.arm()
            if not args.hf_checkpoint:
                supervised_checkpoint(args)
            run(loop)
    except BaseException:
        if signals.came is None:
            raise
        say(f"stopped by {signals.came.name} {where(loop)}")
        sys.exit(128 + signals.came)
    page = args.save / "report.html"
    (found,) = write_page(page, [args.save])
    print(last_line(found.summary, page))


def run(loop: Loop) -> None:
    """Run the loop under a progress bar."""
    options = loop.options
    with run_progress(options.config["name"], options.num_rollouts, loop.first) as show:

        def observe(loop: Loop, step: int, stage: str) -> None:
            if stage in ("rollout", "end") and loop.last_metrics:
                show(loop.last_metrics)

        loop.observe = observe
        loop.run()


def where(loop: Loop) -> str:
    """Say at which step a run was stopped, and what of it is kept."""
    steps = loop.checkpoints.steps()
    if not steps:
        return f"at step {loop.step}; no step is saved yet: the same command begins anew"
    kept = loop.checkpoints.path(steps[-1])
    return f"at step {loop.step}; step {steps[-1]} is saved in {kept}: the same command goes on from there"


def say(line: str) -> None:
    """Tell whoever watches."""
    print(f"grpo: {line}", file=sys.stderr, flush=True)


def parse() -> argparse.Namespace:
    """Return the flags."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_run_arguments(add_rl_arguments(add_layout_arguments(add_r3_arguments(parser))))
    args = parser.parse_args()
    # Processes of a cluster that runs already are not in this one's folder.
    args.save, args.save_rollouts = args.save.resolve(), args.save_rollouts and args.save_rollouts.resolve()
    return args


def make_folders(args: argparse.Namespace) -> None:
    """Make the run's folder and that of its rollouts, which others cannot read.

    Raises:
        R3Error: they cannot be made or written to.
    """
    for folder in (args.save, args.save_rollouts):
        if folder is not None:
            make_folder(folder, mode=0o700)


def random_checkpoint(args: argparse.Namespace) -> Path:
    """Return a tiny model with random weights."""
    folder: Path = args.save / "random"
    if not (folder / "model.safetensors").exists():
        write_checkpoint(folder, dtype="bfloat16", seed=args.seed, shape=TINY)
    return folder


def supervised_checkpoint(args: argparse.Namespace) -> None:
    """Let the tiny model see some right answers, so that it has a reward to begin with."""
    folder, partial = args.save / "supervised", args.save / "supervised.partial"
    if folder.exists():
        return
    shutil.rmtree(partial, ignore_errors=True)
    with run_progress("supervised", args.sft_steps) as show:
        supervise(
            random_checkpoint(args),
            partial,
            task_named(args.task),
            layout_of(args),
            replace(policy_of(args), replay="off", lr=2e-3),
            num_steps=args.sft_steps,
            batch_size=64,
            seed=args.seed,
            progress=lambda step, loss: show({}),
        )
    partial.rename(folder)


def policy_of(args: argparse.Namespace) -> PolicyOptions:
    """Return how the policy is trained."""
    low = args.eps_clip if args.eps_clip is not None else {"grpo": 0.2, "gspo": 3e-4}[args.advantage_estimator]
    recompute = {None: "none", "full": "full", "selective": "moe"}[args.recompute_granularity]
    return PolicyOptions(
        objective=Objective(
            estimator=args.advantage_estimator,
            eps_clip=low,
            eps_clip_high=low if args.eps_clip_high is None else args.eps_clip_high,
            tis_clip=args.tis_clip if args.use_tis else None,
            kl_coef=args.kl_loss_coef,
        ),
        replay="r3" if args.r3 else "r2" if args.r2 else "off",
        staleness=args.r3_staleness,
        num_steps=args.num_steps_per_rollout,
        lr=args.lr,
        clip_grad=args.clip_grad,
        cpu_offload=args.optimizer_cpu_offload,
        trainer=TrainerOptions(
            qkv_format="thd",
            recompute=recompute,
            distributed_optimizer=args.use_distributed_optimizer,
            pipeline_model_parallel_layout=args.pipeline_model_parallel_layout,
            megatron_arguments=args.megatron_args,
        ),
    )


def options_of(args: argparse.Namespace, checkpoint: Path) -> LoopOptions:
    """Return what the run does."""
    layout = layout_of(args)
    flags = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    sizes = {name: getattr(layout, name) for name in ("tp", "pp", "vpp", "cp", "ep", "etp", "dp")}
    return LoopOptions(
        folder=args.save,
        checkpoint=checkpoint,
        layout=layout,
        policy=policy_of(args),
        engine=EngineSettings(
            model_path=str(checkpoint),
            tp_size=args.rollout_tp_size,
            pp_size=args.rollout_pp_size,
            radix_cache=True,
            random_seed=args.seed,
            # The tiny model's pool; a real one gets what SGLang finds room for.
            max_total_tokens=None if args.hf_checkpoint else ENGINE["max_total_tokens"],
            max_running_requests=args.rollout_batch_size * args.n_samples_per_prompt,
            extra=args.sglang_args,
        ),
        task=args.task,
        sampling_params={
            "temperature": args.rollout_temperature,
            "max_new_tokens": args.rollout_max_response_len,
            "stop_token_ids": [END],
        },
        num_engines=args.rollout_num_engines,
        batch_size=args.rollout_batch_size,
        samples_per_prompt=args.n_samples_per_prompt,
        micro_batch_size=args.micro_batch_size,
        lag=args.rollout_lag,
        num_rollouts=args.num_rollout,
        seed=args.seed,
        save_interval=args.save_interval,
        record=args.save_rollouts,
        num_gpus_per_rank=args.gpus_per_rank,
        num_gpus_per_engine=args.gpus_per_rank * args.rollout_tp_size * args.rollout_pp_size,
        config={
            "name": args.name or args.save.name,
            "flags": flags,
            "model": str(args.hf_checkpoint or "tiny Qwen3-MoE"),
            "layout": sizes,
            "seed": args.seed,
            "versions": {name: version(name) for name in ("sglang", "megatron-core", "torch", "ray", "r3-adapter")},
        },
    )


if __name__ == "__main__":
    try:
        main()
    except R3Error as error:
        say(str(error))
        sys.exit(2)
