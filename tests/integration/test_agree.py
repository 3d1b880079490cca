"""Ranks agree on a step whatever one of them raises: all of them hear of it, and none is left in a collective."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("agree_rank.py")
# 1,024 bytes, of which the mark of a cut has 4.
LONG = {"long": "ValueError: " + "é" * 504, "long, other parity": "ValueError: x" + "é" * 503}
MESSAGES = {
    "plain": "rank 1: ValueError: what",
    "lone surrogate": r"rank 1: ValueError: a \udc80 b",
    "unreadable": "rank 1: UnreadableError, whose message raised RuntimeError",
    "no text": "rank 1: NoTextError, whose message raised TypeError",
    "zeros": r"rank 1: ValueError: \0a\0\0",
    **{case: f"rank 1: {text} ..." for case, text in LONG.items()},
    "empty": "rank 1: ValueError: ",
    "interrupted": "rank 1: KeyboardInterrupt: ",
    "exit": "rank 1: SystemExit: 3",
    "two ranks": "rank 1: trouble 1; rank 2: trouble 2",
    "a surrogate, told": r"rank 2: \ud800",
}


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each case raised on each rank."""
    rendezvous = tmp_path_factory.mktemp("agree") / "rendezvous"
    ranks = [
        subprocess.Popen([sys.executable, str(SCRIPT), str(rendezvous), str(rank)], stdout=subprocess.PIPE, text=True)
        for rank in range(3)
    ]
    try:
        return [json.loads(rank.communicate(timeout=240)[0].splitlines()[-1]) for rank in ranks]
    finally:
        for each in ranks:
            each.kill()
            each.wait()


@pytest.mark.parametrize("case", MESSAGES)
def test_all_ranks_hear_what_one_raised(said: list[dict[str, Any]], case: str) -> None:
    own = {"interrupted": "KeyboardInterrupt: ", "exit": "SystemExit: 3"}
    told = f"ReplayError: {MESSAGES[case]}"
    assert [each[case] for each in said] == [told, own.get(case, told), told]


def test_only_ranks_that_wait_for_each_other_need_as_many_micro_batches(said: list[dict[str, Any]]) -> None:
    says = "ReplayError: 2 micro-batches on rank 0 != 3 on rank 2, for which it waits"
    assert [each["another number in another group"] for each in said] == [True] * 3
    assert [each["another number in a chain of groups"] for each in said] == [says] * 3


def test_they_go_on_when_all_is_well(said: list[dict[str, Any]]) -> None:
    assert [each["all well"] for each in said] == [0, 1, 2]
    numbers = {f"another number in {what}" for what in ("another group", "a chain of groups")}
    assert set(said[0]) == {*MESSAGES, *numbers, "all well"}
