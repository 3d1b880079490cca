"""The native core by itself: under sanitizers, and against inputs that a fuzzer makes up."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

CPP = Path(__file__).resolve().parents[2] / "cpp"
FUZZ_SECONDS = int(os.environ.get("R3_FUZZ_SECONDS", "6"))

pytestmark = pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake")


@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_core_passes_its_own_tests_under_sanitizers(tmp_path, sanitizers):
    run("cmake", "-S", CPP, "-B", tmp_path, "-DR3_TESTS=ON", f"-DR3_SANITIZE={sanitizers}")
    run("cmake", "--build", tmp_path, "--target", "test_core", "test_balance", "test_slots")
    assert run(tmp_path / "tests" / "test_core") == "all passed\n"
    assert run(tmp_path / "tests" / "test_balance") == "all passed\n"
    assert run(tmp_path / "tests" / "test_slots") == "all passed\n"


def test_numbers_that_change_meanwhile_lead_out_of_no_array(tmp_path):
    run("cmake", "-S", CPP, "-B", tmp_path, "-DR3_TESTS=ON")
    run("cmake", "--build", tmp_path, "--target", "test_scribble")
    assert run(tmp_path / "tests" / "test_scribble") == "all passed\n"


def test_core_passes_its_own_tests_on_arm(tmp_path):
    compiler, emulator = "aarch64-linux-gnu-g++", "qemu-aarch64"
    if shutil.which(compiler) is None or shutil.which(emulator) is None:
        pytest.skip(f"no {compiler} or {emulator}: the core was not tested on ARM")
    options = ("-std=c++20", "-O2", "-static", "-pthread", "-Wall", "-Wextra", "-Wconversion", "-Werror")
    program = tmp_path / "test_core"
    run(compiler, *options, "-I", CPP / "include", CPP / "tests" / "test_core.cpp", "-o", program)
    assert run(emulator, program) == "all passed\n"


def has_libfuzzer(folder):
    """Return whether clang is there with libFuzzer, which comes in a package of its own."""
    if shutil.which("clang++") is None:
        return False
    source = folder / "nothing.cpp"
    source.write_text('extern "C" int LLVMFuzzerTestOneInput(unsigned char const*, unsigned long) { return 0; }\n')
    command = ("clang++", "-fsanitize=fuzzer,address,undefined", source, "-o", folder / "nothing")
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_a_fuzzer_finds_nothing(tmp_path):
    if not has_libfuzzer(tmp_path):
        pytest.skip("no clang++ with libFuzzer: the parsers were not fuzzed")
    build = tmp_path / "build"
    run("cmake", "-S", CPP, "-B", build, "-DR3_TESTS=ON", "-DR3_FUZZ=ON", "-DCMAKE_CXX_COMPILER=clang++")
    targets = ("fuzz_sets", "fuzz_repack", "fuzz_collect")
    run("cmake", "--build", build, "--target", *targets)
    for target in targets:
        corpus = tmp_path / target
        corpus.mkdir()
        options = (f"-max_total_time={FUZZ_SECONDS}", "-max_len=1024", "-timeout=10", "-seed=1")
        run(build / "tests" / target, *options, f"-artifact_prefix={corpus}/", corpus)


def run(*command):
    # Settings of an outer build must not reach this one.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("CMAKE_", "CXXFLAGS"))}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
