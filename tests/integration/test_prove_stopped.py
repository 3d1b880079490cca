"""Nothing is left of `r3 prove` when a signal ends it, whichever it is and whatever was under way."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.engine
PROVE = [sys.executable, "-m", "r3_adapter.cli", "prove", "--ep", "2"]
SECONDS = 240
SCHEDULER, RANK = "sglang::scheduler", "r3_adapter.proof.scoring_rank"


@pytest.fixture
def temporary() -> Iterator[Path]:
    # A socket's path must be short.
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield Path(folder)


def children_once(process: psutil.Process, wanted: str) -> list[psutil.Process]:
    """Wait for a child that is called so; return all children, those of children included."""
    deadline = time.monotonic() + SECONDS
    while True:
        assert process.is_running() and time.monotonic() < deadline
        found = process.children(recursive=True)
        for child in found:
            try:
                if any(wanted in word for word in child.cmdline()):
                    return found
            except psutil.Error:
                continue
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("number", "wanted", "stage"), [(signal.SIGTERM, SCHEDULER, "rollout"), (signal.SIGKILL, RANK, "trainer")]
)
def test_nothing_is_left_of_a_proof_that_a_signal_ends(
    temporary: Path, abandoned: Callable[[], set[Path]], number: signal.Signals, wanted: str, stage: str
) -> None:
    before = abandoned()
    env = {**os.environ, "TMPDIR": str(temporary)}
    with subprocess.Popen(PROVE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as prove:
        children = children_once(psutil.Process(prove.pid), wanted)
        assert len(children) > 1 and list(temporary.iterdir())
        prove.send_signal(number)
        said = prove.communicate(timeout=SECONDS)[1]
    _, alive = psutil.wait_procs(children, timeout=SECONDS)
    assert alive == []
    deadline = time.monotonic() + SECONDS
    # After SIGKILL there is only the watchdog, which removes it last.
    while list(temporary.iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert abandoned() <= before
    if number is not signal.SIGKILL:
        assert prove.returncode == 128 + number
        sentence = f"r3: stopped by {number.name} during the {stage}; nothing was saved: the same command begins anew"
        assert said.splitlines()[-1] == sentence
