"""A route recorded in the real SGLang reaches its token, layer and expert in the real Megatron-core."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from r3_adapter.layout import ParallelLayout
from r3_adapter.megatron.trainer import score
from r3_adapter.metrics import gap
from r3_adapter.prove import INJECTIONS, damage, judge
from r3_adapter.rollout import Sample
from r3_adapter.sglang.engine import rollout_in_subprocess
from r3_adapter.sglang.settings import EngineSettings

pytestmark = pytest.mark.engine

LAYOUTS = {
    "world 1": {},
    "ep 2": {"ep": 2},
    "tp 2, ep 2": {"tp": 2, "ep": 2, "etp": 1},
    "tp 2, ep 2, etp 2": {"tp": 2, "ep": 2},
    "pp 2": {"pp": 2},
    "ep 2, pp 2": {"ep": 2, "pp": 2},
}


@pytest.mark.parametrize("sizes", LAYOUTS.values(), ids=LAYOUTS)
def test_replay_is_exact_in_each_layout(checkpoint: Path, perturbed: list[Sample], sizes: dict[str, int]) -> None:
    layout = ParallelLayout.smallest(**sizes)
    verdict = judge(perturbed, score(checkpoint, perturbed, layout, micro_batch_size=2), layout)
    assert verdict.failures == []
    assert verdict.rows_replayed == sum(8 * (sample.trace.num_tokens - 1) for sample in perturbed)


def test_allgather_dispatcher_gives_the_same(checkpoint: Path, perturbed: list[Sample]) -> None:
    layout = ParallelLayout.smallest(ep=2)
    scores = score(checkpoint, perturbed, layout, dispatcher="allgather", micro_batch_size=2)
    assert judge(perturbed, scores, layout).failures == []


@pytest.mark.parametrize("injection", INJECTIONS)
def test_damaged_traces_are_noticed(checkpoint: Path, perturbed: list[Sample], injection: str) -> None:
    layout = ParallelLayout()
    damaged = damage(perturbed, injection)
    verdict = judge(damaged, score(checkpoint, damaged, layout, micro_batch_size=2), layout)
    assert verdict.max_abs_dlogp_replay > 1e-2
    assert not verdict.passed


@pytest.mark.parametrize("sizes", [{}, {"tp": 2, "ep": 2}], ids=["world 1", "tp 2, ep 2"])
def test_weights_are_the_checkpoints(checkpoint: Path, sizes: dict[str, int]) -> None:
    """Nothing perturbed: with the same weights and its own routers, the trainer gives the engine's figures."""
    prompts = np.random.default_rng(0).integers(3, 512, (8, 12)).tolist()
    params = {"temperature": 1.0, "max_new_tokens": 32, "ignore_eos": True}
    settings = EngineSettings(model_path=str(checkpoint), dtype="float32")
    samples = rollout_in_subprocess(settings, prompts, params)
    scores = score(checkpoint, samples, ParallelLayout.smallest(**sizes))
    rollout = np.concatenate([sample.logprobs for sample in samples])
    for mode in ("live", "replay"):
        # float32: sums in another order; a wrong weight is off by 1e-2 and more.
        assert gap(np.concatenate(scores[mode].logprobs), rollout).max_abs <= 1e-5
        assert set(scores[mode].agreement.values()) == {1.0}


def test_command_line(tmp_path: Path) -> None:
    report = tmp_path / "verdict.json"
    command = [sys.executable, "-m", "r3_adapter.cli", "prove", "--ep", "2", "--seed", "3", "--json", str(report)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(report.read_text())["passed"] is True
    assert json.loads(done.stdout) == json.loads(report.read_text())


def test_command_line_refuses_and_says_why() -> None:
    command = [sys.executable, "-m", "r3_adapter.cli", "prove", "--inject", "nonsense"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "'nonsense' is none of shift-token, swap-layers, swap-samples" in done.stderr
