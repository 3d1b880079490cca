"""Whatever ends a process ends what it has started, and removes its folder."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from r3_adapter.errors import R3Error
from r3_adapter.processes import run_together
from r3_adapter.signals import say

TREE = """
import sys
from r3_adapter.processes import run_together
from r3_adapter.signals import run_command
CHILD = '''import mmap, os, signal, subprocess, sys
for number in (1, 2, 3, 15):
    signal.signal(number, signal.SIG_IGN)
memory = os.open(sys.argv[2], os.O_CREAT | os.O_RDWR)
os.truncate(memory, 4096)
mapped = mmap.mmap(memory, 4096)
grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
open(sys.argv[1] + ".new", "w").write(f"{os.getpid()} {grandchild.pid}")
os.rename(sys.argv[1] + ".new", sys.argv[1])
grandchild.wait()'''
work = lambda: run_together([[sys.executable, "-c", CHILD, *sys.argv[1:]]], env=[{}], timeout=600, what="rollout")
sys.exit(run_command("r3 prove", work))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGKILL])
def test_nothing_is_left_of_a_command_that_a_signal_ends(tmp_path: Path, number: signal.Signals) -> None:
    # A socket's path must be short.
    folder, pids = Path(tempfile.mkdtemp(dir="/tmp")), tmp_path / "pids"
    memory = Path(f"/dev/shm/test-{os.getpid()}-{number}")
    command = [sys.executable, "-c", TREE, str(pids), str(memory)]
    env = {**os.environ, "TMPDIR": str(folder)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env) as top:
        _wait_for(pids.exists)
        assert list(folder.iterdir()) and memory.exists()
        started = [int(pid) for pid in pids.read_text().split()]
        top.send_signal(number)
        said = top.communicate(timeout=120)[1]
    _wait_for(lambda: not any(Path(f"/proc/{pid}/maps").exists() and _runs(pid) for pid in started))
    _wait_for(lambda: not list(folder.iterdir()))
    folder.rmdir()
    assert not memory.exists()
    if number is signal.SIGKILL:
        return
    assert top.returncode == 128 + number
    assert said == (
        f"r3 prove: stopped by {number.name} during the rollout; nothing was saved: the same command begins anew\n"
    )


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _wait_for(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_failure_is_said_in_one_line_that_names_the_process_and_the_reason() -> None:
    fails = "import time; from r3_adapter.errors import ReplayError; raise ReplayError('layer 3: 8 != 4')"
    waits = "import time; time.sleep(600)"
    commands = [[sys.executable, "-c", code] for code in (waits, fails, waits)]
    with pytest.raises(R3Error) as found:
        run_together(commands, env=[{}] * 3, timeout=60, what="trainer", each="rank")
    hint = "(set R3_LOGS=FOLDER to keep its whole output)"
    assert str(found.value) == f"trainer, rank 1 of 3: layer 3: 8 != 4 {hint}"


def test_a_line_is_one_write_so_that_those_of_several_ranks_stay_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    monkeypatch.setattr(sys.stderr, "write", written.append)
    say("rank 0: a line\n  and one more\n")
    assert written == ["rank 0: a line and one more\n"]
