"""Samples of replies of /v1/completions and /v1/chat/completions, streamed or not, whose `sglext` has the routes.

The prompt's token ids are the payload's own, since a chat's prompt is rendered by the server; how many there are says
`usage`, or one of the lists of ids that a request may ask for.

R: output tokens.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from r3_adapter.errors import CaptureError, check_whole, show
from r3_adapter.rollout import Sample
from r3_adapter.sglang.capture import check_computations
from r3_adapter.sglang.computation import read_computations
from r3_adapter.sglang.moe_config import MoEConfig
from r3_adapter.sglang.reply import as_logprobs, from_base64, token_ids_of
from r3_adapter.sglang.sampling import NEUTRAL, UNSCORED, checked_params, scored_temperature

_EXPLICIT = ("temperature", "repetition_penalty")
"""What a server takes from the checkpoint's generation_config.json where a request leaves it out."""
_SAMPLING = {"min_tokens": "min_new_tokens", "seed": "sampling_seed", "max_tokens": "max_new_tokens"}
_SAMPLING |= {"max_completion_tokens": "max_new_tokens"}
_OTHERS = frozenset(
    {
        *("model", "messages", "prompt", "input_ids", "chat_template_kwargs", "continue_final_message"),
        *("logprobs", "top_logprobs", "stream", "stream_options", "separate_reasoning", "stream_reasoning"),
        *("user", "rid", "priority", "metadata", "cache_salt", "extra_key", "reasoning_effort"),
        *("return_routed_experts", "routed_experts_start_len", "return_token_ids", "return_prompt_token_ids"),
        *("return_meta_info", "return_input_ids_in_sglext", "return_output_ids_in_sglext"),
        *("tools", "tool_choice", "parallel_tool_calls", "response_format"),
    }
)
_ENDS = ("stop", "length", "tool_calls", "function_call")


def sample_of_openai(
    reply: Mapping[str, Any] | Iterable[Mapping[str, Any]],
    request: Mapping[str, Any],
    moe: MoEConfig | None = None,
    *,
    prompt_ids: Sequence[int] | None = None,
    place: str = "reply",
) -> Sample:
    """Make a sample of one reply.

    reply: the JSON of it; of a stream the events, as events_of reads them.
    request: the body that was sent, with return_routed_experts and logprobs. It must say temperature and
        repetition_penalty, for which a server may have other defaults.
    moe: of the model that the trainer has; None to believe the reply.
    prompt_ids: the prompt, where it is known; it is then compared.

    Raises:
        CaptureError: A request that changes the scored distribution (penalties, biases, grammars, forced tools), with
            several choices, or aborted; a reply without routes, without log-probabilities, or with those of another
            number of tokens than were sampled: a chat stream leaves out tokens that add no text.
        TraceError: Malformed routes.
    """
    temperature = _checked_request(request, place)
    parts = list(reply) if isinstance(reply, Iterable) and not isinstance(reply, Mapping) else [reply]
    choices = _choices(parts, place)
    extras = [part["sglext"] for part in parts if isinstance(part.get("sglext"), Mapping)]
    _check_end(choices, place)
    payload = _one([extra.get("routed_experts") for extra in extras], "routed_experts in sglext", place)
    found = read_computations(from_base64(payload, place), place=place)
    if len(found) > 1:
        raise CaptureError(f"{place}: computed {len(found)} times, since SGLang retracted (preempted) it")
    token_ids = found[0].trace.token_ids.tolist()
    num_prompt_tokens = _prompt_length(parts, choices, extras, prompt_ids, token_ids, place)
    check_computations(found, token_ids, num_prompt_tokens, moe=moe, place=place)
    logprobs = as_logprobs(_logprobs(choices, place), place)
    sampled = len(token_ids) - num_prompt_tokens
    if len(logprobs) != sampled:
        raise CaptureError(
            f"{place}: log-probabilities of {len(logprobs)} tokens != {sampled} that were sampled; "
            "a chat stream leaves out tokens that add no text: ask without stream"
        )
    size = len(from_base64(payload, place))
    return Sample(found[0].trace, num_prompt_tokens, logprobs, size, temperature=temperature)


def events_of(text: str, *, place: str = "stream") -> list[dict[str, Any]]:
    """Return the events of a stream that has ended.

    Raises:
        CaptureError: An event that is no JSON object, or a stream without its end.
    """
    lines = [line[5:].strip() for line in text.splitlines() if line.startswith("data:")]
    if not lines or lines[-1] != "[DONE]":
        raise CaptureError(f"{place}: the stream has no end ([DONE])")
    try:
        events = [json.loads(line) for line in lines[:-1]]
    except (ValueError, RecursionError) as error:
        raise CaptureError(f"{place}: an event is no JSON: {str(error)[:200]}") from error
    for event in events:
        if not isinstance(event, dict):
            raise CaptureError(f"{place}: {show(event)} is no event")
    return events


def _checked_request(request: Any, place: str) -> float:
    """Return the temperature that the reply is scored at."""
    if not isinstance(request, Mapping):
        raise CaptureError(f"{place}: request {show(request)} is no JSON object")
    where = f"{place}: request"
    for name in _EXPLICIT:
        if request.get(name) is None:
            raise CaptureError(f"{where} has no {name}: the server's own, of generation_config.json, is not known")
    params = dict[str, Any]()
    for name, value in request.items():
        known = str(_SAMPLING.get(name, name))
        if known in UNSCORED or known in NEUTRAL or known == "temperature":
            params[known] = value
        elif name not in _OTHERS:
            raise CaptureError(f"{where}: what {name} does to the scored distribution is not known")
    for name, allowed in (("tool_choice", ("auto", "none")), ("routed_experts_start_len", (0,))):
        if request.get(name) is not None and request[name] not in allowed:
            raise CaptureError(f"{where}: {name} {show(request[name])} != {' or '.join(map(repr, allowed))}")
    form = request.get("response_format")
    if form is not None and form != {"type": "text"}:
        raise CaptureError(f"{where}: response_format {show(form)} is a grammar, which changes the scored distribution")
    for tool in request.get("tools") or ():
        if isinstance(tool, Mapping) and isinstance(tool.get("function"), Mapping) and tool["function"].get("strict"):
            raise CaptureError(f"{where}: a strict tool is a grammar, which changes the scored distribution")
    checked_params(params, place=where)
    return scored_temperature(params, place=where)


def _choices(parts: Sequence[Any], place: str) -> list[Mapping[str, Any]]:
    """Return the choices of all parts, which belong to one choice."""
    found = []
    for part in parts:
        choices = part.get("choices") if isinstance(part, Mapping) else None
        if not isinstance(choices, list) or not all(isinstance(choice, Mapping) for choice in choices):
            raise CaptureError(f"{place}: not a reply: {show(part)}")
        found += choices
        if any(choice.get("index", 0) != 0 for choice in choices) or len(choices) > 1:
            raise CaptureError(f"{place}: several choices; a reply carries the routes of one choice only")
    return found


def _check_end(choices: Sequence[Mapping[str, Any]], place: str) -> None:
    ends = [choice["finish_reason"] for choice in choices if choice.get("finish_reason") is not None]
    if len(ends) != 1 or ends[0] not in _ENDS:
        raise CaptureError(
            f"{place}: finish_reason {show(ends[0] if len(ends) == 1 else ends)} != {' or '.join(_ENDS)}"
        )


def _logprobs(choices: Sequence[Mapping[str, Any]], place: str) -> list[Any]:
    """Return [R] the log-probabilities of the reply, in the form of either endpoint."""
    found: list[Any] = []
    for choice in choices:
        part = choice.get("logprobs")
        if part is None:
            continue
        values = part.get("token_logprobs", part.get("content")) if isinstance(part, Mapping) else None
        if not isinstance(values, list):
            raise CaptureError(f"{place}: logprobs {show(part)} have neither content nor token_logprobs")
        found += [value.get("logprob") if isinstance(value, Mapping) else value for value in values]
    if not found:
        raise CaptureError(f"{place}: no logprobs in the reply; ask with logprobs")
    return found


def _prompt_length(
    parts: Sequence[Mapping[str, Any]],
    choices: Sequence[Mapping[str, Any]],
    extras: Sequence[Mapping[str, Any]],
    prompt_ids: Sequence[int] | None,
    token_ids: Sequence[int],
    place: str,
) -> int:
    """Return the length of the prompt; every field of the reply that states it must agree."""
    lists = [
        prompt_ids,
        *(extra.get("input_ids") for extra in extras),
        *(each.get("prompt_token_ids") for each in choices),
    ]
    lengths = set[int]()
    if prompt_ids is not None:
        lists[0] = list(prompt_ids)
    for ids in lists:
        if ids is not None:
            prompt = token_ids_of(ids, f"{place}: prompt")
            if list(token_ids[: len(prompt)]) != prompt:
                raise CaptureError(
                    f"{place}: routes of another prompt: {show(token_ids)} does not begin with {show(prompt)}"
                )
            lengths.add(len(prompt))
    for part in parts:
        usage = part.get("usage")
        if isinstance(usage, Mapping) and usage.get("prompt_tokens") is not None:
            lengths.add(check_whole(f"{place}: prompt_tokens", usage["prompt_tokens"], 1, error=CaptureError))
    if not lengths:
        raise CaptureError(
            f"{place}: the reply does not say how long the prompt is; ask a stream with stream_options include_usage, "
            "or name prompt_ids"
        )
    (length, *others) = lengths
    if others or not 0 < length < len(token_ids):
        raise CaptureError(f"{place}: prompt of {' and '.join(map(show, lengths))} tokens, routes of {len(token_ids)}")
    return length


def _one(found: Sequence[Any], name: str, place: str) -> Any:
    there = [each for each in found if each is not None]
    if len(there) != 1:
        raise CaptureError(
            f"{place}: {len(there)} {name} != 1; start SGLang for routes, and ask with return_routed_experts"
        )
    return there[0]
