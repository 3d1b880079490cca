"""Flags of a run are refused before anything is started, and a run is not gone on with as another."""

import argparse
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from r3_adapter.arguments import add_layout_arguments, add_r3_arguments, add_rl_arguments
from r3_adapter.cli import main
from r3_adapter.errors import R3Error
from r3_adapter.layout import ParallelLayout
from r3_adapter.megatron.policy_trainer.trainer import PolicyOptions
from r3_adapter.ray.options import LoopOptions, check_same_run
from r3_adapter.rl.checks import check_flags
from r3_adapter.rl.losses import Objective
from r3_adapter.sglang.settings import EngineSettings

LAG = (
    "rollout lag (1) > 0: such rollouts have rows of other weights, which staleness 'refuse' refuses; choose 'keep' or "
    "'live' (--r3-staleness)"
)
REFUSED = {
    "--r3 --rollout-lag 1": LAG,
    "--rollout-lag -1": "--rollout-lag (-1) < 0",
    "--micro-batch-size 0": "--micro-batch-size (0) < 1",
    "--rollout-num-engines 0": "--rollout-num-engines (0) < 1",
    "--num-rollout 0": "--num-rollout (0) < 1",
    "--rollout-temperature 0": "--rollout-temperature (0.0): the samples of a prompt are all the same, so every "
    "advantage is 0 and nothing is learned",
    "--lr nan": "--lr (nan) is not a finite number from 0 on",
    "--eps-clip -0.1": "--eps-clip (-0.1) is not a finite number from 0 on",
    '--sglang-args {"tp_size":2}': "--sglang-args tp_size (2) != --rollout-tp-size (1)",
    "--num-steps-per-rollout 200": "128 samples of a step < 200 micro-batches (dp 1 x 200, a multiple of 200 optimizer "
    "steps)",
    "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2 --rollout-batch-size 1 "
    "--n-samples-per-prompt 3 --micro-batch-size 1": "3 samples of a step < 4 micro-batches (dp 1 x 4, a multiple of 1 "
    "optimizer steps x pp 2)",
}


def parsed(text: str) -> argparse.Namespace:
    return add_rl_arguments(add_layout_arguments(add_r3_arguments(argparse.ArgumentParser()))).parse_args(text.split())


@pytest.mark.parametrize("flags", REFUSED)
def test_flags_that_contradict_each_other_are_refused(flags: str) -> None:
    with pytest.raises(R3Error) as caught:
        check_flags(parsed(flags))
    assert str(caught.value) == REFUSED[flags]


@pytest.mark.parametrize("flags", ["", "--r3", "--r3 --rollout-lag 1 --r3-staleness keep", "--r2 --rollout-lag 1"])
def test_others_are_not(flags: str) -> None:
    check_flags(parsed(flags))


def test_a_plan_says_what_the_loop_would(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(__file__).parents[2] / "launch" / "configs"
    model = next(iter(sorted(path.rglob("*qwen3-30b*"))))
    assert main(["plan", "--model-config", str(model), "--r3", "--rollout-lag", "1"]) == 1
    assert capsys.readouterr().err.endswith(f"r3 plan: does not fit: {LAG}\n")


OPTIONS = LoopOptions(
    folder=Path("/run"),
    checkpoint=Path("/run/supervised"),
    layout=ParallelLayout(),
    policy=PolicyOptions(),
    engine=EngineSettings("/run/supervised", extra={"api_key": "s3cr3t"}),
    task="sort",
    sampling_params={"temperature": 1.0},
)
MAY_CHANGE: Mapping[str, Any] = {
    "num_rollouts": 7,
    "save_interval": 3,
    "timeout": 1.0,
    "rollout_timeout": 1.0,
    "num_engines": 2,
    "agreement_interval": 3,
    "record": Path("/elsewhere"),
    "num_gpus_per_rank": 1.0,
}
MAY_NOT: Mapping[str, Any] = {
    "policy": replace(OPTIONS.policy, replay="r3"),
    "layout": ParallelLayout(tp=2, etp=2),
    "checkpoint": Path("/other"),
    "task": "add",
    "seed": 1,
    "lag": 1,
    "batch_size": 17,
    "samples_per_prompt": 9,
    "micro_batch_size": 4,
    "sampling_params": {"temperature": 0.9},
    "engine": replace(OPTIONS.engine, tp_size=2),
}


@pytest.mark.parametrize("name", MAY_CHANGE)
def test_a_run_goes_on_with_more_steps_and_other_machines(name: str) -> None:
    moved = replace(OPTIONS, folder=Path("/moved"), checkpoint=Path("/moved/supervised"), **{name: MAY_CHANGE[name]})
    check_same_run(OPTIONS.folder, OPTIONS.fixed(), moved.fixed())


@pytest.mark.parametrize("name", MAY_NOT)
def test_a_run_does_not_go_on_as_another(name: str) -> None:
    other = replace(OPTIONS, **{name: MAY_NOT[name]})
    with pytest.raises(R3Error, match=rf"^/run: holds a run with {name}\S* .* != .*; take another folder"):
        check_same_run(OPTIONS.folder, json.loads(json.dumps(OPTIONS.fixed())), other.fixed())


def test_every_part_of_the_policy_is_compared_and_no_secret_is_kept() -> None:
    assert "s3cr3t" not in json.dumps(OPTIONS.fixed())
    assert {f"policy.objective.{name}" for name in vars(Objective())} <= OPTIONS.fixed().keys()
    with pytest.raises(R3Error, match=r"holds a run with policy\.objective\.kl_coef 0\.0 != 0\.1; take"):
        other = replace(OPTIONS, policy=replace(OPTIONS.policy, objective=Objective(kl_coef=0.1)))
        check_same_run(OPTIONS.folder, OPTIONS.fixed(), other.fixed())
