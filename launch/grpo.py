"""GRPO with SGLang rollouts and Megatron training on Ray; --r3 replays the rollout's routes.

Without --hf-checkpoint a tiny model learns to sort digits on this machine, no GPU needed.
"""

import argparse
import shutil
import sys
from contextlib import ExitStack
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from r3_adapter.arguments import RECOMPUTE, layout_of
from r3_adapter.commands.loop import loop_parser
from r3_adapter.flag_values import make_folder
from r3_adapter.megatron.policy_trainer.learning_rate import LearningRate
from r3_adapter.megatron.policy_trainer.options import TrainerOptions
from r3_adapter.megatron.policy_trainer.trainer import PolicyOptions
from r3_adapter.plan.preflight import check_model, check_report
from r3_adapter.proof.tiny import ENGINE, TinyModel, write_checkpoint
from r3_adapter.ray.cluster import cluster
from r3_adapter.ray.console import begins, stopped, timed, told
from r3_adapter.ray.loop import Loop
from r3_adapter.ray.options import LoopOptions
from r3_adapter.ray.supervised import supervise
from r3_adapter.report import last_line, run_progress
from r3_adapter.rl.checks import check_flags
from r3_adapter.rl.data import DataSource, prompt_data
from r3_adapter.rl.losses import Objective
from r3_adapter.rl.tasks import END, VOCABULARY, Task, task_named
from r3_adapter.runs.page import write_page
from r3_adapter.sglang.settings import EngineSettings
from r3_adapter.signals import AFTER, run_command, say

TINY = TinyModel(num_layers=4, num_experts=16, topk=4, vocab_size=VOCABULARY, max_length=256, initializer_range=0.06)


def main(args: argparse.Namespace, begun: list[Loop]) -> None:
    """Run it, or go on with the run that is in its folder; begun: gets the loop, once there is one."""
    check_flags(args)
    check_report()
    task = task_of(args)
    loop = Loop(options_of(args, args.hf_checkpoint or args.save / "supervised"))
    begun.append(loop)
    if args.hf_checkpoint:
        check_model(args, args.hf_checkpoint, task)
    make_folders(args)
    if not args.hf_checkpoint:
        check_model(args, random_checkpoint(args), task)
    say(f"grpo: {begins(loop)}")
    with ExitStack() as stack:
        with timed("grpo", f"Ray is ready at {args.ray_address}" if args.ray_address else "Ray started"):
            stack.enter_context(cluster(args.ray_address))
        if not args.hf_checkpoint:
            supervised_checkpoint(args)
        with told(loop, "grpo"):
            loop.run()
    page = args.save / "report.html"
    with timed("grpo", f"report written: {page}"):
        (found,) = write_page(page, [args.save])
    print(last_line(found.summary, page))


def parse() -> argparse.Namespace:
    """Return the flags."""
    args = loop_parser().parse_args()
    # Processes of a cluster that runs already are not in this one's folder.
    args.save, args.save_rollouts = args.save.resolve(), args.save_rollouts and args.save_rollouts.resolve()
    return args


def data_source(args: argparse.Namespace) -> DataSource:
    """Return where the run's own prompts are."""
    return DataSource(
        path=str(args.prompt_data.resolve()),
        tokenizer=str(args.hf_checkpoint.resolve()),
        reward=args.custom_rm_path,
        input_key=args.input_key,
        label_key=args.label_key,
        apply_chat_template=args.apply_chat_template,
        max_prompt_len=args.rollout_max_prompt_len,
    )


def task_of(args: argparse.Namespace) -> Task:
    """Return the task, once it is known that its prompts can be read."""
    if not args.prompt_data:
        return task_named(args.task)
    task = prompt_data(data_source(args).name)
    left_out = f"; {task.num_left_out} longer than {args.rollout_max_prompt_len} tokens are left out"
    say(f"grpo: {args.prompt_data}: {len(task.prompts)} prompts{left_out if task.num_left_out else ''}")
    return task


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
    steps = args.sft_steps
    with (
        timed("grpo", f"the tiny model has a reward to begin with: {steps} supervised steps"),
        run_progress("grpo: supervised", steps) as show,
    ):
        supervise(
            random_checkpoint(args),
            partial,
            task_named(args.task),
            layout_of(args),
            replace(policy_of(args), replay="off", lr=LearningRate(2e-3)),
            num_steps=steps,
            batch_size=64,
            seed=args.seed,
            progress=lambda step, loss: show(step + 1, {}),
        )
    partial.rename(folder)


def policy_of(args: argparse.Namespace) -> PolicyOptions:
    """Return how the policy is trained."""
    low = args.eps_clip if args.eps_clip is not None else {"grpo": 0.2, "gspo": 3e-4}[args.advantage_estimator]
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
        lr=learning_rate_of(args),
        clip_grad=args.clip_grad,
        cpu_offload=args.optimizer_cpu_offload,
        trainer=TrainerOptions(
            qkv_format="thd",
            recompute=RECOMPUTE[args.recompute_granularity],
            distributed_optimizer=args.use_distributed_optimizer,
            pipeline_model_parallel_layout=args.pipeline_model_parallel_layout,
            megatron_arguments=args.megatron_args,
        ),
    )


def learning_rate_of(args: argparse.Namespace) -> LearningRate:
    """Return the learning rate over the run."""
    decay = args.lr_decay_iters
    if decay is None and args.lr_decay_style != "constant":
        decay = args.num_rollout * args.num_steps_per_rollout
    return LearningRate(args.lr, args.min_lr, args.lr_decay_style, args.lr_warmup_iters, decay)


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
        task=data_source(args).name if args.prompt_data else args.task,
        sampling_params={
            "temperature": args.rollout_temperature,
            "max_new_tokens": args.rollout_max_response_len,
            # A model of the user's has its own.
            **({} if args.prompt_data else {"stop_token_ids": [END]}),
        },
        num_engines=args.rollout_num_engines,
        batch_size=args.rollout_batch_size,
        samples_per_prompt=args.n_samples_per_prompt,
        micro_batch_size=args.micro_batch_size,
        lag=args.rollout_lag,
        rollout_weights=args.rollout_weights,
        num_rollouts=args.num_rollout,
        seed=args.seed,
        balance=args.r3_balance,
        placement=args.r3_placement and args.r3_placement.resolve(),
        max_received=args.r3_max_received,
        save_interval=args.save_interval,
        keep_checkpoints=args.keep_checkpoints,
        eval_interval=args.eval_interval,
        eval_prompts=args.eval_prompts,
        trackers=tuple(args.tracker),
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
    begun: list[Loop] = []
    given = parse()
    sys.exit(run_command("grpo", lambda: main(given, begun), lambda: stopped(begun[0]) if begun else AFTER))
