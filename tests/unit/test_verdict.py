"""What `r3 prove` says in words and in its report, of a test that passed and of one that did not."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from r3_adapter.commands.output import print_verdict
from r3_adapter.errors import R3Error
from r3_adapter.flag_values import output_file_or_stdout
from r3_adapter.layout import ParallelLayout
from r3_adapter.proof import engine
from r3_adapter.proof.engine import ProofEngine
from r3_adapter.proof.evidence import Evidence, Gaps, weigh
from r3_adapter.proof.scoring import Scores
from r3_adapter.proof.verdict import Verdict, judge
from r3_adapter.rollout import Sample
from r3_adapter.trace import RoutingTrace

ROUTES = 2 * 4


@pytest.fixture
def samples() -> list[Sample]:
    ids = np.zeros((5, 2, 1), np.uint8)
    versions = np.array([0, 0, 0, 0, -1], np.int32)
    trace = RoutingTrace(ids, np.arange(5, dtype=np.int32), versions, np.arange(2, dtype=np.int32), 4, ("0",))
    return [Sample(trace, 2, np.full(3, -1.0, np.float32), temperature=0.5) for _ in range(2)]


def judged(
    samples: list[Sample],
    *,
    replay: float = 0.0,
    live: float = -3.0,
    injection: str | None = None,
    evidence: Evidence | None = None,
    exact: bool = True,
) -> Verdict:
    """Judge passes in which the second token of the second sample is off by so much."""

    def scores(off: float) -> Scores:
        logprobs = [sample.logprobs.copy() for sample in samples]
        logprobs[1][1] += np.float32(off)
        layers = {layer: dict.fromkeys(("routes", "routes_equal", "ids", "ids_equal"), ROUTES) for layer in range(2)}
        return Scores(logprobs, layers, {}, None, {"in_layers": 3, "layers": 1, "count_exchanges": 0}, {}, "argument")

    found = {"live": scores(live), "replay": scores(replay), "train": scores(0.0)}
    about = {"seed": 3, "scene": {"group": 1}, "injection": injection}
    return judge(samples, found, ParallelLayout(), None, about, evidence, exact=exact)


def test_a_test_that_passed_says_what_it_has_shown(samples: list[Sample]) -> None:
    verdict = judged(samples, replay=-5e-6)
    assert verdict.passed
    assert verdict.sentence.startswith("passed: with routes replayed, all 6 response tokens are within 5.0e-06")
    assert "live routers are off by 3" in verdict.sentence
    assert "16 of 16 routes" in verdict.sentence
    report = verdict.to_json()
    assert report["limits"] == {"max_abs_dlogp_replay": 1e-4, "max_abs_dlogp_live": 1e-2}
    assert report["about"]["seed"] == 3
    assert report["versions"]["r3-adapter"] and set(report["patches"]) == {"sglang", "megatron-core"}


def test_a_test_that_failed_says_where_it_is_worst(samples: list[Sample]) -> None:
    verdict = judged(samples, replay=-0.25)
    assert (verdict.worst.sample, verdict.worst.position, verdict.worst.response_token) == (1, 3, 1)
    assert (verdict.worst.temperature, verdict.worst.pass_name) == (0.5, "replay")
    assert verdict.sentence == (
        "failed: max |d logp| after replay 2.50e-01 > 0.0001, at sample 1, position 3 (response token 1), in pass "
        "'replay': -1.250000 in the trainer, -1.000000 in the rollout"
    )


def test_a_planted_damage_is_told_from_a_broken_installation(samples: list[Sample]) -> None:
    assert judged(samples, replay=-1, injection="shift-token").sentence.endswith(
        "shift-token was planted, so it had to fail"
    )
    assert judged(samples, injection="shift-token").sentence.endswith("But shift-token was planted, and was not seen")


def test_live_routers_that_agree_and_routes_that_are_missing_prove_nothing(samples: list[Sample]) -> None:
    assert "nothing was proved" in judged(samples, live=-1e-3).sentence
    verdict = replace(judged(samples), routes_trained=15)
    assert verdict.sentence == "failed: routes replayed in training 15 != 16 routes recorded"


def weighed(worst: float) -> Evidence:
    """Judge replay at the floor of a coarse engine, but for one token."""
    rng = np.random.default_rng(0)
    floor: Gaps = list(np.abs(rng.normal(0, 0.02, (8, 100))))
    replay: Gaps = [*np.abs(rng.normal(0, 0.02, (8, 100))), np.array([worst])]
    far: Gaps = [np.ones(100)]
    return weigh(replay, floor=floor, live=far, shifted=far, misplaced=[*far, *far, np.zeros(3)])


def test_a_coarse_engine_is_measured_by_its_own_noise(samples: list[Sample]) -> None:
    verdict = judged(samples, replay=-0.05, evidence=weighed(0.05), exact=False)
    assert verdict.passed
    assert "times temperature (limit 1." in verdict.sentence and "unperturbed, the engine is off by" in verdict.sentence
    assert "a single misplaced route would have been seen in 66.7% of samples (of 3)" in verdict.sentence
    report = verdict.to_json()
    assert report["limits"]["max_abs_dlogp_replay"] is None
    assert report["evidence"]["seen"] == 2 and report["evidence"]["passed"] is True
    assert json.loads(json.dumps(report))["evidence"]["floor"]["tokens"] == 800
    # What is known to round less is held to it.
    assert not judged(samples, replay=-0.05, evidence=weighed(0.05)).passed


def test_evidence_against_replay_says_where_it_is_worst(samples: list[Sample]) -> None:
    sentence = judged(samples, replay=-0.25, evidence=weighed(0.25), exact=False).sentence
    assert sentence.startswith("failed: largest gap after replay 2.50e-01 > 1.")
    assert "; worst at sample 1, position 3 (response token 1), in pass 'replay'" in sentence
    unseen = replace(weighed(0.05), seen=0)
    assert "0 of 3 single misplaced routes seen" in judged(samples, evidence=unseen).sentence


def test_an_engine_of_the_users_own_is_checked_before_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "has_gpu", lambda: False)
    assert ProofEngine().is_exact and ProofEngine().min_seen == 0.99 and ProofEngine().checkpoint_dtype == "float32"
    fp8 = ProofEngine("auto", {"quantization": "fp8", "page_size": 1})
    assert not fp8.is_exact and fp8.min_seen == 0.0 and fp8.checkpoint_dtype == "bfloat16"
    settings = fp8.settings(Path("model"), seed=3)
    assert settings.engine_arguments(gpu=True)["quantization"] == "fp8"
    assert (settings.dtype, settings.max_total_tokens, settings.radix_cache) == ("auto", 8192, True)
    for arguments, said in (
        ({"dtype": "float16"}, "SGLang's dtype \\('float16'\\) is given by the self-test itself"),
        ({"max_total_token": 9}, "did you mean 'max_total_tokens'"),
        ({"speculative_algorithm": "EAGLE"}, "rows of rejected tokens"),
    ):
        with pytest.raises(R3Error, match=said):
            ProofEngine("bfloat16", arguments)
    with pytest.raises(R3Error, match="dtype 'float64' is none of 'float32', 'bfloat16', 'auto'"):
        ProofEngine("float64")  # type: ignore[arg-type]


def test_a_back_end_that_is_not_installed_is_not_left_to_sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "has_gpu", lambda: True)
    monkeypatch.setattr(engine, "version_of", lambda name: None)
    monkeypatch.setattr(engine, "_has_flash_attention_3", lambda: False)
    chosen = ProofEngine("bfloat16", {"sampling_backend": "pytorch"})
    assert chosen.chosen == {"attention_backend": "triton"} and not ProofEngine().is_exact
    assert chosen.settings(Path("model"), seed=0).engine_arguments(gpu=True)["attention_backend"] == "triton"
    monkeypatch.setattr(engine, "version_of", lambda name: "0.6.1")
    assert ProofEngine().chosen == {}


def test_what_was_chosen_is_said(samples: list[Sample]) -> None:
    verdict = judged(samples)
    about = {**verdict.about, "engine": {"chosen": {"attention_backend": "triton"}}}
    assert "; attention_backend 'triton' was chosen, since" in replace(verdict, about=about).sentence


def test_json_comes_only_where_it_is_asked_for(
    samples: list[Sample], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verdict, file = judged(samples, evidence=weighed(0.05), exact=False), tmp_path / "verdict.json"
    assert print_verdict(verdict, output_file_or_stdout(str(file))) == 0
    said = capsys.readouterr()
    assert "routes shifted by a token" in said.out and "16 of 16 routes replayed" in said.out and "{" not in said.out
    assert said.err == f"r3 prove: {verdict.sentence}\n"
    assert print_verdict(judged(samples, replay=-0.25), output_file_or_stdout("-")) == 1
    said = capsys.readouterr()
    assert json.loads(said.out)["passed"] is False and said.err.startswith("r3 prove: failed: ")
    assert json.loads(file.read_text(encoding="utf-8"))["sentence"] == verdict.sentence
