"""Real engines, started once for all tests that can share what they give."""

import shutil
from collections.abc import Mapping
from importlib.metadata import distribution
from importlib.util import find_spec
from pathlib import Path

import pytest

from r3_adapter import patching
from r3_adapter.patching import State
from r3_adapter.prove import perturbed_rollout
from r3_adapter.rollout import Sample
from r3_adapter.series import Series
from r3_adapter.tiny import write_checkpoint

SEED = 7


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3-MoE in float32."""
    folder = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(folder, dtype="float32", seed=SEED)
    return folder


@pytest.fixture(scope="session")
def perturbed(checkpoint: Path) -> list[Sample]:
    """A rollout with a fifth of its rows perturbed."""
    return perturbed_rollout(checkpoint, seed=SEED, num_samples=16)


@pytest.fixture(scope="session")
def trees(megatron_series: Series, tmp_path_factory: pytest.TempPathFactory) -> Mapping[State, Path]:
    """Two copies of the installed Megatron-core, to be put first on the path: one released, one patched."""
    if find_spec("torch") is None:
        pytest.skip("torch is not installed")
    name = megatron_series.distribution
    installed = distribution(name)
    folders = {"megatron", *(file.parts[0] for file in installed.files or () if file.parts[0].endswith(".dist-info"))}
    trees = {}
    for state, move in ((State.NOT_APPLIED, patching.revert), (State.APPLIED, patching.apply)):
        site = tmp_path_factory.mktemp("site")
        for folder in folders:
            shutil.copytree(Path(str(installed.locate_file(folder))), site / folder)
        move([name], site=site)
        (status,) = patching.status([name], site=site)
        assert status.state is state
        trees[state] = site
    return trees
