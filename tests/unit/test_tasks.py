"""Tasks: what is right has reward 1, what is wrong has less, and the calculator answers a call."""

import numpy as np
import pytest

from r3_adapter.errors import R3Error
from r3_adapter.ray.supervised import converse_right
from r3_adapter.rl.tasks import CALL, END, EQUALS, PLUS, TASKS, VOCABULARY, AddWithCalculator, SortDigits, task_named


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
