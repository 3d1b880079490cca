"""Run sglang_grouped_checks.py where its import of SGLang, which changes transformers, changes it for no other test."""

import sys
from pathlib import Path

import pytest

from r3_adapter.processes import run_together

pytestmark = pytest.mark.engine


def test_grouping_changes_rounding_at_most() -> None:
    options = ["-q", "-W", "ignore", "-p", "no:cacheprovider", "--noconftest", "--import-mode=importlib"]
    checks = str(Path(__file__).with_name("sglang_grouped_checks.py"))
    run_together([[sys.executable, "-m", "pytest", *options, "-c", "/dev/null", checks]], env=[{}], timeout=240)
