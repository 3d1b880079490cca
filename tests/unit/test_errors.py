"""One checker for words that choose a policy."""

from typing import Literal

import pytest

from r3_adapter.errors import ReplayError, check_choice

Word = Literal["refuse", "keep"]


def test_known_words_pass() -> None:
    for word in ("refuse", "keep"):
        check_choice("staleness", word, Word)


@pytest.mark.parametrize("word", ["ignore", "Refuse", "", None, 0, ["refuse"], ("keep",)])
def test_an_unknown_word_names_the_known_ones(word: object) -> None:
    with pytest.raises(ReplayError) as raised:
        check_choice("staleness", word, Word, ReplayError)
    assert str(raised.value) == f"staleness {word!r} is none of 'refuse', 'keep'"
