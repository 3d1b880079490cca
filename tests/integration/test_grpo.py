"""launch/grpo.py as its users have it: stopped, killed, gone on with, on a host with other users."""

import getpass
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import psutil
import pytest

pytestmark = pytest.mark.engine
ROOT = Path(__file__).parents[2]
LAUNCH = [sys.executable, str(ROOT / "launch" / "grpo.py")]
SMALL = ["--rollout-batch-size", "2", "--n-samples-per-prompt", "2", "--sft-steps", "2", "--save-interval", "1"]
SECONDS = 300


@contextmanager
def started(run: Path, temporary: Path) -> Iterator[tuple["subprocess.Popen[bytes]", IO[str]]]:
    """Run it as a terminal does, in a group of its own; what it says is in a file."""
    command = [*LAUNCH, "--save", str(run), "--num-rollout", "1000", *SMALL]
    with (temporary / "said").open("w+") as said:
        process = subprocess.Popen(
            command, stdout=said, stderr=said, start_new_session=True, env={**os.environ, "TMPDIR": str(temporary)}
        )
        try:
            yield process, said
        finally:
            process.kill()
            process.wait()


def wait_for_steps(run: Path, number: int, process: "subprocess.Popen[bytes]", said: IO[str]) -> None:
    deadline = time.monotonic() + SECONDS
    while not (path := run / "metrics.jsonl").exists() or path.read_bytes().count(b"\n") < number:
        assert process.poll() is None, text_of(said)
        assert time.monotonic() < deadline, text_of(said)
        time.sleep(0.1)


def text_of(said: IO[str]) -> str:
    said.seek(0)
    return said.read()


def listening(process: psutil.Process) -> list[tuple[str, int]]:
    return [each.laddr for each in process.net_connections("tcp") if each.status == psutil.CONN_LISTEN]


def all_gone(processes: list[psutil.Process]) -> list[psutil.Process]:
    # Ray's agents look for their parent's last words first.
    _, alive = psutil.wait_procs(processes, timeout=150)
    return alive


@pytest.fixture(scope="module")
def temporary() -> Iterator[Path]:
    # Paths of sockets are short.
    with tempfile.TemporaryDirectory(prefix="g") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture(scope="module")
def run(temporary: Path) -> Path:
    return temporary / "run"


def left(temporary: Path) -> list[str]:
    # torch keeps what it has compiled.
    return [
        path.name
        for path in temporary.iterdir()
        if path.name not in ("run", "said", f"torchinductor_{getpass.getuser()}")
    ]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user for a while")
def test_another_user_cannot_command_a_run_or_read_it_and_ctrl_c_ends_it_in_one_sentence(
    run: Path, temporary: Path
) -> None:
    with started(run, temporary) as (process, said):
        wait_for_steps(run, 1, process, said)
        family = psutil.Process(process.pid).children(recursive=True)
        (port,) = [listens[1] for each in family if each.name() == "gcs_server" for listens in listening(each)]
        assert len(family) > 3 and not any("RAY_AUTH_TOKEN=" in " ".join(each.cmdline()) for each in family)
        addresses = [listens for each in family for listens in listening(each)]
        assert all("127.0.0.1" in host or host == "::1" for host, _ in addresses), addresses
        (private,) = temporary.glob("r3-ray-*")
        folders = [private, private / "ray", private / "tmp", run, run / "checkpoints"]
        script = Path(__file__).with_name("other_user.py")
        command = [sys.executable, str(script), str(port), *map(str, folders)]
        found = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
        assert found.stdout == "", found.stdout
        assert "authenticat" in found.stderr.lower() or found.returncode, found.stderr
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(SECONDS) == 130
        assert not all_gone(family)
    last = text_of(said := (temporary / "said").open()).strip().splitlines()[-1]
    said.close()
    match = re.fullmatch(
        r"grpo: stopped by SIGINT; it was in step (\d+) of 1000; (\S+) is there: "
        r"the same command goes on after step (\d+)(, with steps? .* again)?",
        last,
    )
    assert match and Path(match[2]).is_dir() and int(Path(match[2]).name) == int(match[3]) <= int(match[1]), last
    assert not left(temporary)


def test_it_is_not_gone_on_with_as_another_run(run: Path, temporary: Path) -> None:
    command = [*LAUNCH, "--save", str(run), "--num-rollout", "1000", *SMALL, "--r3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(
        r"grpo: \S+/run: holds a run with policy\.replay 'off' != 'r3'; take another folder, or go on with the same\n",
        done.stderr,
    )


def test_a_run_that_is_killed_leaves_no_process_and_goes_on(run: Path, temporary: Path) -> None:
    steps = (run / "metrics.jsonl").read_bytes().count(b"\n")
    with started(run, temporary) as (process, said):
        wait_for_steps(run, steps + 1, process, said)
        first = text_of(said).splitlines()[0]
        assert re.fullmatch(
            r"grpo: \S+/run: 1000 steps; .*; goes on after step \d+ \(\S+/checkpoints/\d{8}\)(;.*)?", first
        )
        command = [*LAUNCH, "--save", str(run), "--num-rollout", "1000", *SMALL]
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
        assert (done.returncode, done.stderr) == (2, f"grpo: {run}: another process writes this run\n")
        family = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
        assert not all_gone(family)
