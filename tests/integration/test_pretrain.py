"""Megatron's own training loop on recorded rollouts: launch/pretrain_r3.sh, read by what it writes to TensorBoard."""

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from r3_adapter.rollout import Sample, save_samples

pytestmark = [
    pytest.mark.engine,
    pytest.mark.megatron,
    pytest.mark.skipif(
        find_spec("megatron") is None or find_spec("megatron.training") is None,
        reason="this Megatron-core has no megatron.training",
    ),
]

SCRIPT = Path(__file__).parents[2] / "launch" / "pretrain_r3.sh"
TIMEOUT = 300
LAYOUTS: Mapping[str, tuple[int, str]] = {
    "world 1": (1, ""),
    "ep 2": (2, "--expert-model-parallel-size 2 --use-distributed-optimizer"),
    "tp 2, ep 2, packed": (
        2,
        "--tensor-model-parallel-size 2 --expert-model-parallel-size 2 --expert-tensor-parallel-size 1 "
        "--dataloader-inter-document-masking --seq-length 960 --micro-batch-size 1 --global-batch-size 2",
    ),
    "pp 2, vpp 2, mtp": (
        2,
        "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2 "
        "--mtp-num-layers 1 --mtp-loss-scaling-factor 0",
    ),
}
"""In whatever order, the samples fill one sequence of 960 tokens and a part of another."""

Scalars = dict[str, list[float]]


@pytest.fixture(scope="module")
def traces(perturbed: list[Sample], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rollout in two folders, as of two steps; one of them coded."""
    folder = tmp_path_factory.mktemp("traces")
    save_samples(folder / "0", perturbed[:10])
    save_samples(folder / "1", perturbed[10:], coded=True)
    return folder


def start(traces: Path, checkpoint: Path, world: int, arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(SCRIPT), str(traces), str(checkpoint), *arguments.split()],
        env={**os.environ, "PYTHON": sys.executable, "WORLD_SIZE": str(world)},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )


def train(traces: Path, checkpoint: Path, board: Path, world: int, arguments: str) -> Scalars:
    """Return what the run has written, by name; each value is of one iteration."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    done = start(traces, checkpoint, world, f"--tensorboard-dir {board} {arguments}")
    assert done.returncode == 0, done.stderr[-4000:]
    events = EventAccumulator(str(board))
    events.Reload()
    return {name: [each.value for each in events.Scalars(name)] for name in events.Tags()["scalars"]}


@pytest.fixture(scope="module")
def world_1(traces: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Scalars:
    return train(traces, checkpoint, tmp_path_factory.mktemp("board"), 1, "--r3 --train-iters 2")


def rollout_loss(samples: list[Sample]) -> float:
    return -float(np.concatenate([sample.logprobs for sample in samples]).mean(dtype=np.float64))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_replay_gives_the_rollouts_log_probabilities(
    traces: Path, checkpoint: Path, perturbed: list[Sample], world_1: Scalars, tmp_path: Path, layout: tuple[int, str]
) -> None:
    """Each global batch has each sample once; the first is seen with the weights of the rollout."""
    lengths = [sample.trace.num_tokens for sample in perturbed]
    assert 960 + max(lengths) < sum(lengths) < 2 * (960 - max(lengths))
    found = world_1
    if layout != LAYOUTS["world 1"]:
        found = train(traces, checkpoint, tmp_path, layout[0], f"--r3 --train-iters 2 {layout[1]}")
    assert found["lm loss"][0] == pytest.approx(rollout_loss(perturbed), abs=1e-5)
    # k3 is a mean of about d * d / 2: no token's d is larger than this.
    num_tokens = sum(sample.num_response_tokens for sample in perturbed)
    assert (2 * num_tokens * found["k3 KL to rollout"][0]) ** 0.5 < 1e-4
    # The step after it: gradients that miss a rank's part would move the loss elsewhere.
    assert found["lm loss"][1] == pytest.approx(world_1["lm loss"][1], rel=1e-5)
    assert found["lm loss"][1] < found["lm loss"][0] - 0.01
    if "inter-document" in layout[1]:
        assert found["r3 rows padding"][0] < world_1["r3 rows padding"][0]
    # Its own labels are the next but one tokens: near chance for weights at random.
    assert ("mtp_1 loss" in found) == ("mtp" in layout[1])
    assert found.get("r3 MTP layers live", [0])[0] == ("mtp" in layout[1])


def test_rows_are_counted(perturbed: list[Sample], world_1: Scalars) -> None:
    # All that is fed has a route: all tokens but the last of each sample.
    routed = sum(sample.trace.num_tokens - 1 for sample in perturbed)
    assert world_1["r3 rows replayed"][0] == pytest.approx(routed / (16 * 128))
    shares = [world_1[f"r3 rows {kind}"][0] for kind in ("replayed", "live", "padding")]
    assert sum(shares) == pytest.approx(1)
    assert shares[1] == 0
    assert world_1["r3 rows stale"] == [0, 0]


def test_without_replay_it_is_far_off(traces: Path, checkpoint: Path, perturbed: list[Sample], tmp_path: Path) -> None:
    found = train(traces, checkpoint, tmp_path, 1, "--train-iters 1")
    assert abs(found["lm loss"][0] - rollout_loss(perturbed)) > 0.1
    assert found["k3 KL to rollout"][0] > 0.1
    assert "r3 rows replayed" not in found


@pytest.mark.slow
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(traces: Path, checkpoint: Path, tmp_path: Path) -> None:
    """Three steps an epoch and a half; the run stops in the second epoch."""
    arguments = "--r3 --train-iters 5 --global-batch-size 8 --expert-model-parallel-size 2"
    whole = train(traces, checkpoint, tmp_path / "whole", 2, arguments)
    arguments += f" --save {tmp_path / 'saved'} --load {tmp_path / 'saved'}"
    head = train(traces, checkpoint, tmp_path / "head", 2, f"{arguments} --exit-interval 3 --save-interval 100")
    tail = train(traces, checkpoint, tmp_path / "tail", 2, f"{arguments} --save-interval 100")
    for name in ("lm loss", "grad-norm", "r3 rows replayed"):
        assert head[name] == whole[name][:3]
        assert tail[name] == whole[name][3:]
    assert len(set(whole["lm loss"])) == 5


def test_all_ranks_refuse_what_one_of_them_refuses(checkpoint: Path, perturbed: list[Sample], tmp_path: Path) -> None:
    damaged = replace(perturbed[3], trace=replace(perturbed[3].trace, num_experts=64))
    save_samples(tmp_path, [*perturbed[:3], damaged, *perturbed[4:]])
    done = start(tmp_path, checkpoint, 2, "--r3 --train-iters 1 --expert-model-parallel-size 2")
    assert done.returncode != 0
    # Each rank says the same, in a line.
    said = re.findall(r"^pretrain_r3: (rank \d: .*)$", done.stderr, re.MULTILINE)
    assert len(said) == 2 and len(set(said)) == 1
    assert re.search(r"sample [01]: \(experts, top-k\) \(64, 4\) of its trace != \(32, 4\) of layer 0", said[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--r2", "--r2 replays the trainer's own pass"),
        ("--r3 --data-path x", r"--data-path \(\['x'\]\): samples are those of --r3-traces"),
        ("--r3 --dataloader-inter-document-masking", "--micro-batch-size 2 != 1 with --dataloader-inter-document-mask"),
        ("--r3 --seq-length 64", r"sample \d: \d+ tokens > sequence length \(64\) \+ 1"),
        ("--r3 --r3-weight-version other", "row of weights 'default' != 'other'"),
        ("--r3 --num-layers 7", "were read by no rank"),
    ],
)
def test_what_it_cannot_follow_is_refused(traces: Path, checkpoint: Path, arguments: str, message: str) -> None:
    done = start(traces, checkpoint, 1, f"{arguments} --train-iters 1")
    assert done.returncode != 0
    assert re.search(message, done.stderr)


@pytest.mark.slow
def test_rollouts_of_the_loop_are_trained_on_as_the_docs_say(perturbed: list[Sample], tmp_path: Path) -> None:
    run, rollouts = tmp_path / "run", tmp_path / "rollouts"
    flags = "--num-rollout 1 --rollout-batch-size 4 --n-samples-per-prompt 4 --sft-steps 2"
    loop = [sys.executable, str(SCRIPT.with_name("grpo.py")), "--save", str(run), "--save-rollouts", str(rollouts)]
    done = subprocess.run([*loop, *flags.split()], capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = train(rollouts, run / "supervised", tmp_path / "board", 1, "--r3 --train-iters 1")
    assert found["r3 rows live"] == [0]
    # The rollout is in bfloat16, the trainer in float32.
    assert found["k3 KL to rollout"][0] < 1e-3
    save_samples(tmp_path / "other", perturbed[:1])
    done = start(tmp_path / "other", run / "supervised", 1, "--r3")
    said = r"pretrain_r3: \S*other: sample 0: num_experts \(32\) of its model != 16 of \S*supervised, which it was not "
    assert done.returncode == 2
    assert re.fullmatch(said + r"rolled out with\n", done.stderr)
