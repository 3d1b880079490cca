"""A tiny model on an engine with SGLang's own capture of routed experts, for the scripts beside this one."""

import base64
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from r3_adapter.sglang.cpu import enable_cpu
from r3_adapter.sglang.engine import Engine
from r3_adapter.sglang.perturb import Perturbation
from r3_adapter.sglang.settings import EngineSettings
from r3_adapter.tiny import TinyModel, write_checkpoint

enable_cpu()  # before anything imports transformers
SHAPE = TinyModel()
PERTURB = Perturbation(seed=0, fraction=0.5)
"""Random experts in half of all rows: two computations of a token then use different ones."""


def start_engine(**options: Any) -> Engine:
    """Return an engine, not yet started; options are those of EngineSettings."""
    folder = Path(tempfile.mkdtemp())
    write_checkpoint(folder, dtype="float32", seed=0)
    return Engine(EngineSettings(str(folder), routed_experts_format="flat", **{"log_level": "error", **options}))


def rows_of(reply: dict[str, Any]) -> Any:
    """Return [tokens, layers, top-k] of a reply."""
    flat = np.frombuffer(base64.b64decode(reply["meta_info"]["routed_experts"]), np.int32)
    return flat.reshape(-1, SHAPE.num_layers, SHAPE.topk)
