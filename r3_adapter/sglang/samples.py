"""From prompts and replies to samples."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

from r3_adapter.errors import CaptureError, check_choice, show
from r3_adapter.hash_layers import HashTables
from r3_adapter.rollout import Sample
from r3_adapter.sglang.capture import computations_from_reply, trace_from_native_reply
from r3_adapter.sglang.moe_config import MoEConfig
from r3_adapter.sglang.reply import logprobs_of, payload_of
from r3_adapter.sglang.sampling import SamplingParams, checked_all, scored_temperature

Prompts = Sequence[Sequence[int]]
Recomputed = Literal["raise", "split"]
_MAX_ID = 2**31 - 1


def checked_prompts(
    prompts: Prompts, *, vocab_size: int | None = None, context_length: int | None = None, place: str = "prompt"
) -> list[list[int]]:
    """Return the prompts as lists of int.

    vocab_size, context_length: of the model; None where they are not known.

    Raises:
        CaptureError: Names a prompt that is empty, too long, or has something else than a token of the vocabulary:
            a scheduler that is given one dies of it.
    """
    if isinstance(prompts, str | bytes | Mapping) or not hasattr(prompts, "__iter__"):
        raise CaptureError(f"{place}s: {show(prompts)} is no sequence of prompts")
    return [
        checked_prompt(prompt, vocab_size=vocab_size, context_length=context_length, place=f"{place} {index}")
        for index, prompt in enumerate(prompts)
    ]


def checked_prompt(
    prompt: Sequence[int], *, vocab_size: int | None = None, context_length: int | None = None, place: str = "prompt"
) -> list[int]:
    """Return a prompt as a list of int; see checked_prompts."""
    if isinstance(prompt, str | bytes | Mapping) or not hasattr(prompt, "__iter__"):
        raise CaptureError(f"{place}: {show(prompt)} is no sequence of token ids")
    tokens = prompt.tolist() if hasattr(prompt, "tolist") else list(prompt)
    if not tokens:
        raise CaptureError(f"{place}: has no token")
    for at, token in enumerate(tokens) if set(map(type, tokens)) != {int} else ():
        if type(token) is not int and not (hasattr(token, "dtype") and type(token.tolist()) is int):
            raise CaptureError(f"{place}: {show(token)} at position {at} is no token id")
    tokens = [int(token) for token in tokens]
    last = _MAX_ID if vocab_size is None else vocab_size - 1
    if min(tokens) < 0 or max(tokens) > last:
        at = next(at for at, token in enumerate(tokens) if not 0 <= token <= last)
        known = "the largest id there can be" if vocab_size is None else f"vocab_size ({vocab_size}) - 1"
        raise CaptureError(f"{place}: token id {show(tokens[at])} at position {at} outside 0 to {known}")
    if context_length is not None and len(tokens) >= context_length:
        raise CaptureError(f"{place}: {len(tokens)} tokens >= context length ({context_length})")
    return tokens


def samples_of(
    replies: Sequence[Mapping[str, Any]],
    prompts: Prompts,
    moe: MoEConfig | None,
    *,
    native: bool = False,
    place: str = "request",
    recomputed: Recomputed = "raise",
    sampling_params: SamplingParams = MappingProxyType({}),
    tables: HashTables | None = None,
) -> list[Sample]:
    """Make samples of replies, in the order of their prompts.

    moe: the routers of the model, as MoEConfig.if_known reads them; None where they are not known: the routes' own
        layers and experts are then taken as they are.
    native: the routes are in SGLang's own form, of format "flat" or "exact-flat", which needs moe.
    sampling_params: that the replies were asked with, for all prompts or one for each; samples keep the temperature.
    tables: of layers whose experts follow from token ids, which engines do not capture: they are filled in.
    recomputed: what a request becomes that was retracted, so that its later tokens were sampled under other routes
        than its earlier ones. "raise": an error. "split": a sample for each of its computations, one after the other;
        the prompt of a later one is all that was sampled before it.

    Raises:
        CaptureError: Another number of replies than of prompts, or one that does not belong to its prompt.
        TraceError: Malformed routes.
    """
    check_choice("recomputed", recomputed, Recomputed, CaptureError)
    prompts = checked_prompts(prompts)
    checked = checked_all(sampling_params, len(prompts), place=f"{place}, sampling parameters")
    temperatures = [
        scored_temperature(checked if isinstance(checked, dict) else checked[at]) for at in range(len(prompts))
    ]
    if not isinstance(replies, list | tuple):
        raise CaptureError(f"{place}: {show(replies)} is no list of replies")
    if len(replies) != len(prompts):
        raise CaptureError(f"{place}: {len(replies)} replies != {len(prompts)} prompts")
    samples = []
    for index, (reply, prompt) in enumerate(zip(replies, prompts, strict=True)):
        where = f"{place} {index}"
        logprobs, size = logprobs_of(reply, where), len(payload_of(reply, where))
        if native:
            if moe is None:
                raise CaptureError(f"{where}: routes in SGLang's own form, of a model whose layers are not known")
            trace = trace_from_native_reply(reply, prompt, moe, place=where)
            trace = trace if tables is None else tables.fill(trace)
            samples.append(Sample(trace, len(prompt), logprobs, size, temperature=temperatures[index]))
            continue
        found = computations_from_reply(reply, prompt, moe=moe, place=where)
        if recomputed == "raise" and len(found) > 1:
            why = "since SGLang retracted (preempted) it; read it as 'split'"
            raise CaptureError(f"{where}: computed {len(found)} times, {why}")
        for computation in found:
            start = computation.sampled_start or len(prompt)
            part = logprobs[start - len(prompt) : computation.stop - len(prompt)]
            size = size if computation is found[0] else 0
            trace = computation.trace if tables is None else tables.fill(computation.trace)
            samples.append(Sample(trace, start, part, size, temperature=temperatures[index]))
    return samples


def native_bytes(num_tokens: int, moe: MoEConfig) -> int:
    """Return the size of SGLang's own payload for a sample of so many tokens, before base64."""
    return 4 * (num_tokens - 1) * moe.num_layers * moe.topk
