"""An engine in this process whose scheduler is killed: python engine_death.py CHECKPOINT."""

import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
from transformers import AutoTokenizer  # the first line of many scripts

from r3_adapter.errors import CaptureError
from r3_adapter.proof.tiny import ENGINE
from r3_adapter.sglang.engine import Engine
from r3_adapter.sglang.settings import EngineSettings

WRONG = ([[5, 10**6]], [[5, -1]], [[]], [[5] * 5000], [[True]], ["ab"], 5)


def refused(engine: Engine, prompts: object, params: dict[str, object]) -> str:
    try:
        engine.generate(prompts, params)  # type: ignore[arg-type]
    except CaptureError as error:
        return str(error)
    raise AssertionError(f"{prompts!r} with {params} is not refused")


def main() -> None:
    assert AutoTokenizer is not None
    seen: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    quit_handler, bystander = signal.getsignal(signal.SIGQUIT), subprocess.Popen(["sleep", "600"])
    try:
        with Engine(EngineSettings(sys.argv[1], dtype="float32", **ENGINE)) as engine:
            (sample,) = engine.generate([[5, 6, 7]], {"temperature": 0.5, "max_new_tokens": 3, "ignore_eos": True})
            assert (sample.trace.num_tokens, sample.temperature) == (6, 0.5)
            for prompts in WRONG:
                print(refused(engine, prompts, {"max_new_tokens": 1}))
            print(refused(engine, [[5]], {"repetition_penalty": 1.1}))
            print(refused(engine, [[5]], {"max_new_tokens": 10**6}).split(".")[0])
            signal.raise_signal(signal.SIGTERM)
            assert seen == [signal.SIGTERM], "the engine has taken the caller's signal"
            (scheduler,) = [each for each in psutil.Process().children(recursive=True) if "scheduler" in each.name()]
            timer = threading.Timer(0.5, scheduler.kill)
            timer.start()
            long = {"max_new_tokens": 1500, "ignore_eos": True}
            print(refused(engine, [[5, 6, 7]] * 8, long))
            print(refused(engine, [[5, 6, 7]], {"max_new_tokens": 1}))
        assert signal.getsignal(signal.SIGQUIT) == quit_handler
        assert bystander.poll() is None, "the engine has ended a process that is not its own"
    finally:
        bystander.kill()
        bystander.wait()
    left = [each.name() for each in psutil.Process().children(recursive=True) if "sglang" in each.name()]
    assert not left, left
    print(f"alive, of {Path(sys.argv[1]).name}")


if __name__ == "__main__":
    main()
