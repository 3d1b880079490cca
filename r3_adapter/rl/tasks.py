"""Tasks with a reward that can be checked, small enough for a tiny model to learn.

Tokens: 0 padding, 1 begin, 2 end of the response, 3 to 12 the digits, 13 "+", 14 "=", 15 a call of the calculator.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, runtime_checkable

import numpy as np

from r3_adapter.errors import R3Error
from r3_adapter.rl.data import PREFIX, prompt_data

BEGIN, END, DIGIT, PLUS, EQUALS, CALL = 1, 2, 3, 13, 14, 15
VOCABULARY = 16
_SIGNS = ("<pad>", "<begin>", "<end>", *"0123456789", "+", "=", "<call>")

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


@runtime_checkable
class Dataset(Protocol):
    """What a task has beside that if its prompts are those of a file: each comes once in an epoch."""

    @property
    def prompts(self) -> Sequence[Tokens]:
        """All prompts, which are different."""
        ...


@runtime_checkable
class Readable(Protocol):
    """What a task has beside that if its tokens are texts."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens."""
        ...


def text_of(task: Task, tokens: Sequence[int]) -> str:
    """Return tokens as people read them: as text where the task has any, else as numbers."""
    if isinstance(task, Readable):
        try:
            return str(task.decode(tokens))
        except Exception as error:
            # The task may be the user's, and a run is not lost for a text that is only looked at.
            return f"[no text: {type(error).__name__}: {error}]"
    return " ".join(str(token) for token in tokens)


class _Signs:
    """The tokens of this module's tasks as texts."""

    @staticmethod
    def decode(tokens: Sequence[int]) -> str:
        """Return the text of tokens."""
        return "".join(_SIGNS[token] if token < len(_SIGNS) else f"<{token}>" for token in tokens)


def _overlap(said: Sequence[int], want: Sequence[int]) -> float:
    """Return the share of places that are right; what is missing or too much is wrong."""
    right = sum(a == b for a, b in zip(said, want, strict=False))
    return right / max(len(said), len(want))


def _digits(number: int) -> Tokens:
    return [DIGIT + int(digit) for digit in str(number)]


@dataclass(frozen=True)
class SortDigits(_Signs):
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
class AddWithCalculator(_Signs):
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


@dataclass(frozen=True)
class RunningSums(_Signs):
    """Say the sum of the prompt's digits so far, modulo ten, after each of them, then end.

    Each sum follows from the one said before it and one digit of the prompt: like parity with scratch tokens, in base
    ten. One that is wrong makes those after it wrong. The reward is the share of right places; who guesses has a tenth.
    """

    length: int = 12
    max_turns: int = 1

    def prompt(self, rng: np.random.Generator) -> Tokens:
        return [BEGIN, *(DIGIT + rng.integers(0, 10, self.length)).tolist(), EQUALS]

    def answer(self, prompt: Sequence[int]) -> list[Tokens]:
        sums = np.cumsum(np.array(prompt[1:-1]) - DIGIT) % 10
        return [[*(DIGIT + sums).tolist(), END]]

    def reply(self, prompt: Sequence[int], said: Sequence[int], turn: int) -> Tokens | None:
        return None

    def reward(self, prompt: Sequence[int], said: Sequence[int]) -> float:
        return _overlap(said, self.answer(prompt)[0])


TASKS: dict[str, Callable[[], Task]] = {
    "sort": SortDigits,
    "add": AddWithCalculator,
    "running": RunningSums,
    "running-24": partial(RunningSums, 24),
}


def task_named(name: str) -> Task:
    """Return a task of this module, one of a file's prompts, or one of yours: "package.module:Class".

    A class of yours is made without arguments.

    Raises:
        R3Error: there is none of that name.
    """
    if name in TASKS:
        return TASKS[name]()
    if name.startswith(PREFIX):
        return prompt_data(name)
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
