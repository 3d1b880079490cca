"""Conversations of several turns: each turn's routes are asked for from where the last turn's ended, and joined."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from r3_adapter.errors import CaptureError
from r3_adapter.rollout import Sample
from r3_adapter.sglang.capture import computations_from_reply
from r3_adapter.sglang.computation import Computation, join_turns
from r3_adapter.sglang.moe_config import MoEConfig
from r3_adapter.sglang.reply import logprobs_of, payload_of
from r3_adapter.sglang.sampling import scored_temperature


class Conversation:
    """The tokens of a conversation so far, from the policy and from others, and their routes.

    tokens: all of it; the next request's input_ids.
    start: the position from which the next request wants routes: the first token that has none.
    temperature: of the distribution that the policy's tokens are scored in; one for all turns.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        moe: MoEConfig | None,
        *,
        place: str = "conversation",
        temperature: float = 1.0,
    ) -> None:
        self.tokens = list(prompt)
        self.start = 0
        self._moe, self._place, self._temperature = moe, place, temperature
        # Runs of turns, each computed on top of the one before, with the last one's reply; mostly one run.
        self._runs: list[tuple[Computation, list[Sample]]] = []
        self._num_turns = 0

    def take(self, reply: Mapping[str, Any]) -> Sample:
        """Add the turn that an engine generated; return it as a sample whose prompt is all that was said before.

        Raises:
            CaptureError: A reply without routes, or with those of other tokens or of another model; a turn that was
                retracted, or not computed on top of the turns before, since the cache lost them. Nothing is changed.
            TraceError: Malformed routes.
        """
        where = f"{self._place}, turn {self._num_turns}"
        found = computations_from_reply(reply, self.tokens, moe=self._moe, start=self.start, place=where)
        if len(found) > 1:
            raise CaptureError(f"{where}: computed {len(found)} times, since SGLang retracted (preempted) it")
        computation, turns = found[0], list[Sample]()
        if self.start:
            before, turns = self._runs[-1]
            computation = join_turns(before, computation, place=where)
            self._runs.pop()
        turns.append(
            Sample(
                computation.trace,
                len(self.tokens),
                logprobs_of(reply, where),
                len(payload_of(reply, where)),
                temperature=self._temperature,
            )
        )
        self._runs.append((computation, turns))
        self._num_turns += 1
        self.tokens = computation.trace.token_ids.tolist()
        self.start = computation.stop - 1
        return turns[-1]

    def add(self, tokens: Sequence[int]) -> None:
        """Append tokens that the policy did not sample, such as a user's turn or a tool's result."""
        self.tokens += tokens

    def samples(self) -> list[Sample]:
        """Return the conversation as one sample; as more if `start` was set back to 0 before a turn.

        A token's log-probability belongs to the computation that sampled it: turns that were computed again begin
        another sample, whose prompt is all that was said before.
        """
        return [_one_sample(turns) for _, turns in self._runs]


def _one_sample(turns: Sequence[Sample]) -> Sample:
    first, last = turns[0].num_prompt_tokens, turns[-1]
    logprobs = np.zeros(last.trace.num_tokens - first, np.float32)
    sampled = np.zeros(len(logprobs), np.bool_)
    for turn in turns:
        at = slice(turn.num_prompt_tokens - first, turn.num_prompt_tokens - first + len(turn.logprobs))
        logprobs[at], sampled[at] = turn.logprobs, True
    size = sum(turn.payload_bytes for turn in turns)
    return Sample(last.trace, first, logprobs, size, sampled, last.temperature)


class Asks(Protocol):
    """The methods of an engine that a conversation calls."""

    moe: MoEConfig | None

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
        CaptureError, TraceError: as Conversation.take.
    """
    temperature = scored_temperature(sampling_params)
    samples, conversation = list[Sample](), Conversation(prompt, engine.moe, place=place, temperature=temperature)
    for follow_up in [*follow_ups, None]:
        (reply,) = engine.replies([conversation.tokens], sampling_params, start=conversation.start)
        samples.append(conversation.take(reply))
        if follow_up is not None:
            conversation.add(follow_up)
    return samples
