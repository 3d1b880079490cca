"""verl on the CPU with the plug-in: its engine and its SGLang server are real; see verl_rank.py and verl_server.py."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from r3_adapter.processes import run_together
from r3_adapter.rollout import Sample, save_samples

pytestmark = pytest.mark.engine

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def site() -> ModuleType:
    spec = importlib.util.spec_from_file_location("verl_site", Path(__file__).with_name("verl_site.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_engine_replays_a_perturbed_rollout(
    tmp_path: Path, checkpoint: Path, perturbed: list[Sample], site: ModuleType
) -> None:
    """With EP 2, then TP 2, CP 2 and PP 2: within 1e-4 with the plug-in, off by 1e-2 and more without; refusals."""
    save_samples(tmp_path / "samples", perturbed)
    script = str(Path(__file__).with_name("verl_rank.py"))
    arguments = [script, str(checkpoint), str(tmp_path / "samples"), str(tmp_path / "rendezvous")]
    run_together(
        [[sys.executable, *arguments, str(rank)] for rank in range(2)],
        env=[site.verl_environment()] * 2,
        timeout=300,
        each="rank",
    )


def test_the_server_reads_replies_of_the_patched_engine(checkpoint: Path, site: ModuleType) -> None:
    """Both of the ways in which verl itself would read a reply fail with this SGLang; rows are bound to tokens."""
    script = str(Path(__file__).with_name("verl_server.py"))
    run_together([[sys.executable, script, str(checkpoint)]], env=[site.verl_environment()], timeout=300)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ([], r"megatron-core \S+\n.*plugin is loaded(?s:.*)would run:(?s:.*)verl.trainer.main_ppo"),
        (["actor_rollout_ref.actor.megatron.router_replay.mode=R3"], r"router_replay.mode \('R3'\) != 'disabled'"),
    ],
    ids=["right", "verl's own replay"],
)
def test_the_launch_script_checks_a_command_line(more: list[str], says: str, site: ModuleType) -> None:
    done = subprocess.run(
        [ROOT / "launch" / "verl-qwen3-30b-a3b.sh", *more],
        env={**os.environ, **site.verl_environment(), "DRY_RUN": "1", "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode == 0) == (not more), done.stderr
    assert re.search(says, done.stderr if more else done.stdout), done.stdout + done.stderr
