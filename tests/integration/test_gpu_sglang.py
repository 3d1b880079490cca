"""Captured rows of engines on a GPU: the same whatever the engine does to be fast. for launch/gpu.sh.

Each engine computes the same greedy requests in float32; up to where tokens part, rows must be those of the plain one.
"""

import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from r3_adapter.proof.tiny import TinyModel, write_checkpoint
from r3_adapter.rollout import Sample
from r3_adapter.sglang.cpu import has_gpu
from r3_adapter.sglang.engine import rollout_in_subprocess
from r3_adapter.sglang.settings import EngineSettings

pytestmark = [pytest.mark.engine, pytest.mark.gpu]

SHAPE = TinyModel(hidden_size=256, num_layers=4, max_length=1024)
"""Of a head size that kernels have."""
POOL: Mapping[str, Any] = {"max_total_tokens": 8192, "max_running_requests": 16, "context_length": 1024}
PLAIN = {"disable_cuda_graph": True, "page_size": 1}
ENGINES: Mapping[str, Mapping[str, Any]] = {
    "plain": {"overlap": False, "extra": PLAIN},
    "graphs, overlap, shared memory": {"overlap": True, "shared_memory": True, "extra": {"page_size": 1}},
    "graphs, overlap, radix cache, pages of 16": {"overlap": True, "radix_cache": True, "extra": {"page_size": 16}},
}
CPU_TOO = tuple(ENGINES)[:2]
"""Without a GPU there are no graphs, and pages are allocated by a kernel."""
AGREE = 0.995
"""Share of rows; near ties fall otherwise where sums are taken in another order. A shifted row agrees by chance."""


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Sample]]:
    """Samples by engine, of engines that run side by side."""
    folder = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(folder, dtype="float32", seed=3, shape=SHAPE)
    machine = json.loads(os.environ.get("SGLANG_ARGS") or "{}")
    rng = np.random.default_rng(3)
    prefix = rng.integers(3, SHAPE.vocab_size, 100).tolist()
    # Alone, of one prompt, and with a prefix that others have too; longer than a chunk without a GPU, and than a page.
    prompts = [rng.integers(3, SHAPE.vocab_size, length).tolist() for length in (5, 33, 180, 300)]
    prompts += [prompts[1], *([*prefix, *rng.integers(3, SHAPE.vocab_size, length).tolist()] for length in (9, 40))]
    params = {"temperature": 0.0, "max_new_tokens": 48, "ignore_eos": True}

    def roll_out(name: str) -> list[Sample]:
        more = {"mem_fraction_static": 0.12, **machine} if has_gpu() else {}
        settings = EngineSettings(str(folder), dtype="float32", **POOL, **ENGINES[name])
        settings = replace(settings, extra={**more, **settings.extra})
        return rollout_in_subprocess(settings, prompts, params, recomputed="split", batch_size=4)

    names = list(ENGINES) if has_gpu() else list(CPU_TOO)
    with ThreadPoolExecutor(len(names) if has_gpu() else 1) as pool:
        return dict(zip(names, pool.map(roll_out, names), strict=True))


@pytest.mark.parametrize("name", [name for name in ENGINES if name != "plain"])
def test_greedy_requests_have_the_rows_of_the_plain_engine(rollouts: dict[str, list[Sample]], name: str) -> None:
    if name not in rollouts:
        pytest.skip("needs a GPU")
    rows = equal = shifted = 0
    for want, have in zip(rollouts["plain"], rollouts[name], strict=True):
        assert have.trace.captured[:-1].all()
        parted = np.flatnonzero(want.trace.token_ids != have.trace.token_ids)
        stop = int(parted[0]) if len(parted) else have.trace.num_tokens - 1
        one, other = (np.sort(each.trace.topk_ids[:stop], axis=-1) for each in (want, have))
        rows += one[..., 0].size
        equal += int((one == other).all(axis=-1).sum())
        shifted += int((one[1:] == other[:-1]).all(axis=-1).sum())
    assert rows > 1000
    assert equal / rows >= AGREE
    assert shifted / rows < 0.5, "rows of neighbours are alike: nothing was shown"
