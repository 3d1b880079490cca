"""What is said of a fault that Ray reports."""

import pytest
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError, UnserializableException

from r3_adapter.errors import ReplayError
from r3_adapter.ray.faults import reason

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
            "exits with an exit code 3.",
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
