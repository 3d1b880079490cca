"""The README's table of families is what their record says, and the record what the self-test asks."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from r3_adapter.errors import R3Error, UnknownModelError
from r3_adapter.proof.families import KERNELS, NOT_BUILT, NOT_ON_CPU
from r3_adapter.proof.models import Model, families
from r3_adapter.proof.verdict import MAX_REPLAY, MIN_LIVE
from r3_adapter.sglang.cpu import has_gpu
from r3_adapter.sglang.moe_config import MoEConfig

pytest.importorskip("torch")
pytest.importorskip("transformers")
from r3_adapter.proof import shown

REPO = Path(__file__).resolve().parents[2]
RUNS = ("sglang on a CPU", "sglang on a GPU", "transformers")


@pytest.fixture(scope="module")
def record() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads((REPO / shown.RECORD).read_text(encoding="utf-8"))
    return found


def test_the_table_is_what_the_record_says(record: dict[str, dict[str, Any]]) -> None:
    text = (REPO / shown.README).read_text(encoding="utf-8")
    assert shown.with_table(text, record) == text
    assert all(f"| {name} |" in text for name in (*families(), *NOT_BUILT))


def test_what_the_record_calls_shown_met_the_bars(record: dict[str, dict[str, Any]]) -> None:
    assert record.keys() == set(families())
    for name, entry in record.items():
        runs = [entry[key] for key in RUNS if key in entry]
        assert bool(runs) != ("refused" in entry), name
        for run in runs:
            assert run["max_abs_dlogp_replay"] <= MAX_REPLAY and run["max_abs_dlogp_live"] >= MIN_LIVE
            assert run["versions"].keys() >= {"megatron-core", "torch"} and run["tokens"] > 0


@pytest.mark.parametrize("name", families())
def test_the_planner_counts_as_it_is_recorded(name: str, record: dict[str, dict[str, Any]]) -> None:
    assert shown.planned_share(name) == record[name]["planner"]


@pytest.mark.skipif(has_gpu(), reason="with a GPU they are trained")
@pytest.mark.parametrize("family", NOT_ON_CPU)
def test_what_needs_a_gpu_is_refused_by_name(family: str) -> None:
    with pytest.raises(R3Error, match=f"{family}: Megatron does not train it without a GPU: Megatron's .* need"):
        Model(family).check()


@pytest.mark.parametrize("family", KERNELS)
def test_with_a_gpu_missing_kernels_are_refused_by_name(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("r3_adapter.proof.models.has_gpu", lambda: True)
    last = KERNELS[family][-1]
    monkeypatch.setattr("r3_adapter.proof.models.find_spec", lambda name: None if name == last else find_spec("torch"))
    with pytest.raises(R3Error, match=f"{family}: its layers take kernels of {last} on a GPU, which is not installed"):
        Model(family).check()


@pytest.mark.parametrize("family", NOT_BUILT)
def test_a_family_without_a_configuration_is_refused_by_name(family: str) -> None:
    with pytest.raises(UnknownModelError, match=family):
        MoEConfig.from_config({"model_type": family, "num_hidden_layers": 2})


def test_without_megatron_bridge_a_family_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("r3_adapter.proof.models.find_spec", lambda name: None if "bridge" in name else find_spec(name))
    with pytest.raises(R3Error, match="olmoe: its weights come to Megatron by megatron-bridge, which is not installed"):
        Model("olmoe").check()
    Model().check()


def test_a_run_that_did_not_pass_is_not_recorded() -> None:
    class Failed:
        passed, sentence, about = False, "failed: 0.3 > 1e-4", {"model": {"family": "olmoe"}}

    with pytest.raises(R3Error, match="olmoe: failed"):
        shown.found_of(Failed())


def test_a_readme_without_marks_is_refused() -> None:
    with pytest.raises(R3Error, match="no marks"):
        shown.with_table("# r3_adapter\n", {})
