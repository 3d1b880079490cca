"""Each fault of an engine's capture fails the self-test, in float32 and in bfloat16, and it says where."""

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest

from r3_adapter.layout import ParallelLayout
from r3_adapter.megatron.policy_trainer.options import PASSES
from r3_adapter.proof.engine import ProofEngine
from r3_adapter.proof.evidence import gaps_of
from r3_adapter.proof.prove import Compared
from r3_adapter.proof.scoring import score
from r3_adapter.proof.tiny import write_checkpoint
from r3_adapter.proof.verdict import Verdict, judge
from r3_adapter.rollout import load_samples

pytestmark = [pytest.mark.engine, pytest.mark.slow]

FAULTS = ("none", "shifted-row", "stale-slot", "neighbours-row", "layer-off-by-one")
SEED = 11


class Judged(NamedTuple):
    """The verdict on each fault; and how far the unperturbed engine is from the trainer's live routers, at most."""

    verdicts: Mapping[str, Verdict]
    unperturbed: float
    exact: bool


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def judged(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Judged:
    """One engine and one trainer for all faults."""
    engine, folder = ProofEngine(request.param), tmp_path_factory.mktemp(request.param)
    write_checkpoint(folder / "model", dtype=engine.checkpoint_dtype, seed=SEED)
    command = [sys.executable, str(Path(__file__).with_name("engine_faults.py")), str(folder / "model"), request.param]
    subprocess.run([*command, str(folder), *FAULTS], check=True, timeout=600)
    runs = [[load_samples(folder / f"{fault}-{perturbed}") for perturbed in (False, True)] for fault in FAULTS]
    compared = [Compared.of(floor, samples, SEED, rounds=2) for floor, samples in runs]
    plain = runs[FAULTS.index("none")][0]
    samples = [sample for _, own in runs for sample in own] + plain
    beside = [sample for each in compared for sample in each.samples]
    scores = score(folder / "model", samples, ParallelLayout(), beside=beside)
    scores["train"] = scores["replay"]
    own, near = {name: iter(found.logprobs) for name, found in scores.items()}, iter(scores["beside"].logprobs)
    found = {}
    for fault, (_, samples), each in zip(FAULTS, runs, compared, strict=True):
        part = {name: replace(scores[name], logprobs=[next(own[name]) for _ in samples]) for name in PASSES}
        evidence = each.evidence(samples, part, [next(near) for _ in each.samples], engine)
        verdict = judge(samples, part, ParallelLayout(), evidence=evidence, exact=engine.is_exact)
        # Counted of all faults' samples together.
        whole = {"routes_replayed": verdict.routes_expected, "routes_trained": verdict.routes_expected}
        found[fault] = replace(verdict, **whole)
    live = [gap.max() for gap in gaps_of(plain, list(own["live"]))]
    return Judged(found, float(max(live)), engine.is_exact)


def test_an_engine_is_not_perturbed_while_its_switch_is_off(judged: Judged) -> None:
    """Then the trainer's own routers find the same experts, but for near-ties in bfloat16."""
    perturbed = judged.verdicts["none"].max_abs_dlogp_live
    assert judged.unperturbed < (1e-4 if judged.exact else perturbed)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_fails_the_self_test(judged: Judged, fault: str) -> None:
    verdict = judged.verdicts[fault]
    if fault == "none":
        evidence = verdict.evidence
        assert evidence is not None
        # So few tokens of bfloat16 say little of their tail.
        assert verdict.failures == [] if judged.exact else evidence.replay.worst < 1.5 * evidence.token_limit
        return
    assert not verdict.passed
    assert f"at sample {verdict.worst.sample}, position {verdict.worst.position}" in verdict.sentence
