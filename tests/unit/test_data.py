"""Prompts of a file and rewards of one's own: judged by the right label, refused with file and row."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from r3_adapter.errors import R3Error
from r3_adapter.ray.prompts import Prompts
from r3_adapter.rl.data import DataSource, PromptData, _rows
from r3_adapter.rl.tasks import SortDigits, task_named

Rows = list[dict[str, Any]]
ROWS: Rows = [{"question": f"{a} + {b} =", "label": str(a + b)} for a in range(10) for b in range(10)]


def exact(prompt: str, response: str, label: Any) -> float:
    if response == "raise":
        raise ValueError(prompt)
    return float("nan") if response == "nan" else float(response.strip() == label)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<eos>": 0, **{letter: number for number, letter in enumerate(letters, start=1)}}
    own = Tokenizer(models.BPE(vocabulary, []))
    own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    found = PreTrainedTokenizerFast(tokenizer_object=own, eos_token="<eos>")  # type: ignore[no-untyped-call]
    found.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}>"
    folder = tmp_path_factory.mktemp("tokenizer")
    found.save_pretrained(folder)
    return folder


Write = Callable[..., PromptData]


@pytest.fixture
def write(tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    monkeypatch.setitem(sys.modules, "own_rewards", sys.modules[__name__])

    def make(rows: Rows, suffix: str = ".jsonl", **more: Any) -> PromptData:
        path = tmp_path / f"prompts{suffix}"
        if suffix == ".parquet":
            import pyarrow as pa
            import pyarrow.parquet as pq

            pq.write_table(pa.Table.from_pylist(rows), path)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        options = {"reward": "own_rewards.exact", "input_key": "question", "label_key": "label", **more}
        return PromptData(DataSource(path=str(path), tokenizer=str(tokenizer), **options))

    return make


def encode(data: PromptData, text: str) -> list[int]:
    return list(data._tokenizer.encode(text))


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_each_prompt_is_judged_by_its_own_label(write: Write, suffix: str) -> None:
    data = write(ROWS, suffix)
    assert len(data.prompts) == 100
    for prompt, row in zip(data.prompts, ROWS, strict=True):
        assert prompt == encode(data, row["question"])
        assert data.reward(prompt, [*encode(data, row["label"]), 0]) == 1.0
        assert data.reward(prompt, encode(data, "x")) == 0.0
    again = task_named(data.source.name)
    assert isinstance(again, PromptData) and again.prompts == data.prompts


def test_messages_go_through_the_tokenizers_template(write: Write) -> None:
    row = {"question": [{"role": "user", "content": "2"}], "label": "2"}
    data = write([row, {"question": "3", "label": "3"}], apply_chat_template=True)
    assert data.prompts == [encode(data, "<user>2>"), encode(data, "<user>3>")]
    with pytest.raises(R3Error, match=r"row 1: the prompt is \[.*no text; --apply-chat-template takes messages"):
        write([row])


def test_long_prompts_are_left_out_and_counted(write: Write) -> None:
    data = write([{"question": "1" * size, "label": ""} for size in (3, 4, 5)], max_prompt_len=4)
    assert [len(prompt) for prompt in data.prompts] == [3, 4] and data.num_left_out == 1
    with pytest.raises(R3Error, match="no prompt of 2 tokens or less"):
        write([{"question": "123", "label": ""}], max_prompt_len=2)


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"label": "1"}], r"prompts.jsonl, row 1: no column 'question'; there are \['label'\]"),
        ([*ROWS, {"question": "x"}], "row 101: no column 'label'"),
        ([{"question": 3, "label": ""}], "row 1: the prompt is 3, no text"),
        ([{"question": "", "label": ""}], "row 1: the prompt is empty"),
        ([ROWS[0], {**ROWS[0], "label": "7"}], "row 2: the same prompt has label '7' here and '0' before"),
    ],
)
def test_a_bad_row_is_named(write: Write, rows: Rows, says: str) -> None:
    with pytest.raises(R3Error, match=says):
        write(rows)


def test_a_bad_file_or_function_is_named(write: Write, tmp_path: Path) -> None:
    for name, says in (("none.jsonl", "none.jsonl: no such file"), ("some.csv", "'.csv' is neither '.jsonl' nor")):
        if says.startswith("'"):
            (tmp_path / name).touch()
        with pytest.raises(R3Error, match=says):
            list(_rows(tmp_path / name))
    (tmp_path / "bad.jsonl").write_text('{"question": "1"}\n[1]\n', "utf-8")
    with pytest.raises(R3Error, match=r"bad.jsonl, row 2: \[1\], not an object"):
        list(_rows(tmp_path / "bad.jsonl"))
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(R3Error, match=r"bad\.parquet: "):
        list(_rows(tmp_path / "bad.parquet"))
    for name in ("own_rewards.none", "no.such.thing", "alone", "own_rewards.ROWS"):
        with pytest.raises(R3Error, match=f"reward '{name}' is "):
            write(ROWS, reward=name)


@pytest.mark.parametrize(("said", "says"), [("raise", "ValueError: 0 \\+ 0 ="), ("nan", "is nan, not a finite number")])
def test_what_a_reward_says_is_checked(write: Write, said: str, says: str) -> None:
    data = write(ROWS)
    with pytest.raises(R3Error, match=says):
        data.reward(data.prompts[0], encode(data, said))


def test_an_epoch_has_each_prompt_once_and_none_that_is_held_out(write: Write) -> None:
    data = write(ROWS)
    prompts = Prompts(data, seed=3, num_held=20)
    held = set(prompts.held)
    assert len(held) == 20
    steps = [[tuple(prompt) for prompt in prompts.of_step(step, 8)] for step in range(30)]
    assert steps == [[tuple(prompt) for prompt in Prompts(data, 3, 20).of_step(step, 8)] for step in range(30)]
    seen = [prompt for step in steps for prompt in step]
    epochs = [seen[start : start + 80] for start in (0, 80, 160)]
    everything = {tuple(prompt) for prompt in data.prompts} - held
    assert all(len(epoch) == 80 and set(epoch) == everything for epoch in epochs)
    assert epochs[0] != epochs[1] and epochs[0] != [tuple(p) for p in data.prompts if tuple(p) in everything]
    assert Prompts(data, 4, 20).held != prompts.held
    with pytest.raises(R3Error, match="all 100 prompts are held out"):
        Prompts(data, 3, 100)
    with pytest.raises(R3Error, match="100 different prompts of the task < 101"):
        Prompts(data, 3, 101)


def test_prompts_that_are_drawn_are_none_that_is_held_out() -> None:
    task = SortDigits()
    plain, prompts = Prompts(task, 5), Prompts(task, 5, 50)
    held = set(prompts.held)
    for step in range(200):
        drawn = [task.prompt(rng) for rng in [np.random.default_rng([5, step])] for _ in range(8)]
        assert plain.of_step(step, 8) == drawn
        got = prompts.of_step(step, 8)
        assert not held & {tuple(prompt) for prompt in got}
        if not held & {tuple(prompt) for prompt in drawn}:
            assert got == drawn
