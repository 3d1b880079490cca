"""A task of the user's own: prompts of a file, answers judged by a function of theirs."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np

from r3_adapter.errors import R3Error, show
from r3_adapter.own import function_named

PREFIX = "data:"
"""What the name of such a task begins with; the rest is a DataSource as JSON."""

Reward = Callable[[str, str, Any], float]
"""Judges an answer: the prompt's text, the response's, and the label, None without one."""


@dataclass(frozen=True)
class DataSource:
    """Where prompts, labels and rewards are; as slime's flags of the same names have it.

    path: of a file of JSON lines, or of a parquet file, a prompt a row.
    tokenizer: a folder that transformers' AutoTokenizer reads.
    reward: "package.module.function", a Reward; "package.module:function" is the same.
    input_key, label_key: columns. apply_chat_template: the prompt is a text of a user, or a list of messages.
    max_prompt_len: longer prompts are left out.
    """

    path: str
    tokenizer: str
    reward: str
    input_key: str = "input"
    label_key: str | None = None
    apply_chat_template: bool = False
    max_prompt_len: int = 1024

    @property
    def name(self) -> str:
        """The name of the task, which engines on other hosts can make it of."""
        return PREFIX + json.dumps(asdict(self), sort_keys=True)


class PromptData:
    """A task made of a DataSource.

    Raises:
        R3Error: a file, tokenizer or function that is not there or not what it should be; it names file and row.
    """

    max_turns = 1

    def __init__(self, source: DataSource) -> None:
        self.source = source
        self._reward: Reward = function_named("reward", source.reward)
        self._rows: dict[tuple[int, ...], tuple[str, Any]] = {}
        self.num_left_out = 0
        for number, row in enumerate(_rows(Path(source.path)), start=1):
            self._add(row, f"{source.path}, row {number}")
        if not self._rows:
            raise R3Error(f"{source.path}: no prompt of {source.max_prompt_len} tokens or less")

    @cached_property
    def prompts(self) -> Sequence[list[int]]:
        """All prompts, in the file's order; one that is there twice comes once."""
        return [list(tokens) for tokens in self._rows]

    def prompt(self, rng: np.random.Generator) -> list[int]:
        """Draw one."""
        return self.prompts[int(rng.integers(len(self.prompts)))]

    def answer(self, prompt: Sequence[int]) -> list[list[int]]:
        """Return nothing: no perfect answer is known."""
        return []

    def reply(self, prompt: Sequence[int], said: Sequence[int], turn: int) -> list[int] | None:
        """End the conversation."""
        return None

    def reward(self, prompt: Sequence[int], said: Sequence[int]) -> float:
        """Ask the user's function.

        Raises:
            R3Error: it raises, or says something else than a finite number.
        """
        text, label = self._rows[tuple(prompt)]
        response = self._tokenizer.decode(list(said), skip_special_tokens=True)
        try:
            found = float(self._reward(text, response, label))
        except Exception as error:
            raise R3Error(f"{self.source.reward} of {show(response)}: {type(error).__name__}: {error}") from error
        if not np.isfinite(found):
            raise R3Error(f"{self.source.reward} of {show(response)} is {found}, not a finite number")
        return found

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, with the special ones."""
        return str(self._tokenizer.decode(list(tokens)))

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.source.tokenizer)
        except (OSError, ValueError) as error:
            raise R3Error(f"{self.source.tokenizer}: no tokenizer: {error}") from error

    def _add(self, row: dict[str, Any], place: str) -> None:
        source = self.source
        for key in (source.input_key, *([source.label_key] if source.label_key else [])):
            if key not in row:
                raise R3Error(f"{place}: no column {key!r}; there are {sorted(row)}")
        given, label = row[source.input_key], row[source.label_key] if source.label_key else None
        text, tokens = self._encode(given, place)
        if len(tokens) > source.max_prompt_len:
            self.num_left_out += 1
            return
        if not tokens:
            raise R3Error(f"{place}: the prompt is empty")
        before = self._rows.setdefault(tuple(tokens), (text, label))
        if before[1] != label:
            raise R3Error(f"{place}: the same prompt has label {show(label)} here and {show(before[1])} before")

    def _encode(self, given: Any, place: str) -> tuple[str, list[int]]:
        if self.source.apply_chat_template:
            messages = [{"role": "user", "content": given}] if isinstance(given, str) else given
            try:
                text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            except Exception as error:
                # The template is a program of the tokenizer's.
                raise R3Error(f"{place}: no chat of {show(given)}: {type(error).__name__}: {error}") from error
            return text, self._tokenizer.encode(text, add_special_tokens=False)
        if not isinstance(given, str):
            raise R3Error(f"{place}: the prompt is {show(given)}, no text; --apply-chat-template takes messages")
        return given, self._tokenizer.encode(given)


@cache
def prompt_data(name: str) -> PromptData:
    """Return the task of DataSource.name; a process reads its file and tokenizes it once."""
    return PromptData(DataSource(**json.loads(name.removeprefix(PREFIX))))


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file.

    Raises:
        R3Error: it is not there, or of a kind that is not known, or a row is no object.
    """
    if not path.is_file():
        raise R3Error(f"{path}: no such file")
    if path.suffix == ".parquet":
        yield from _parquet_rows(path)
        return
    if path.suffix != ".jsonl":
        raise R3Error(f"{path}: {path.suffix!r} is neither '.jsonl' nor '.parquet'")
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise R3Error(f"{path}, row {number}: no JSON: {error}") from error
            if not isinstance(row, dict):
                raise R3Error(f"{path}, row {number}: {show(row)}, not an object")
            yield row


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise R3Error(
            f"{path}: parquet files are read with pyarrow, which is not installed: pip install 'r3-adapter[parquet]'"
        ) from error
    try:
        for batch in ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    except (ArrowException, OSError) as error:
        raise R3Error(f"{path}: {error}") from error
