"""An engine whose capture has one fault after the other; python engine_faults.py CHECKPOINT DTYPE FOLDER FAULT...

FOLDER gets the samples of each fault, unperturbed and perturbed. The engine's processes find `register` as a plugin of
SGLang, by an entry point that is written for this run alone.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from r3_adapter.environment import environment
from r3_adapter.proof.engine import EngineDType, ProofEngine
from r3_adapter.proof.prove import draw_requests
from r3_adapter.rollout import save_samples
from r3_adapter.sglang.engine import Engine

VARIABLE = "R3_TEST_FAULT"
"""Names a file with the name of the fault, which the engine's processes read before each forward pass."""
SEED, SAMPLES = 11, 8


def faulty(fault: str, decoding: bool, ids: Any, before: Any) -> Any:
    """Return what is captured in place of [T, K] ids of a layer; before: those of its last decoding pass, if any."""
    if fault == "shifted-row" and not decoding:
        # A chunk whose first row is counted twice.
        return ids.roll(1, dims=0)
    if fault == "stale-slot" and decoding and before is not None:
        return (ids := ids.clone()).index_copy_(0, ids.new_zeros(1).long(), before[:1])
    if fault == "neighbours-row" and decoding and len(ids) > 1:
        # As if the last request's place were another's, in a batch that is padded.
        ids = ids.clone()
        ids[-1] = ids[-2]
    return ids


def register() -> None:
    """Wrap where every selection is captured.

    Source: sglang@0.5.20: srt/layers/moe/topk.py:capture_routed_experts_if_allowed
    """
    from sglang.srt.layers.moe import topk
    from sglang.srt.model_executor.model_runner import ModelRunner

    file, now, before = (
        os.open(os.environ[VARIABLE], os.O_RDONLY),
        {"fault": "none", "decoding": False},
        dict[int, Any](),
    )
    forward, capture = ModelRunner.forward, topk.capture_routed_experts_if_allowed

    def watched(runner: Any, batch: Any, *args: Any, **options: Any) -> Any:
        now.update(fault=os.pread(file, 99, 0).decode(), decoding=batch.forward_mode.is_decode())
        return forward(runner, batch, *args, **options)

    def captured(config: Any, layer_id: int, ids: Any) -> None:
        given = faulty(now["fault"], now["decoding"], ids, before.get(layer_id))
        if now["decoding"]:
            before[layer_id] = ids.clone()
        layers = 8
        capture(config, (layer_id + 1) % layers if now["fault"] == "layer-off-by-one" else layer_id, given)

    ModelRunner.forward, topk.capture_routed_experts_if_allowed = watched, captured


def plugin(folder: Path) -> dict[str, str]:
    """Write the entry point; return the variables with which a process finds it, and this file."""
    info = folder / "r3_faults-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: r3-faults\nVersion: 0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(
        "[sglang.srt.plugins]\nr3_faults = engine_faults:register\n", encoding="utf-8"
    )
    paths = [str(folder), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(path for path in paths if path), VARIABLE: str(folder / "fault")}


def main(checkpoint: Path, dtype: EngineDType, folder: Path, faults: Sequence[str]) -> None:
    """Roll out with each fault, from the same prompts, with nothing in the cache."""
    variables = plugin(folder / "site")
    # What multiprocessing starts has this process's path.
    sys.path.insert(0, str(folder / "site"))
    name = Path(variables[VARIABLE])
    name.write_text("none", encoding="utf-8")
    engine = ProofEngine(dtype, {"disable_radix_cache": True})
    rng = np.random.default_rng(SEED)
    runs: dict[bool, Any] = {perturbed: draw_requests(rng, SAMPLES) for perturbed in (False, True)}
    with environment(variables), Engine(engine.settings(checkpoint, seed=SEED)) as running:
        for fault in faults:
            name.write_text(fault, encoding="utf-8")
            for perturbed, (prompts, params) in runs.items():
                running.perturb(perturbed)
                save_samples(folder / f"{fault}-{perturbed}", running.generate(prompts, params))


if __name__ == "__main__":
    main(Path(sys.argv[1]), cast(EngineDType, sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
