"""Parts of pages that programs write, between two marks."""

from r3_adapter.errors import R3Error


def cut(text: str, begin: str, end: str, place: str, error: type[R3Error] = R3Error) -> tuple[str, str, str]:
    """Return what is before the first mark, between the two, and behind the last, all without the marks.

    place: what the text is of, for messages.

    Raises:
        error: a mark is not there.
    """
    before, found_begin, rest = text.partition(begin)
    inside, found_end, after = rest.partition(end)
    if not (found_begin and found_end):
        raise error(f"{place}: no marks {begin!r} and {end!r} around the table")
    return before, inside, after


def put(text: str, begin: str, end: str, inside: str, place: str) -> str:
    """Return the text with something else between its marks; as `cut`."""
    before, _, after = cut(text, begin, end, place)
    return f"{before}{begin}{inside}{end}{after}"
