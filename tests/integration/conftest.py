"""Real engines, started once for all tests that can share what they give."""

import fcntl
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import distribution
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from r3_adapter import processes, watchdog
from r3_adapter.patch import packages
from r3_adapter.patch.packages import State
from r3_adapter.patch.series import Series
from r3_adapter.proof.prove import perturbed_rollout
from r3_adapter.proof.tiny import write_checkpoint
from r3_adapter.rollout import Sample, load_samples, save_samples
from r3_adapter.sglang.meeting import FOLDER

SEED = 7
SPEC = importlib.util.spec_from_file_location("warm_client", Path(__file__).parents[1] / "warm" / "client.py")
warm = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(warm)

Once = Callable[[str, Callable[[Path], None]], Path]
Tell = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="session", autouse=True)
def meeting_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let ranks of engines meet through files: the port that an engine found free may be another test's by then."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FOLDER, str(tmp_path_factory.mktemp("meetings")))
        yield


@pytest.fixture(scope="session", autouse=True)
def warm_ranks(meeting_folder: None) -> Iterator["warm.Servers"]:
    """Fork ranks of run_together from a process that has imported what they import, which takes most of their time.

    What a command of the package starts in turn is started as ever, and so is everything where there is a GPU.
    """
    with pytest.MonkeyPatch.context() as patch, warm.Servers(processes._start) as servers:
        patch.setattr(processes, "_start", servers.start)
        yield servers


@pytest.fixture(scope="session")
def tell(warm_ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> Tell:
    """Return a function that runs scripts of this folder side by side, and returns what each prints last, an object.

    A script is its name and its arguments.
    """

    def told(*scripts: Sequence[str]) -> list[dict[str, Any]]:
        logs, running = tmp_path_factory.mktemp("told"), []
        try:
            for index, (name, *arguments) in enumerate(scripts):
                command = [sys.executable, str(Path(__file__).with_name(name)), *arguments]
                with (logs / str(index)).open("wb") as out:
                    running.append(processes._start(command, {"OMP_NUM_THREADS": "1"}, out))
            found = []
            for index, process in enumerate(running):
                # Generous, and far below the half hour after which a collective gives up.
                code = process.wait(400)
                lines = (logs / str(index)).read_text(encoding="utf-8").splitlines()
                assert code == 0, "\n".join(lines)[-4000:]
                found.append(json.loads([line for line in lines if line.startswith("{")][-1]))
            return found
        finally:
            for process in running:
                process.kill()
                process.wait()

    return told


@pytest.fixture(scope="session")
def abandoned() -> Callable[[], set[Path]]:
    """Return a function that finds what is in shared memory and no process has a lock of; other tests' engines have."""

    def found() -> set[Path]:
        folders = set()
        for folder in watchdog.MEMORY.glob(f"{watchdog.FOLDERS}*"):
            with suppress(OSError):
                lock = watchdog.open_folder(folder)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    folders.add(folder)
                finally:
                    os.close(lock)
        return folders

    return found


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """Return a function that makes a folder of a name once for all workers, and returns it."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "once"
    shared.mkdir(exist_ok=True)

    def made(name: str, make: Callable[[Path], None]) -> Path:
        folder, done = shared / name, shared / f"{name}.done"
        with (shared / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                done.touch()
        return folder

    return made


@pytest.fixture(scope="session")
def checkpoint(once: Once) -> Path:
    """A tiny Qwen3-MoE in float32."""
    return once("checkpoint", lambda to: write_checkpoint(to, dtype="float32", seed=SEED))


@pytest.fixture(scope="session")
def perturbed(checkpoint: Path, once: Once) -> list[Sample]:
    """A rollout with a fifth of its rows perturbed."""
    return load_samples(
        once("perturbed", lambda to: save_samples(to, perturbed_rollout(checkpoint, seed=SEED, num_samples=16)))
    )


@pytest.fixture(scope="session")
def trees(megatron_series: Series, tmp_path_factory: pytest.TempPathFactory) -> Mapping[State, Path]:
    """Two copies of the installed Megatron-core, to be put first on the path: one released, one patched."""
    if find_spec("torch") is None:
        pytest.skip("torch is not installed")
    name = megatron_series.distribution
    installed = distribution(name)
    folders = {"megatron", *(file.parts[0] for file in installed.files or () if file.parts[0].endswith(".dist-info"))}
    trees = {}
    for state, move in ((State.NOT_APPLIED, packages.revert), (State.APPLIED, packages.apply)):
        site = tmp_path_factory.mktemp("site")
        for folder in folders:
            shutil.copytree(Path(str(installed.locate_file(folder))), site / folder)
        move([name], site=site)
        (status,) = packages.status([name], site=site)
        assert status.state is state
        trees[state] = site
    return trees
