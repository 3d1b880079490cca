"""Ranks agree that a step can go on, before any of them enters a collective of it."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import torch

from r3_adapter.errors import ReplayError

_MESSAGE_BYTES = 1024
_CUT = b" ..."
_Made = TypeVar("_Made")


NOT_ASKED = "not asked for"
ANOTHER_RANK = "another rank plans none"


class Terms(NamedTuple):
    """What ranks compare as they agree on a step.

    num_micro_batches: must be the same on all ranks that share experts out; 0 where none do.
    groups: the first rank of each group that this one is in and whose ranks wait for each other in a step, by kind of
        group, as many on all ranks; ranks without a group in common, nor a chain of them, may have other numbers.
    why_not: says why this rank plans no dispatch; empty if it would. One that does not is enough for all.
    """

    num_micro_batches: int = 0
    why_not: str = NOT_ASKED
    groups: tuple[int, ...] = ()


_NO_TERMS = Terms()


def agreed(make: Callable[[], _Made]) -> _Made:
    """Return the result of `make`, or raise on all ranks if it raises on one; every rank must call it.

    Raises:
        ReplayError: Names each rank whose `make` has raised, and what. A rank that was interrupted raises that instead,
            once the others have heard of it.
    """
    return agreed_step(make, lambda made: _NO_TERMS)[0]


def agreed_step(make: Callable[[], _Made], terms: Callable[[_Made], Terms]) -> tuple[_Made, str]:
    """Do what `agreed` does, and compare terms; return the result, and why no dispatch is planned, if none is.

    Raises:
        ReplayError: As `agreed`; or ranks have other numbers of micro-batches.
    """
    problem, cause, made, own = "", None, None, _NO_TERMS
    try:
        made = make()
        own = terms(made)
    except BaseException as error:  # Whatever it is, the other ranks must hear of it.
        problem, cause = _told(error), error
    try:
        all_plan = agree(problem, own)
    except ReplayError as told:
        if cause is not None and not isinstance(cause, Exception):
            raise cause from told
        raise told from cause
    return cast(_Made, made), own.why_not or ("" if all_plan else ANOTHER_RANK)


def agree(problem: str, terms: Terms = _NO_TERMS) -> bool:
    """Raise on all ranks if one of them has a problem; every rank must call it. An empty string is none.

    Without a problem this is one all-reduce of a few numbers.

    Returns:
        Whether all ranks would plan their dispatch.

    Raises:
        ReplayError: Names each rank with a problem, and what it said; or the numbers of micro-batches.
    """
    own_rank()
    device = torch.device("cpu") if torch.distributed.get_backend() == "gloo" else torch.cuda.current_device()
    # All that can fail comes before the first collective: a rank that fails between two leaves the others waiting.
    own = torch.tensor(list(_message(problem)), dtype=torch.uint8, device=device)
    number = terms.num_micro_batches
    flags = torch.tensor([bool(problem), bool(terms.why_not), number, -number], dtype=torch.int32, device=device)
    everybody = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size())] if problem else []
    torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
    any_problem, any_unplanned, most, least = flags.tolist()
    if not any_problem:
        if most != -least:
            _check_numbers(terms, device)
        return not any_unplanned
    everybody = everybody or [torch.empty_like(own) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(everybody, own)
    said = [bytes(found.tolist()).rstrip(b"\0").decode(errors="replace") for found in everybody]
    raise ReplayError("; ".join(f"rank {rank}: {message}" for rank, message in enumerate(said) if message))


def _check_numbers(terms: Terms, device: Any) -> None:
    """Refuse other numbers of micro-batches on ranks that wait for each other; every rank must call it."""
    own = torch.tensor([terms.num_micro_batches, *terms.groups], dtype=torch.int32, device=device)
    everybody = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(everybody, own)
    table = [each.tolist() for each in everybody]
    # The least rank of the chain of groups that each rank is in.
    heads, before = list(range(len(table))), list[int]()
    while heads != before:
        before = heads.copy()
        for kind in range(1, len(own)):
            least = dict[int, int]()
            for head, row in zip(heads, table, strict=True):
                least[row[kind]] = min(head, least.get(row[kind], head))
            heads = [least[row[kind]] for row in table]
    for rank, (head, (number, *_)) in enumerate(zip(heads, table, strict=True)):
        if terms.groups and number != table[head][0]:
            fewer, more = sorted(((number, rank), (table[head][0], head)))
            raise ReplayError(
                f"{fewer[0]} micro-batches on rank {fewer[1]} != {more[0]} on rank {more[1]}, for which it waits"
            )


def _message(problem: str) -> bytes:
    """Return a message's bytes, padded with 0; what cannot be encoded is escaped, what is too long is cut."""
    text = problem.replace("\0", "\\0").encode(errors="backslashreplace")
    if len(text) > _MESSAGE_BYTES:
        # Not in the middle of a character.
        text = text[: _MESSAGE_BYTES - len(_CUT)].decode(errors="ignore").encode() + _CUT
    return text.ljust(_MESSAGE_BYTES, b"\0")


def _told(error: BaseException) -> str:
    """Return an error's type and message; an error may fail to say its own."""
    try:
        return f"{type(error).__name__}: {error}"
    except BaseException as other:
        return f"{type(error).__name__}, whose message raised {type(other).__name__}"


def own_rank() -> int:
    """Return this process's rank.

    Raises:
        ReplayError: There is no process group.
    """
    if not torch.distributed.is_initialized():
        raise ReplayError("no process group: replay needs torch.distributed.init_process_group, also on one rank")
    return torch.distributed.get_rank()
