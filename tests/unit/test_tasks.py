"""Tasks: what is right has reward 1, what is wrong has less, and the calculator answers a call."""

from collections.abc import Sequence

import numpy as np
import pytest

from r3_adapter.errors import R3Error
from r3_adapter.ray.supervised import converse_right
from r3_adapter.rl.tasks import (
    CALL,
    END,
    EQUALS,
    PLUS,
    TASKS,
    VOCABULARY,
    AddWithCalculator,
    RunningSums,
    SortDigits,
    task_named,
    text_of,
)


@pytest.mark.parametrize("name", TASKS)
def test_right_answers_have_reward_1_and_all_others_less(name: str) -> None:
    task, rng = task_named(name), np.random.default_rng(0)
    for _ in range(50):
        prompt = task.prompt(rng)
        answer = task.answer(prompt)[-1]
        assert task.reward(prompt, answer) == 1.0
        assert task.reward(prompt, answer[:-1]) < 1.0 and task.reward(prompt, [*answer, END]) < 1.0
        at = int(rng.integers(len(answer)))
        other = [*answer[:at], (answer[at] + 1) % VOCABULARY, *answer[at + 1 :]]
        assert task.reward(prompt, other) == pytest.approx(1 - 1 / len(answer))
        assert task.reward(prompt, []) == 0.0
        assert all(0 <= token < VOCABULARY for token in [*prompt, *answer])


def test_the_calculator_answers_the_first_turn_only() -> None:
    task = AddWithCalculator()
    prompt = [1, 3 + 4, 3 + 2, PLUS, 3 + 9, EQUALS]
    assert task.reply(prompt, [CALL, END], 0) == [3 + 5, 3 + 1, EQUALS]
    assert task.reply(prompt, [END], 0) is None
    assert task.reply(prompt, [CALL, END], 1) is None


def test_a_right_conversation_learns_what_the_model_says_and_not_what_the_tool_does() -> None:
    spoken = converse_right(AddWithCalculator(), np.random.default_rng(3))
    said = [token for token, sampled in zip(spoken.tokens, spoken.sampled, strict=True) if sampled]
    assert said[:2] == [CALL, END] and said[-1] == END
    assert len(spoken.tokens) == len(spoken.sampled) and not spoken.sampled[0]
    tool = spoken.tokens[len(spoken.tokens) - len(said) - 1 + 2 :]
    assert EQUALS in tool


def test_prompts_are_the_same_for_the_same_seed() -> None:
    draws = [[SortDigits().prompt(np.random.default_rng([1, step])) for step in range(5)] for _ in range(2)]
    assert draws[0] == draws[1] and len({tuple(prompt) for prompt in draws[0]}) == 5


def test_there_is_no_other_task() -> None:
    for name in ("chess", "r3_adapter.rl.tasks:Chess", "no.such.module:Task"):
        with pytest.raises(R3Error, match=f"'{name}' is none of"):
            task_named(name)
    assert task_named("r3_adapter.rl.tasks:SortDigits") == SortDigits()


def test_running_sums_follow_from_the_one_before() -> None:
    """One wrong sum, carried on as it was said, spoils the rest; the places before it count."""
    task = RunningSums(4)
    prompt = [1, 3 + 7, 3 + 5, 3 + 0, 3 + 9, EQUALS]
    assert task.answer(prompt) == [[3 + 7, 3 + 2, 3 + 2, 3 + 1, END]]
    assert task.reward(prompt, [3 + 7, 3 + 3, 3 + 3, 3 + 2, END]) == pytest.approx(2 / 5)
    assert len(task_named("running-24").prompt(np.random.default_rng(0))) == 26


def test_what_is_said_can_be_read() -> None:
    assert text_of(AddWithCalculator(), [1, 3 + 4, 3 + 2, PLUS, 3 + 9, EQUALS]) == "<begin>42+9="
    assert text_of(SortDigits(), [3, 12, END, 77]) == "09<end><77>"

    class Numbers(SortDigits):
        decode = None  # type: ignore[assignment]

    class Broken(SortDigits):
        @staticmethod
        def decode(tokens: Sequence[int]) -> str:
            raise KeyError(tokens[0])

    assert text_of(Broken(), [7]) == "[no text: KeyError: 7]"
    assert text_of(Numbers(), [3, 77]) == "3 77"
