"""Routers of the patched Megatron on a GPU, and the bits of a step with its own routes; for launch/gpu.sh."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from r3_adapter.patch.series import Series, write_upstream_tests
from r3_adapter.processes import run_together

pytestmark = [pytest.mark.engine, pytest.mark.megatron, pytest.mark.gpu]

HERE = Path(__file__).parent
TIMEOUT = 240
# Without a GPU, in a rehearsal: Megatron's stand-ins, and Triton's interpreter for its kernels.
RUN_PYTEST = """
import sys
import torch
if not torch.cuda.is_available():
    from r3_adapter.megatron import cpu
    cpu.install()
import pytest
options = ["-q", "-W", "ignore", "-p", "no:cacheprovider", "--noconftest", "--import-mode=importlib", "-c", "/dev/null"]
sys.exit(pytest.main([*options, *sys.argv[1:]]))
"""


def run_tests(*arguments: str, path: Sequence[Path] = (HERE,)) -> None:
    """Run pytest in a process of its own, with these folders in front of its path."""
    import torch

    paths = [*map(str, path), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    env = {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    if not torch.cuda.is_available():
        env["TRITON_INTERPRET"] = "1"
    run_together([[sys.executable, "-c", RUN_PYTEST, *arguments]], env=[env], timeout=TIMEOUT)


def test_upstream_tests_of_the_series_pass(megatron_series: Series, tmp_path: Path) -> None:
    """Those of the fused router run its kernels as they are compiled, not in Triton's interpreter."""
    written = write_upstream_tests(megatron_series, tmp_path)
    fused = [str(path) for path in written if "fusions" in path.parts]
    assert fused
    run_tests(*fused, path=[tmp_path])


def test_fused_router_in_a_cuda_graph() -> None:
    run_tests(str(HERE / "megatron_gpu_checks.py"))


def test_own_routes_change_no_bit(tmp_path: Path) -> None:
    """Losses and all gradients, with deterministic algorithms."""
    words = [str(HERE / "own_routes.py"), "{}", "{}", str(tmp_path / "rendezvous"), "0"]
    env = {"OMP_NUM_THREADS": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    run_together([[sys.executable, *words]], env=[env], timeout=TIMEOUT)
