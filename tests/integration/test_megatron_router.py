"""The patched Megatron: given no routes it is the released one; given some, its routers use them and nothing else."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from r3_adapter.patch.packages import State
from r3_adapter.patch.series import Series, write_upstream_tests
from r3_adapter.processes import run_together

pytestmark = [pytest.mark.engine, pytest.mark.megatron]

HERE = Path(__file__).parent
TIMEOUT = 240

# warnings: Megatron gives some when it is imported without TransformerEngine.
RUN_PYTEST = """
import sys
from r3_adapter.megatron import cpu
cpu.install()
import pytest
options = ["-q", "-W", "ignore", "-p", "no:cacheprovider", "--noconftest", "--import-mode=importlib", "-c", "/dev/null"]
sys.exit(pytest.main([*options, *sys.argv[1:]]))
"""


def run(tree: Path, *arguments: str, path: Path = HERE, interpret: bool = False) -> None:
    """Run Python with the tree's Megatron and with what lies in `path`; interpret: Triton's kernels run on the CPU."""
    env = {"PYTHONPATH": os.pathsep.join([str(tree), str(path)]), "TRITON_INTERPRET": str(int(interpret))}
    run_together([[sys.executable, *arguments]], env=[env], timeout=TIMEOUT)


def test_without_routes_it_computes_the_released_bits(trees: Mapping[State, Path], tmp_path: Path) -> None:
    """Losses, every gradient and the counts of the expert bias; all routers, recompute modes and aux losses."""
    outputs = [tmp_path / f"{index}.safetensors" for index in range(len(trees))]
    for tree, output in zip(trees.values(), outputs, strict=True):
        run(tree, "-W", "ignore", str(HERE / "megatron_off.py"), str(output))
    released, patched = (output.read_bytes() for output in outputs)
    assert len(released) > 1_000_000
    assert released == patched


@pytest.mark.slow
def test_upstream_tests_of_the_series_pass(
    megatron_series: Series, trees: Mapping[State, Path], tmp_path: Path
) -> None:
    written = write_upstream_tests(megatron_series, tmp_path)
    for interpret in (False, True):
        chosen = [str(path) for path in written if ("fusions" in path.parts) is interpret]
        run(trees[State.APPLIED], "-c", RUN_PYTEST, *chosen, path=tmp_path, interpret=interpret)


@pytest.mark.parametrize("number", range(2, 6))
def test_what_the_patches_mend_is_broken_in_the_release(trees: Mapping[State, Path], number: int) -> None:
    """The scripts of docs/upstream.md print there what it says."""
    docs = HERE.parents[1] / "docs"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(docs / "upstream" / f"megatron_000{number}.py")],
        env={**os.environ, "PYTHONPATH": str(trees[State.NOT_APPLIED])},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=True,
    )
    text = (docs / "upstream.md").read_text(encoding="utf-8")
    said = done.stdout.splitlines()
    assert said
    assert [line for line in said if f"    {line}\n" not in text] == []


def test_routers_use_what_they_are_given(trees: Mapping[State, Path]) -> None:
    run(trees[State.APPLIED], "-c", RUN_PYTEST, str(HERE / "megatron_router_checks.py"))


def test_fused_routers_use_what_they_are_given(trees: Mapping[State, Path]) -> None:
    """No GPU is needed: Triton's interpreter runs the kernels."""
    run(trees[State.APPLIED], "-c", RUN_PYTEST, str(HERE / "megatron_fused_checks.py"), interpret=True)
