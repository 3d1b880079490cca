"""Requests of plans for tests, and the configurations that the launch scripts plan with."""

import json
from pathlib import Path

from r3_adapter.plan.model import ModelShape
from r3_adapter.plan.request import Batch, Engines, Machines, PlanRequest

ROOT = Path(__file__).parents[2]
CONFIGS = {path.stem: json.loads(path.read_text()) for path in (ROOT / "launch/configs").glob("*.json")}
QWEN = CONFIGS["qwen3-30b-a3b"]


def request_of(config, layout, *, batch=(4, 2, 5, 9, 8, 24), micro=2, steps=1, pipeline=None, **changes):
    prompts, samples, *lengths = batch
    values = {
        "model": ModelShape.from_config(config),
        "layout": layout,
        "pipeline_layout": pipeline,
        "batch": Batch(prompts, samples, *lengths, micro, steps),
        "engines": Engines(1, 1, 1, {}),
        "machines": Machines(8, 80 << 30, None),
        "distributed_optimizer": True,
        "cpu_offload": False,
        "reference": False,
        "trainer_arguments": {},
    }
    return PlanRequest(**values | changes)
