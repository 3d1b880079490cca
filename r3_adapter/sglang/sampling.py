"""Sampling parameters: which of them leave the scored distribution as it is, and which a trainer could not reproduce.

The log-probabilities that SGLang returns are those of softmax(logits / temperature), over the whole vocabulary: top_p,
top_k and min_p draw from less of it and score in all of it. A trainer divides its logits by the temperature too.
Penalties, biases and grammars change the logits before they are scored, which no trainer repeats, so they are refused.

Source: sglang@0.5.20: srt/sampling/sampling_params.py, sampling_batch_info.py:apply_logits_bias, layers/sampler.py
"""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from r3_adapter.errors import CaptureError

SamplingParams = Mapping[str, Any] | Sequence[Mapping[str, Any]]

UNSCORED = frozenset(
    {
        # Restrict which token is drawn; the scored distribution stays.
        "top_p",
        "top_k",
        "min_p",
        "sampling_seed",
        # Where it ends.
        "max_new_tokens",
        "stop",
        "stop_token_ids",
        "stop_regex",
        "ignore_eos",
        # Only about the text and when it is sent.
        "skip_special_tokens",
        "spaces_between_special_tokens",
        "no_stop_trim",
        "stream_interval",
    }
)
"""Parameters that leave a token's log-probability alone; `temperature`, beside them, is followed."""

NEUTRAL: Mapping[str, Any] = {
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "repetition_penalty": 1.0,
    # Masks the end of the sequence.
    "min_new_tokens": 0,
    "logit_bias": None,
    "json_schema": None,
    "regex": None,
    "ebnf": None,
    "structural_tag": None,
    # Of custom logits processors and of thinking budgets.
    "custom_params": None,
    # With several choices a prompt has several replies, and beams are not sampled.
    "n": 1,
    "beam_width": None,
    # Draws from another distribution than the one that tokens are scored in.
    "watermark": None,
}
"""Parameters that change it, or the reply, with the value at which they do not; others are refused."""

INTERNAL = frozenset(
    {
        "stop_strs",
        "stop_regex_strs",
        "stop_str_max_len",
        "stop_regex_max_len",
        "is_normalized",
        "ebnf_full_assistant",
    }
)
"""Fields of SGLang's class that it fills in itself."""

GREEDY = 1e-6
"""A temperature below it is greedy sampling to SGLang, which then scores at temperature 1."""

ENGINE_REFUSALS: Mapping[str, str] = {
    "preferred_sampling_params": "they belong into the sampling parameters of each request",
    "enable_custom_logit_processor": "what a processor does to the logits no trainer repeats",
    "rl_on_policy_target": "log-probabilities are then of logits that are rounded to bfloat16",
}
SAMPLERS = (None, "flashinfer", "pytorch", "ascend")
_ORIGINAL = "SGLANG_RETURN_ORIGINAL_LOGPROB"


def checked_params(params: Mapping[str, Any], *, place: str = "sampling parameters") -> dict[str, Any]:
    """Return the parameters, with those that must stay neutral set so: a server's defaults cannot take their place.

    Raises:
        CaptureError: Names a parameter that changes the scored distribution, or that is not known.
    """
    if not isinstance(params, Mapping):
        raise CaptureError(f"{place}: {params!r} is no mapping of sampling parameters")
    for name, value in params.items():
        if name in NEUTRAL:
            if not _is_neutral(value, NEUTRAL[name]):
                raise CaptureError(
                    f"{place}: {name} {value!r} changes the scored distribution, and a trainer cannot reproduce that; "
                    f"only {NEUTRAL[name]!r} is allowed"
                )
        elif name in INTERNAL:
            raise CaptureError(f"{place}: {name!r} is not a parameter of a request; SGLang sets it itself")
        elif name not in UNSCORED and name != "temperature":
            raise CaptureError(f"{place}: {name!r} is not a known sampling parameter")
    temperature = scored_temperature(params, place=place)
    if params.get("top_k") == 1 and temperature != 1:
        # Scored at temperature 1 where all requests of a batch are greedy, and at its own where one is not.
        raise CaptureError(f"{place}: top_k 1 at temperature {temperature} is scored at one or the other; use 0")
    given = {name: value for name, value in params.items() if value is not None}
    # These are newer than the other parameters: a server that does not have them would refuse the word.
    neutral = {name: value for name, value in NEUTRAL.items() if name not in ("beam_width", "watermark")}
    return {"temperature": 1.0, **given, **neutral}


def checked_all(
    params: Any, count: int, *, place: str = "sampling parameters"
) -> dict[str, Any] | list[dict[str, Any]]:
    """Check the parameters of `count` prompts: one mapping for all, or a sequence with one for each.

    Raises:
        CaptureError: As checked_params; or another number of them than of prompts.
    """
    if isinstance(params, Mapping):
        return checked_params(params, place=place)
    if not isinstance(params, Sequence) or isinstance(params, str | bytes):
        raise CaptureError(f"{place}: {params!r} is neither a mapping nor a sequence of them")
    if len(params) != count:
        raise CaptureError(f"{place}: {len(params)} of them != {count} prompts")
    return [checked_params(each, place=f"{place}, prompt {index}") for index, each in enumerate(params)]


def scored_temperature(params: Mapping[str, Any], *, place: str = "sampling parameters") -> float:
    """Return the temperature of the distribution that tokens are scored in: 1 where sampling is greedy.

    Raises:
        CaptureError: It is not a finite number from 0 on.
    """
    value = params.get("temperature")
    if value is None:
        return 1.0
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise CaptureError(f"{place}: temperature {value!r} is not a finite number from 0 on")
    return 1.0 if value < GREEDY else float(value)


def check_engine(arguments: Mapping[str, Any]) -> None:
    """Refuse arguments of SGLang, and environment variables, that change the distribution of its log-probabilities.

    Raises:
        CaptureError: Names one.
    """
    for name, reason in ENGINE_REFUSALS.items():
        if arguments.get(name):
            raise CaptureError(f"{name} {arguments[name]!r}: {reason}")
    sampler = arguments.get("sampling_backend")
    if sampler not in SAMPLERS:
        raise CaptureError(f"sampling_backend {sampler!r}: what a sampler of your own scores is not known")
    if os.environ.get(_ORIGINAL, "").lower() not in ("", "0", "false", "no", "n"):
        raise CaptureError(f"{_ORIGINAL} is set: log-probabilities are then not of the distribution sampled from")


def _is_neutral(value: Any, neutral: Any) -> bool:
    if isinstance(value, str | Mapping | Sequence):
        return not value
    # Of numbers alone, since an array, say, is not equal or unequal.
    return value is None or (isinstance(value, int | float) and value == neutral)
