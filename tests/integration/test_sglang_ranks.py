"""Several ranks, tensor-parallel, with DP attention or in a pipeline: their routes are those of one."""

import importlib.util
import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from r3_adapter import processes
from r3_adapter.proof.tiny import ENGINE, TinyModel, write_checkpoint
from r3_adapter.rollout import load_samples
from r3_adapter.sglang.cpu import has_gpu
from r3_adapter.sglang.settings import EngineSettings
from r3_adapter.watchdog import marked

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

# More experts than a byte has values.
SHAPE = TinyModel(num_layers=4, num_experts=300, topk=2)
PARAMS = {"temperature": 0.0, "max_new_tokens": 8, "ignore_eos": True}
# A buffer of one row is that of a rank that keeps none.
ALLOCATED = re.compile(r"HostCache\[routed_experts\] allocated: shape=\((?!1,)")
TIMEOUT = 300

SPEC = importlib.util.spec_from_file_location("sglang_server", Path(__file__).with_name("sglang_server.py"))
sglang = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(sglang)

if (os.cpu_count() or 1) < 2 or has_gpu():
    pytest.skip("needs two cores", allow_module_level=True)


DP = {"dp_size": 2, "enable_dp_attention": True}
# Cores of the ranks, ranks that keep rows, settings. Tensor-parallel ranks and those of a pipeline keep the rows once;
# ranks of DP attention each keep those of their own requests. Chunks of 4 tokens cut the longer prompts.
LAYOUTS: dict[str, tuple[tuple[int, ...], int, dict[str, Any]]] = {
    "one": ((0,), 1, {}),
    "tp": ((0, 1), 1, {"tp_size": 2, "shared_memory": True}),
    "dp": ((0, 1), 2, {"tp_size": 2, "extra": DP}),
    "pp 3, async": ((0, 1, 0), 1, {"pp_size": 3, "extra": {"pp_async_batch_depth": 1, "chunked_prefill_size": 4}}),
    "tp, pp": ((0, 1, 0, 1), 1, {"tp_size": 2, "pp_size": 2, "shared_memory": True}),
    "dp, pp": ((0, 1, 0, 1), 2, {"tp_size": 2, "pp_size": 2, "extra": DP, "routed_experts_format": "exact-flat"}),
}


def test_ranks_return_the_rows_of_one(tmp_path: Path, abandoned: Callable[[], set[Path]], warm_ranks: Any) -> None:
    write_checkpoint(tmp_path / "model", dtype="float32", seed=0, shape=SHAPE)
    rng = np.random.default_rng(0)
    # Batches of unequal size: ranks of DP attention pad theirs.
    prompts = [rng.integers(3, SHAPE.vocab_size, length).tolist() for length in (6, 15, 3)]
    environment = {**sglang.environment_of(tmp_path), "R3_TEST": str(tmp_path)}
    samples, before = {}, abandoned()
    for name, (cores, allocated, options) in LAYOUTS.items():
        settings = EngineSettings(str(tmp_path / "model"), dtype="float32", log_level="info", **{**ENGINE, **options})
        request = {"settings": settings.to_json(), "input_ids": prompts, "sampling_params": PARAMS}
        (tmp_path / "request.json").write_text(json.dumps(request), encoding="utf-8")
        out, log = tmp_path / name, tmp_path / "log"
        with log.open("wb") as to:
            on_cores = sglang.on_cores(environment, cores, settings.tp_size)
            worker = processes._start(sglang.worker(tmp_path / "request.json", out), on_cores, to)
        try:
            code = worker.wait(TIMEOUT)
        finally:
            worker.kill()
        said = log.read_text(encoding="utf-8")
        assert code == 0, said[-4000:]
        assert len(ALLOCATED.findall(said)) == allocated, name
        samples[name] = load_samples(out)
        end = time.monotonic() + TIMEOUT
        while set(marked(str(tmp_path))) - warm_ranks.pids:
            assert time.monotonic() < end, "a process of the engine is left"
            time.sleep(0.1)
        assert abandoned() <= before
    for name in LAYOUTS.keys() - {"one"}:
        for one, several in zip(samples["one"], samples[name], strict=True):
            # The ranks' sums are in another order: the bits of the log-probabilities differ, the routes do not.
            # The flat form does not say which model it is of.
            assert replace(several.trace, model=one.trace.model) == one.trace, name
            assert several.trace.captured[:-1].all()
            np.testing.assert_allclose(several.logprobs, one.logprobs, atol=1e-4, rtol=0)
