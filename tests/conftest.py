"""Fixtures of tests in several folders, which tests want a GPU, and which run side by side."""

import os
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pytest

from r3_adapter.patch.series import Series, load_series

FOLDER = Path(__file__).parent
SPREAD = {"test_policy.py", "test_prove.py"}
"""Files whose tests share nothing that is not made once for all workers."""
CROWDED = (
    r"(?i)address already in use",
    r"(?i)connection (refused|reset)",
    r"leave no GPU memory",
    r"(?i)cannot allocate memory",
    r"(?i)no space left",
    r"did not end within",
    r"(?i)timed out",
)
"""What other processes of the same machine can do to an engine: no fault of what is tested."""
GPU_TESTS = "R3_GPU_TESTS"
"""launch/gpu.sh --rehearse sets it to "rehearse": tests that are marked gpu then run on the CPU, in a smaller form."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests that are marked gpu where there are fewer GPUs than they want; on workers let the long ones begin.

    The short ones at the end fill up what the long ones leave. An engine that the machine had no room for gets a
    second try, which pytest counts and says; a wrong result gets none.
    """
    _skip_without_gpus(items)
    for item in items:
        if item.get_closest_marker("engine") is not None:
            item.add_marker(pytest.mark.flaky(reruns=1, only_rerun=list(CROWDED)))
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: [item.get_closest_marker(name) is None for name in ("slow", "engine")])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep a file's tests on one worker, for what they share, unless it is in SPREAD."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return nodeid if Path(file).name in SPREAD else file

    config.option.loadscopereorder = False
    return Scheduling(config, log)


def _skip_without_gpus(items: Sequence[pytest.Item]) -> None:
    marked = [(item, mark) for item in items if (mark := item.get_closest_marker("gpu")) is not None]
    if not marked or os.environ.get(GPU_TESTS) == "rehearse":
        return
    count = _num_gpus()
    for item, mark in marked:
        wanted = mark.args[0] if mark.args else 1
        if count < wanted:
            item.add_marker(pytest.mark.skip(reason=f"wants {wanted} GPUs, and there are {count}"))


def _num_gpus() -> int:
    try:
        import torch
    except ImportError:
        return 0
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


@pytest.fixture(scope="session")
def megatron_series() -> Series:
    """The series for the installed Megatron-core."""
    try:
        version = distribution("megatron-core").version
    except PackageNotFoundError:
        pytest.skip("megatron-core is not installed")
    found = [series for series in load_series()["megatron-core"] if series.version == version]
    if not found:
        pytest.skip(f"megatron-core {version} has no series")
    return found[0]
