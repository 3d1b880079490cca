"""Runs that never ran, written once."""

import subprocess
import sys
from pathlib import Path

import pytest

CONFIG = {
    "name": "a",
    "flags": {"lr": 1e-4},
    "model": "m",
    "layout": {"tp": 1},
    "seed": 0,
    "versions": {"torch": "2.13.0"},
}


@pytest.fixture
def config():
    return dict(CONFIG)


@pytest.fixture(scope="session")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four variants of three seeds."""
    folder = tmp_path_factory.mktemp("runs")
    script = Path(__file__).with_name("synthetic_runs.py")
    subprocess.run([sys.executable, "-W", "error", str(script), str(folder)], check=True)
    return folder
