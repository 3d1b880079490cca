"""The command line for slime is checked before it starts, and the launch script's own passes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from r3_adapter.errors import LayoutError, R3Error, ReplayError
from r3_adapter.frameworks.slime.flags import check_flags

ROOT = Path(__file__).parents[2]


def engines(tmp_path: Path, worker_type: str = "regular", **overrides: Any) -> Path:
    group = {
        "worker_type": worker_type,
        "num_gpus": 8,
        "overrides": {"enable_return_routed_experts": True, **overrides},
    }
    groups = [{"worker_type": "placeholder", "num_gpus": 1}, group]
    judge = {"name": "judge", "update_weights": False, "server_groups": [{"worker_type": "regular", "num_gpus": 1}]}
    path = tmp_path / "engines.yaml"
    path.write_text(json.dumps({"sglang": [{"name": "actor", "server_groups": groups}, judge]}), encoding="utf-8")
    return path


def flags(path: Path, *more: str) -> list[str]:
    plug_in = "r3_adapter.frameworks.slime"
    return [
        *("--custom-convert-samples-to-train-data-path", f"{plug_in}.convert"),
        *("--custom-megatron-init-path", f"{plug_in}.init"),
        *("--custom-generate-function-path", f"{plug_in}.generate", "--sglang-config", str(path)),
        *("--num-layers", "4", "--num-experts", "8", "--moe-router-topk", "2"),
        *("--moe-layer-freq", "[0, 1, 1, 1]", "--lr", "1e-6", *more),
    ]


def test_a_right_command_line(tmp_path: Path) -> None:
    more = ["--actor-num-gpus-per-node", "8", "--tensor-model-parallel-size", "2", "--expert-model-parallel-size", "4"]
    found = check_flags(flags(engines(tmp_path), *more))
    assert (found["layout"].dp, found["layout"].ep, found["moe"].layer_ids) == (4, 4, (1, 2, 3))
    assert found["engines"] == [f"{tmp_path}/engines.yaml: actor, group 1"]


@pytest.mark.parametrize(
    ("more", "error", "says"),
    [
        (["--use-rollout-routing-replay"], ReplayError, "--use-rollout-routing-replay is on"),
        (["--custom-megatron-init-path", "mine.init"], ReplayError, "--custom-megatron-init-path mine.init != r3_"),
        (["--custom-generate-function-path", "r3_adapter.x"], ReplayError, "function-path r3_adapter.x != r3_"),
        (["--sglang-config", "/not/there"], ReplayError, "/not/there: not slime's configuration of engines"),
        (["--num-experts", "0"], ReplayError, r"num_experts \(0\) < 1"),
        (["--moe-layer-freq", "[1, 1]"], ReplayError, "moe_layer_freq"),
        (["--context-parallel-size", "3"], LayoutError, r"tp \* pp \* cp \(3\) does not divide the trainer's 1 GPUs"),
        (["--expert-model-parallel-size", "2"], LayoutError, "does not divide"),
    ],
)
def test_a_wrong_one_is_refused(tmp_path: Path, more: list[str], error: type[R3Error], says: str) -> None:
    with pytest.raises(error, match=says):
        check_flags(flags(engines(tmp_path), *more))


@pytest.mark.parametrize("number", range(4))
def test_each_of_the_four_flags_is_missed(tmp_path: Path, number: int) -> None:
    given = flags(engines(tmp_path))
    missing, without = given[2 * number], given[: 2 * number] + given[2 * number + 2 :]
    with pytest.raises(ReplayError, match=f"{missing} is missing"):
        check_flags(without)


def test_requests_of_the_users_own(tmp_path: Path) -> None:
    given = flags(engines(tmp_path))
    check_flags([*given[:4], *given[6:], "--rollout-function-path", "mine.rollout"])
    check_flags([*given, "--custom-generate-function-path", "mine.generate"])


def test_engines_that_do_not_answer_with_whole_routes(tmp_path: Path) -> None:
    with pytest.raises(ReplayError, match="actor, group 1: enable_return_routed_experts False != True"):
        check_flags(flags(engines(tmp_path, enable_return_routed_experts=False)))
    with pytest.raises(ReplayError, match="routed_experts_format 'safetensors' != 'exact-flat'"):
        check_flags(flags(engines(tmp_path, routed_experts_format="safetensors")))
    with pytest.raises(ReplayError, match="worker_type 'decode' != 'regular'"):
        check_flags(flags(engines(tmp_path, "decode")))


def test_the_dry_run_of_the_launch_script() -> None:
    def run(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [ROOT / "launch/slime-qwen3-30b-a3b.sh", *more],
            env=os.environ | {"DRY_RUN": "1", "R3_PYTHON": sys.executable},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    done = run("--lr", "2e-6")
    assert done.returncode == 0, done.stderr
    assert "48 MoE layers of 48, 8 of 128 experts" in done.stdout and "tp=4, pp=1, vpp=1, cp=1, ep=8" in done.stdout
    assert "train.py" in done.stdout and "--lr 2e-6" in done.stdout.splitlines()[-2]
    refused = run("--use-routing-replay")
    assert refused.returncode == 2 and refused.stderr.startswith("slime: --use-routing-replay is on")
    assert "would run" not in refused.stdout
