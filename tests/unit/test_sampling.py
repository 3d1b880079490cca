"""Sampling parameters: what the trainer can follow goes on, everything else is refused by its name."""

import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from r3_adapter.errors import CaptureError, TraceError
from r3_adapter.layout import ParallelLayout
from r3_adapter.megatron.batches import packed_micro_batch
from r3_adapter.rollout import load_samples, save_samples, unrouted
from r3_adapter.sglang import sampling
from r3_adapter.sglang.cpu import cpu_environment
from r3_adapter.sglang.engine import generate_over_http
from r3_adapter.sglang.moe_config import MoEConfig
from r3_adapter.sglang.releases import absent, installed_release
from r3_adapter.sglang.sampling import check_engine, checked_all, checked_params, scored_temperature

MOE = MoEConfig(num_experts=8, topk=2, layer_ids=(1, 3), num_layers=4)
CHANGING: list[tuple[str, Any]] = [
    ("frequency_penalty", 0.1),
    ("presence_penalty", -0.5),
    ("repetition_penalty", 1.1),
    ("min_new_tokens", 1),
    ("logit_bias", {"5": 1.0}),
    ("json_schema", "{}"),
    ("regex", "a+"),
    ("ebnf", 'root ::= "a"'),
    ("structural_tag", "{}"),
    ("custom_params", {"thinking_budget": 5}),
    ("n", 2),
    ("beam_width", 4),
    ("repetition_penalty", float("nan")),
    ("frequency_penalty", "0.0"),
]


@pytest.mark.parametrize(("name", "value"), CHANGING)
def test_what_changes_the_scored_distribution_is_refused_by_name(name: str, value: Any) -> None:
    params = {"temperature": 1.0, name: value}
    with pytest.raises(CaptureError, match=rf"sampling parameters: {name} .* changes the scored distribution"):
        checked_params(params)
    with pytest.raises(CaptureError, match=rf"prompt 1: {name} "):
        checked_all([{}, params], 2)
    # Before anything is sent: nobody listens at port 9.
    with pytest.raises(CaptureError, match=rf"{name} .* changes the scored distribution"):
        generate_over_http("http://127.0.0.1:9", [[1]], params, MOE)


def test_neutral_values_and_what_is_drawn_pass() -> None:
    drawn = {"top_p": 0.5, "top_k": 5, "min_p": 0.1, "max_new_tokens": 4, "stop_token_ids": [2], "ignore_eos": True}
    params = {**drawn, "temperature": 0.5, "repetition_penalty": 1, "logit_bias": {}, "n": None, "regex": ""}
    found = checked_params(params)
    assert {name: found[name] for name in (*drawn, "temperature")} == {**drawn, "temperature": 0.5}
    # Said explicitly, so that no default of a server takes their place.
    assert (found["repetition_penalty"], found["min_new_tokens"], found["regex"]) == (1.0, 0, None)
    assert checked_params({})["temperature"] == 1.0


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"temprature": 0.5}, "'temprature' is not a known sampling parameter"),
        ({"is_normalized": True}, "'is_normalized' is not a parameter of a request"),
        ({"temperature": -1}, "temperature -1 is not a finite number from 0 on"),
        ({"temperature": float("nan")}, "temperature nan is not"),
        ({"temperature": float("inf")}, "temperature inf is not"),
        ({"temperature": True}, "temperature True is not"),
        ({"temperature": "1.0"}, "temperature '1.0' is not"),
        ({"temperature": 0.5, "top_k": 1}, "top_k 1 at temperature 0.5 is scored at one or the other; use 0"),
    ],
)
def test_what_is_not_known_or_no_number_is_refused(params: dict[str, Any], message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        checked_params(params)


def test_parameters_are_one_mapping_or_one_for_each_prompt() -> None:
    for params, message in (
        ([{}], "1 of them != 2 prompts"),
        (5, "5 is neither a mapping nor a sequence"),
        ("ab", "'ab' is neither"),
        ([{}, None], "prompt 1: None is no mapping"),
    ):
        with pytest.raises(CaptureError, match=message):
            checked_all(params, 2)


def test_greedy_sampling_is_scored_at_temperature_one() -> None:
    want = {None: 1.0, 0: 1.0, 1e-7: 1.0, 1e-6: 1e-6, 0.5: 0.5, 2: 2.0}
    assert {value: scored_temperature({"temperature": value}) for value in want} == want
    assert scored_temperature({}) == 1.0


@pytest.mark.parametrize(
    "arguments",
    [
        {"preferred_sampling_params": '{"temperature": 0.5}'},
        {"enable_custom_logit_processor": True},
        {"rl_on_policy_target": "fsdp"},
        {"sampling_backend": "mine"},
    ],
)
def test_an_engine_that_scores_otherwise_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(CaptureError, match=next(iter(arguments))):
        check_engine(arguments)


def test_log_probabilities_of_another_distribution_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "SGLANG_RETURN_ORIGINAL_LOGPROB"
    for value in ("", "0", "False"):
        monkeypatch.setenv(name, value)
        check_engine({"sampling_backend": "pytorch"})
    monkeypatch.setenv(name, "True")
    with pytest.raises(CaptureError, match=f"{name} is set"):
        check_engine({})


def test_every_field_of_the_engines_class_is_classified() -> None:
    """A release with another parameter must not pass before somebody says what it does to the scores."""
    if find_spec("sglang") is None:
        pytest.skip("sglang is not installed")
    code = "from sglang.srt.sampling.sampling_params import SamplingParams as P; print(*P.__struct_fields__)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **cpu_environment()},
        capture_output=True,
        text=True,
        check=True,
    )
    known = [sampling.UNSCORED, sampling.NEUTRAL.keys(), sampling.INTERNAL, {"temperature"}]
    names = sorted(name for names in known for name in names)
    assert len(set(names)) == len(names)
    assert sorted(done.stdout.split()) == sorted(set(names) - absent("SamplingParams", installed_release()))


def test_samples_keep_their_temperature(tmp_path: Path) -> None:
    samples = [replace(unrouted([1, 2, 3], [False, False, True]), temperature=value) for value in (1.0, 0.5, 1.7)]
    save_samples(tmp_path / "samples", samples)
    assert [sample.temperature for sample in load_samples(tmp_path / "samples")] == [1.0, 0.5, 1.7]
    for value in (0.0, -1.0, float("nan"), float("inf"), True, "1", None):
        with pytest.raises(TraceError, match=r"temperature .* is not a positive, finite number"):
            replace(samples[0], temperature=value)


def test_a_micro_batch_has_each_tokens_temperature() -> None:
    torch = pytest.importorskip("torch")
    one, other = unrouted([1, 2, 3, 4], [False, True, True, True]), unrouted([5, 6], [False, True])
    layout, device = ParallelLayout(), torch.device("cpu")
    assert packed_micro_batch([one, other], layout, 0, device).temperatures is None
    batch = packed_micro_batch([one, replace(other, temperature=0.5)], layout, 0, device)
    found = {int(token): float(value) for token, value in zip(batch.tokens[0], batch.temperatures[0], strict=True)}
    assert {token: found[token] for token in (1, 2, 3, 5)} == {1: 1.0, 2: 1.0, 3: 1.0, 5: 0.5}
