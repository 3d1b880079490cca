"""`r3 bench replay --shape`: router, MoE layer and step of a model's shape, on one device, in a process of its own."""

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from r3_adapter.errors import R3Error, check_choice
from r3_adapter.model_shapes import PARTS, SHAPES
from r3_adapter.processes import run_together

Device = Literal["cpu", "cuda"]


def bench_shape(
    shape: str,
    *,
    device: Device,
    num_layers: int,
    num_tokens: int,
    router_tokens: Sequence[int],
    rounds: int,
    parts: Sequence[str],
    json_file: Path | None = None,
) -> dict[str, Any]:
    """Time a router, a MoE layer and a step of a shape, routed live and replayed; see `megatron/bench_shape.py`.

    json_file: gets the figures part by part, so that what was measured is kept if a later part fails.

    Raises:
        R3Error: an unknown shape, device or part, a GPU that is not there or is there, or a process that fails.
    """
    import torch

    check_choice("device", device, Device)
    for what, names, known in (("shape", [shape], SHAPES), ("part", parts, PARTS)):
        for name in names:
            if name not in known:
                raise R3Error(f"{what} {name!r} is none of {', '.join(map(repr, known))}")
    if (device == "cuda") != torch.cuda.is_available():
        raise R3Error(f"device {device!r} != {'cuda' if torch.cuda.is_available() else 'cpu'}, which this machine has")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        out = json_file or folder / "figures.json"
        request = {
            "shape": shape,
            "num_layers": num_layers,
            "num_tokens": num_tokens,
            "router_tokens": tuple(router_tokens),
            "rounds": rounds,
            "parts": tuple(parts),
            "out": str(out.absolute()),
            "rendezvous": str(folder / "rendezvous"),
        }
        (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
        command = [sys.executable, "-m", "r3_adapter.bench.shape_process", str(folder / "request.json")]
        run_together([command], env=[{}], timeout=3600, what="trainer", each="rank")
        return dict(json.loads(out.read_text(encoding="utf-8")))
