"""Tasks with a reward that can be checked, small enough for a tiny model to learn.

Tokens: 0 padding, 1 begin, 2 end of the response, 3 to 12 the digits, 13 "+", 14 "=", 15 a call of the calculator.
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from r3_adapter.errors import R3Error

BEGIN, END, DIGIT, PLUS, EQUALS, CALL = 1, 2, 3, 13, 14, 15
VOCABULARY = 16

Tokens = list[int]


class Task(Protocol):
    """What the loop asks of a task."""

    @property
    def max_turns(self) -> int:
        """Turns of a conversation at most; 1 where there is no tool."""
        ...

    def prompt(self, rng: np.random.Generator) -> Tokens:
        """Draw a prompt."""
        ...

    def answer(self, prompt: Sequence[int]) -> list[Tokens]:
        """Return what a perfect model says in each turn, for supervised training."""
        ...

    def reply(self, prompt: Sequence[int], said: Sequence[int], turn: int) -> Tokens | None:
        """Return what a tool answers to a turn, or None where the conversation ends."""
        ...

    def reward(self, prompt: Sequence[int], said: Sequence[int]) -> float:
        """Judge the last turn, from 0 to 1."""
        ...


def _overlap(said: Sequence[int], want: Sequence[int]) -> float:
    """Return the share of places that are right; what is missing or too much is wrong."""
    right = sum(a == b for a, b in zip(said, want, strict=False))
    return right / max(len(said), len(want))


def _digits(number: int) -> Tokens:
    return [DIGIT + int(digit) for digit in str(number)]


@dataclass(frozen=True)
class SortDigits:
    """Repeat the digits of the prompt in ascending order, then end. The reward is the share of right places."""

    fewest: int = 4
    most: int = 8
    max_turns: int = 1

    def prompt(self, rng: np.random.Generator) -> Tokens:
        digits = rng.integers(0, 10, int(rng.integers(self.fewest, self.most + 1)))
        return [BEGIN, *(DIGIT + digits).tolist(), EQUALS]

    def answer(self, prompt: Sequence[int]) -> list[Tokens]:
        return [[*sorted(prompt[1:-1]), END]]

    def reply(self, prompt: Sequence[int], said: Sequence[int], turn: int) -> Tokens | None:
        return None

    def reward(self, prompt: Sequence[int], said: Sequence[int]) -> float:
        return _overlap(said, self.answer(prompt)[0])


@dataclass(frozen=True)
class AddWithCalculator:
    """Say "call", read the sum that the calculator gives, and repeat it; a sum without a call counts as well."""

    largest: int = 99
    max_turns: int = 2

    def prompt(self, rng: np.random.Generator) -> Tokens:
        a, b = rng.integers(0, self.largest + 1, 2)
        return [BEGIN, *_digits(int(a)), PLUS, *_digits(int(b)), EQUALS]

    def answer(self, prompt: Sequence[int]) -> list[Tokens]:
        return [[CALL, END], [*self._sum(prompt), END]]

    def reply(self, prompt: Sequence[int], said: Sequence[int], turn: int) -> Tokens | None:
        return [*self._sum(prompt), EQUALS] if turn == 0 and CALL in said else None

    def reward(self, prompt: Sequence[int], said: Sequence[int]) -> float:
        return _overlap(said, [*self._sum(prompt), END])

    @staticmethod
    def _sum(prompt: Sequence[int]) -> Tokens:
        text = "".join("+" if token == PLUS else str(token - DIGIT) for token in prompt[1:-1])
        return _digits(sum(int(part) for part in text.split("+")))


TASKS: dict[str, type[SortDigits] | type[AddWithCalculator]] = {"sort": SortDigits, "add": AddWithCalculator}


def task_named(name: str) -> Task:
    """Return a task of this module, or one of yours: "package.module:Class", made without arguments.

    Raises:
        R3Error: there is none of that name.
    """
    if name in TASKS:
        return TASKS[name]()
    module, _, attribute = name.partition(":")
    try:
        task: Task = getattr(importlib.import_module(module), attribute)()
        missing = [part for part in ("max_turns", "prompt", "answer", "reply", "reward") if not hasattr(task, part)]
    except Exception as error:
        # The module is the user's: importing it may raise anything.
        raise R3Error(
            f"task {name!r} is none of {sorted(TASKS)}, and no package.module:Class: {type(error).__name__}: {error}"
        ) from error
    if missing:
        raise R3Error(f"task {name!r} has no {missing[0]}")
    return task
