"""One of three ranks that agree on a step, case by case, each of which rank 1 alone makes fail.

python agree_rank.py RENDEZVOUS RANK; prints one JSON object: what each case raised here.
"""

import json
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch

from r3_adapter.megatron.agreement import Terms, agree, agreed


class UnreadableError(Exception):
    """Cannot say what it is."""

    def __str__(self) -> str:
        raise RuntimeError("no")


class NoTextError(Exception):
    """Says something that is no text."""

    def __str__(self) -> str:
        return 5  # type: ignore[return-value]  # noqa: PLE0307


ERRORS: dict[str, BaseException] = {
    "plain": ValueError("what"),
    "lone surrogate": ValueError("a \udc80 b"),
    "unreadable": UnreadableError(),
    "no text": NoTextError(),
    "zeros": ValueError("\0a\0\0"),
    "long": ValueError("é" * 2000),
    "long, other parity": ValueError("x" + "é" * 2000),
    "empty": ValueError(),
    "interrupted": KeyboardInterrupt(),
    "exit": SystemExit(3),
}


def main(argv: Sequence[str]) -> None:
    """Run all cases."""
    rank = int(argv[1])
    # Who is left waiting finds out in time.
    timeout = timedelta(seconds=60)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{argv[0]}", rank=rank, world_size=3, timeout=timeout
    )
    said: dict[str, Any] = {}

    def attempt(name: str, use: Callable[[], Any]) -> None:
        try:
            said[name] = use()
        except BaseException as error:
            try:
                said[name] = f"{type(error).__name__}: {error}"
            except Exception:
                said[name] = type(error).__name__

    def make(error: BaseException) -> int:
        if rank == 1:
            raise error
        return rank

    for name, error in ERRORS.items():
        attempt(name, lambda error=error: agreed(lambda: make(error)))  # type: ignore[misc]
    attempt("two ranks", lambda: agree(f"trouble {rank}" if rank else ""))
    attempt("a surrogate, told", lambda: agree("\ud800" if rank == 2 else ""))
    # Ranks 0 and 1 share experts; in the second case ranks 1 and 2 are in a pipeline.
    number, first = (2, 2, 3)[rank], (0, 0, 2)[rank]
    attempt("another number in another group", lambda: agree("", Terms(number, "", (first, rank))))
    attempt("another number in a chain of groups", lambda: agree("", Terms(number, "", (first, (0, 1, 1)[rank]))))
    attempt("all well", lambda: agreed(lambda: rank))
    print(json.dumps(said))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
