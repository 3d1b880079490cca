"""Fixtures of tests in several folders."""

from importlib.metadata import PackageNotFoundError, distribution

import pytest

from r3_adapter.series import Series, load_series


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
