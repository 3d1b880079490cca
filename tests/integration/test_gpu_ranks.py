"""Several ranks over NCCL, on Megatron alone: bits of own routes, and DeepEP's dispatcher; for launch/gpu.sh."""

import json
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from r3_adapter.layout import ParallelLayout
from r3_adapter.megatron.policy_trainer.options import TrainerOptions
from r3_adapter.processes import run_together
from r3_adapter.proof.scoring import score
from r3_adapter.proof.tiny import TinyModel, write_checkpoint
from r3_adapter.rollout import Sample
from r3_adapter.trace import RoutingTrace

pytestmark = [pytest.mark.engine, pytest.mark.megatron]

SCRIPT = Path(__file__).with_name("own_routes.py")
LAYOUTS: Mapping[str, Mapping[str, int]] = {"pp 2": {"pp": 2}, "tp 2, ep 2": {"tp": 2, "ep": 2, "etp": 1}}
SHAPE = TinyModel(hidden_size=256, num_layers=2, num_experts=16)
"""Of sizes that DeepEP's kernels have."""


@pytest.mark.gpu(2)
@pytest.mark.parametrize("sizes", LAYOUTS.values(), ids=LAYOUTS)
def test_own_routes_change_no_bit(tmp_path: Path, sizes: Mapping[str, int]) -> None:
    ranks = range(ParallelLayout.smallest(**sizes).world_size)
    words = [str(SCRIPT), json.dumps(sizes), "{}", str(tmp_path / "rendezvous")]
    env = {"OMP_NUM_THREADS": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    commands = [[sys.executable, *words, str(rank)] for rank in ranks]
    run_together(commands, env=[env] * len(commands), timeout=240, what="trainer", each="rank")


@pytest.mark.gpu(2)
def test_deepep_sends_tokens_to_the_experts_that_are_given(tmp_path: Path) -> None:
    """Random experts, far from what the router would choose: log-probabilities are those of the other dispatcher."""
    write_checkpoint(tmp_path, dtype="bfloat16", seed=2, shape=SHAPE)
    rng = np.random.default_rng(2)
    samples = [random_sample(rng) for _ in range(8)]
    flex: dict[str, Any] = {"moe_token_dispatcher_type": "flex", "moe_enable_deepep": True}
    if find_spec("deep_ep") is None:
        # In a rehearsal.
        flex = {"moe_token_dispatcher_type": "allgather"}
    found = {
        name: score(tmp_path, samples, ParallelLayout.smallest(ep=2), TrainerOptions(megatron_arguments=arguments))
        for name, arguments in (("alltoall", {}), ("flex", flex))
    }
    routes = sum(int(sample.trace.captured.sum()) * SHAPE.num_layers for sample in samples)
    assert [each["replay"].routes_equal for each in found.values()] == [routes, routes]
    one, other = (np.concatenate(found[name]["replay"].logprobs) for name in found)
    live = np.concatenate(found["alltoall"]["live"].logprobs)
    assert np.abs(one - other).mean() < 0.1 * np.abs(one - live).mean()


def random_sample(rng: np.random.Generator, tokens: int = 24) -> Sample:
    """Return a sample of random tokens and experts; nothing sampled it, so its log-probabilities are none."""
    noise = rng.random((tokens, SHAPE.num_layers, SHAPE.num_experts))
    topk_ids = noise.argsort(axis=-1)[..., : SHAPE.topk].astype(np.uint8)
    versions = np.zeros(tokens, np.int32)
    topk_ids[-1], versions[-1] = 0, -1
    trace = RoutingTrace(
        topk_ids=topk_ids,
        token_ids=rng.integers(3, SHAPE.vocab_size, tokens).astype(np.int32),
        version_ids=versions,
        layer_ids=np.arange(SHAPE.num_layers, dtype=np.int32),
        num_experts=SHAPE.num_experts,
        weight_versions=("made",),
    )
    return Sample(trace, 4, np.zeros(tokens - 4, np.float32))
