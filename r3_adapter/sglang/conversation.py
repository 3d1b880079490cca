"""Conversations of several turns: each turn's routes are asked for from where the last turn's ended, and joined."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from r3_adapter.errors import CaptureError
from r3_adapter.rollout import Sample
from r3_adapter.sglang.capture import computations_from_reply, logprobs_of, payload_of
from r3_adapter.sglang.computation import join_turns
from r3_adapter.sglang.facts import ModelFacts


class Asks(Protocol):
    """What a conversation needs of an engine."""

    facts: ModelFacts

    def replies(
        self, prompts: Sequence[Sequence[int]], sampling_params: Mapping[str, Any], *, start: int = 0
    ) -> list[dict[str, Any]]:
        """Return one reply a prompt, with routes from token `start` on."""
        ...


def converse(
    engine: Asks,
    prompt: Sequence[int],
    sampling_params: Mapping[str, Any],
    follow_ups: Sequence[Sequence[int]],
    *,
    place: str = "conversation",
) -> list[Sample]:
    """Generate a turn, append a follow-up, generate the next, and so on; return a sample for each turn.

    A turn's sample has all tokens before it as its prompt, with the routes that came with the turns before.

    Raises:
        CaptureError: A reply without routes, or with those of other tokens or of another model; a turn that was
            retracted, or was not computed upon the turns before, since the cache lost them.
        TraceError: Malformed routes.
    """
    samples: list[Sample] = []
    tokens, before = list(prompt), None
    for turn in range(len(follow_ups) + 1):
        where = f"{place}, turn {turn}"
        start = 0 if before is None else before.stop - 1
        (reply,) = engine.replies([tokens], sampling_params, start=start)
        found = computations_from_reply(reply, tokens, facts=engine.facts, start=start, place=where)
        if len(found) > 1:
            raise CaptureError(f"{where}: computed {len(found)} times, since it was retracted")
        before = found[0] if before is None else join_turns(before, found[0], place=where)
        samples.append(Sample(before.trace, len(tokens), logprobs_of(reply, where), len(payload_of(reply, where))))
        if turn < len(follow_ups):
            tokens = [*before.trace.token_ids.tolist(), *follow_ups[turn]]
    return samples
