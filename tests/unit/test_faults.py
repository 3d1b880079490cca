"""What is said of a fault that Ray reports."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from ray._private import worker
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError, UnserializableException

from r3_adapter.errors import ReplayError
from r3_adapter.ray import cluster
from r3_adapter.ray.faults import reason, told_by_prompt

HEAD = "\x1b[36mray::TrainerActor.step()\x1b[39m (pid=4718, ip=127.0.0.1, repr=<TrainerActor object at 0x7fe103be6410>)"
DIED = (
    "The actor died unexpectedly before finishing this task.\n\tclass_name: A\n\tpid: 4719\n"
    "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker "
    "exits with an exit code 3. Some common causes include: (1) the process was killed by the OOM killer"
)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            RayTaskError("step", HEAD, ReplayError("layer 3: 2 != 4")).as_instanceof_cause(),
            "ReplayError: layer 3: 2 != 4",
        ),
        (RayTaskError("step", HEAD, MemoryError()), "MemoryError"),
        (RayTaskError("step", HEAD, KeyError("first\n\n  second")), r"KeyError: 'first\n\n  second'"),
        (RayTaskError("step", HEAD, ValueError("first\n\n  second")), "ValueError: first second"),
        (
            RayActorError(None, DIED),
            "RayActorError: its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker "
            "exits with an exit code 3",
        ),
        (GetTimeoutError("Get timed out"), "GetTimeoutError: Get timed out"),
        (
            RayActorError(None, f'a creation task, {HEAD}\n  File "x.py", line 1\nOdd: \x1b[1modd'),
            "RayActorError: Odd: odd",
        ),
        (
            UnserializableException(f'Failed.\nOriginal: {HEAD}\n  File "x.py", line 1\nOdd: odd\n'),
            "UnserializableException: Odd: odd",
        ),
        (ValueError("x" * 400), f"ValueError: {'x' * 288}"),
    ],
)
def test_a_fault_is_said_in_a_line_of_text(error: Exception, said: str) -> None:
    assert reason(error) == said


def test_a_process_of_which_ray_knows_nothing_is_said_to_be_killed_or_crashed() -> None:
    silent = DIED.replace(
        "Worker exits with an exit code 3", "Worker unexpectedly exits with a connection error code 2"
    )
    said = reason(RayActorError(None, silent))
    assert said == "RayActorError: its worker process has died. It was killed, crashed or was out of memory"


def test_what_a_node_reports_is_said_once_and_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    died = "A worker died or was killed while executing a task by an unexpected system error. To troubleshoot ..."
    full = 'Traceback (most recent call last):\n  File "x.py", line 1, in spill\nOSError: [Errno 28] No space left'
    with cluster._errors_in_a_line():
        for text in (died, full, full, "Object creation failed: the disk is full"):
            worker.print_to_stdstream({"lines": [text], "pid": "raylet", "is_err": False}, ignore_prefix=False)
    found = capsys.readouterr()
    assert found.out == ""
    assert found.err.splitlines() == [
        "ray: OSError: [Errno 28] No space left",
        "ray: Object creation failed: the disk is full",
    ]


@pytest.mark.parametrize("free", [16 << 20, 1 << 30])
def test_too_little_shared_memory_is_said_with_what_follows_from_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free: int
) -> None:
    monkeypatch.setattr(cluster.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    cluster._say_where_objects_are(512 << 20, tmp_path)
    said = capsys.readouterr().err
    where = rf"samples lie on the disk of {tmp_path}, which is slower; .*"
    assert (
        said == "" if free > 512 << 20 else re.fullmatch(rf"ray: /dev/shm has 16 MiB free of 512 .*: {where}\n", said)
    )


def test_a_prompt_whose_samples_are_lost_is_told_once() -> None:
    def sample(group: int, index: int) -> SimpleNamespace:
        return SimpleNamespace(group=group, name=f"prompt {group}, sample {index}.0")

    problems = [
        *((sample(2, index), "rank 0: lost: ObjectLostError") for index in range(8)),
        (sample(5, 1), "rank 1: digest a != b"),
        (sample(2, 8), "rank 1: digest a != b"),
        (sample(5, 3), "rank 1: digest c != d"),
    ]
    assert list(told_by_prompt(problems)) == [
        ("trace_lost", "prompt 2, sample 0.0: rank 0: lost: ObjectLostError, and 7 more samples of it"),
        ("trace_damaged", "prompt 5, sample 1.0: rank 1: digest a != b, and 1 more sample of it"),
        ("trace_damaged", "prompt 2, sample 8.0: rank 1: digest a != b"),
    ]
