"""What a plan says of loads, from a skew or from traces."""

import json
from pathlib import Path

import numpy as np
import pytest

from r3_adapter import cli
from r3_adapter.rollout import Sample, save_samples
from r3_adapter.trace import RoutingTrace

# Megatron's, as it is imported.
pytestmark = pytest.mark.filterwarnings("ignore")
CONFIG = Path(__file__).parents[2] / "launch/configs/qwen3-30b-a3b.json"


def flags(*more):
    numbers = {
        "tensor-model-parallel-size": 2,
        "expert-model-parallel-size": 4,
        "expert-tensor-parallel-size": 1,
        "rollout-batch-size": 16,
        "n-samples-per-prompt": 4,
        "gpu-memory-gib": 400,
        "micro-batch-size": 2,
    }
    sizes = [word for name, value in numbers.items() for word in (f"--{name}", str(value))]
    engine = ["--sglang-args", '{"mem_fraction_static": 0.9}']
    return ["plan", "--model-config", str(CONFIG), *sizes, *engine, *map(str, more)]


def test_a_skew_gives_what_even_loads_and_planned_dispatch_are_worth(tmp_path, capsys):
    out = tmp_path / "plan.json"
    assert cli.main(flags("--skew", "medium", "--json", out)) == 0
    found = json.loads(out.read_text())["loads"]
    # 64 samples on 2 data-parallel ranks, 2 a micro-batch, 48 layers.
    assert found["micro_steps"] == 16
    assert found["exchanges"] == [16 * 48, 1]
    assert found["planned"]["ratio"] < found["live"]["ratio"]
    assert found["capacity_factor"][1] == found["planned"]["worst"]
    live, planned = (0.6 + 0.4 * found[name]["ratio"] for name in ("live", "planned"))
    assert found["step_ratio"] == pytest.approx(planned / live)
    assert found["layer_bytes"][0] == found["live"]["peak"] * 2 * (2 * 2048 + 3 * 768)
    printed = capsys.readouterr().out
    assert "Assumed: 40% of a step's time" in printed
    assert "moe_expert_rank_capacity_factor" in printed
    assert cli.main(flags("--skew", "medium", "--json", out, "--recompute-granularity", "full")) == 0
    assert json.loads(out.read_text())["loads"]["exchanges"] == [2 * 16 * 48, 1]


def a_sample(num_experts, num_layers=48):
    rng = np.random.default_rng(num_experts)
    ids = rng.permuted(np.tile(np.arange(num_experts, dtype=np.uint8), (20, num_layers, 1)), axis=2)[..., :8]
    layers = np.arange(num_layers, dtype=np.int32)
    trace = RoutingTrace(
        np.ascontiguousarray(ids), np.arange(20, dtype=np.int32), np.zeros(20, np.int32), layers, num_experts, ("0",)
    )
    return Sample(trace, 5, np.zeros(15, np.float32))


def test_traces_are_looked_at_if_they_are_of_the_model(tmp_path, capsys):
    save_samples(tmp_path / "right", [a_sample(128)] * 4)
    save_samples(tmp_path / "wrong", [a_sample(64)] * 4)
    out = tmp_path / "plan.json"
    assert cli.main(flags("--traces", tmp_path / "right", "--json", out)) == 0
    found = json.loads(out.read_text())["loads"]
    assert found["source"] == "1 recorded steps"
    assert found["num_samples"] == 4
    assert found["live"]["peak"] <= 4 * 20 * 8
    assert cli.main(flags("--traces", tmp_path / "wrong")) == 2
    assert "experts (64) of the traces" in capsys.readouterr().err
    assert cli.main(flags("--traces", tmp_path / "right", "--skew", "mild")) == 2
    assert "give traces, or a skew, and not both" in capsys.readouterr().err
    assert cli.main(flags("--skew", "mild", "--expert-share", "2")) == 2
    assert "--expert-share (2.0) outside 0 to 1" in capsys.readouterr().err
