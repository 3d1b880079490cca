"""The native core by itself, under the address and undefined-behaviour sanitizers."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

CPP = Path(__file__).resolve().parents[2] / "cpp"


@pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake")
def test_core_passes_its_own_tests_under_sanitizers(tmp_path):
    run("cmake", "-S", CPP, "-B", tmp_path, "-DR3_TESTS=ON")
    run("cmake", "--build", tmp_path)
    assert run(tmp_path / "tests" / "test_core") == "all passed\n"


def run(*command):
    # Settings of an outer build must not reach this one.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("CMAKE_", "CXXFLAGS"))}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
