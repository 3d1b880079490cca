"""The experiment on collapse: its page follows from its results, and its rules do what its design says."""

import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

PAPER = Path(__file__).parents[2] / "benchmarks" / "paper"
MODULES = ("collapse", "design", "store")
RISES = [min(1.0, step / 50) for step in range(100)]


@pytest.fixture(scope="module")
def paper() -> Iterator[Any]:
    """Return the experiment's modules, which are no package, and forget them afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(PAPER))
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
        for name in MODULES:
            sys.modules.pop(name, None)


def test_the_page_and_its_plots_follow_from_the_committed_results(tmp_path: Path) -> None:
    shutil.copyfile(PAPER / "results.json", tmp_path / "results.json")
    (tmp_path / "old.svg").write_text("of a run that is no more")
    script = [sys.executable, "-W", "ignore", str(PAPER / "run.py"), "--table", "--out", str(tmp_path / "results.json")]
    subprocess.run(script, check=True, timeout=300)
    names = {path.name for path in PAPER.iterdir() if path.suffix == ".svg" or path.name == "README.md"}
    assert {path.name for path in tmp_path.iterdir()} - {"results.json"} == names
    for name in names:
        assert (tmp_path / name).read_text(encoding="utf-8") == (PAPER / name).read_text(encoding="utf-8"), name


def test_committed_claim_is_the_one_that_its_figures_make(paper: Any) -> None:
    results = json.loads((PAPER / "results.json").read_text(encoding="utf-8"))
    assert results["claim"] == json.loads(json.dumps(paper.store.claim(results)))
    for seeds in results["cells"].values():
        for each in seeds.values():
            if each["diverged"]:
                continue
            assert each["collapse"] == paper.collapse.collapse(each["reward"], each["grad_norm"], each["k3"])


@pytest.mark.parametrize(
    ("figures", "found"),
    [
        ({}, {}),
        # From 1 to 0.49 of the best mean of 20 steps: 0.1 is left after 12 of 20 steps.
        ({"reward": [*RISES, *[0.1] * 20]}, {"reward": 111}),
        ({"reward": [*RISES, *[0.51] * 20]}, {}),
        # What falls before the first 20 steps are over falls from where it began.
        ({"reward": [1.0, 0.7, *[0.4] * 118]}, {"reward": 19}),
        ({"reward": [1.0, 0.9, *[0.51] * 118]}, {}),
        # A short dip is no collapse.
        ({"reward": [*RISES, *[0.0] * 9, *[1.0] * 11]}, {}),
        ({"grad_norm": [1.0] * 100 + [101.0] * 5 + [1.0] * 15}, {"grad_norm": 104}),
        ({"grad_norm": [1.0] * 100 + [101.0] * 4 + [1.0] * 16}, {}),
        ({"grad_norm": [1.0] * 50 + [None] + [1.0] * 69}, {"grad_norm": 50}),
        ({"k3": [0.1] * 100 + [1.1] * 20}, {"kl": 104}),
        ({"k3": [float("nan")] + [0.1] * 119}, {"kl": 0}),
    ],
)
def test_collapse_is_what_the_design_says(paper: Any, figures: dict[str, Any], found: dict[str, int]) -> None:
    whole = {"reward": [*RISES, *[1.0] * 20], "grad_norm": [1.0] * 120, "k3": [0.1] * 120, **figures}
    want = {"reward": None, "grad_norm": None, "kl": None, **found}
    assert paper.collapse.collapse(whole["reward"], whole["grad_norm"], whole["k3"]) == want
    assert paper.collapse.collapsed(want) == bool(found)


def stage0(paper: Any, rows: float, tokens: float) -> dict[str, Any]:
    return {
        shape: {name: {"routers_that_differ": rows, "tokens_that_differ": tokens} for name in paper.design.PRECISIONS}
        for shape in paper.design.SHAPES
    }


def test_base_is_the_first_with_enough_and_is_not_told_before_all_ahead_of_it_are_measured(paper: Any) -> None:
    base_of, found = paper.design.base_of, stage0(paper, 0.01, 0.9)
    assert base_of({})[0] is None and base_of({})[1][0] == ("16x32", "bf16") and len(base_of({})[1]) == 6
    found["16x32"]["fp32-bf16"] = {"routers_that_differ": 0.1, "tokens_that_differ": 0.51}
    found["16x32"]["fp32-fp8"] = {"routers_that_differ": 0.9, "tokens_that_differ": 0.9}
    assert base_of(found) == (("16x32", "fp32-bf16"), [])
    found["16x32"]["fp32-bf16"]["tokens_that_differ"] = 0.5
    assert base_of(found) == (("16x32", "fp32-fp8"), [])
    # Larger shapes are measured after the table.
    del found["16x64"]
    assert base_of(found) == (("16x32", "fp32-fp8"), [])
    del found["16x32"]["bf16"]
    assert base_of(found)[0] is None and base_of(found)[1][0] == ("16x32", "bf16")
    assert base_of(stage0(paper, 0.05, 0.9))[0] == ("16x32", "bf16")


def entry(collapsed: str | None = None, reward: float = 0.5, finished: bool = True) -> dict[str, Any]:
    rules = {rule: 30 if rule == collapsed else None for rule in ("reward", "grad_norm", "kl")}
    return {"finished": finished, "collapse": rules, "reward": [reward] * 20, "steps": 20}


def test_claim_wants_every_seed_and_a_regime_by_the_rule(paper: Any) -> None:
    """Row 2 of the search is the first in which GRPO collapses by its reward and GRPO + R3 by nothing."""
    results = {"stage0": stage0(paper, 0.2, 0.9), "cells": {}}
    base, cells = ("16x32", "bf16"), results["cells"]
    assert paper.store.claim(results)["shown"] is False
    for number, (plain, replayed) in enumerate(paper.design.search_cells(base), start=1):
        cells[plain.name] = {"100": entry("grad_norm" if number == 1 else "reward")}
        cells[replayed.name] = {"100": entry()}
    regime, by_rule = paper.store.regime_of(results)
    assert by_rule and asdict(regime) == asdict(paper.design.SEARCH[1])
    for cell in paper.design.table_cells(base, regime):
        seeds = cells.setdefault(cell.name, {})
        seeds[str(cell.seed)] = entry("reward" if cell.name == "regime:GRPO" else None)
    claim = paper.store.claim(results)
    assert claim["shown"] is True and claim["regimes"]["regime"]["variants"]["GRPO"]["by_reward"] == 3
    assert {each["settings"]["lr"] for each in claim["regimes"].values()} == {1e-3, 3e-3, 9e-3}
    for name, wrong in (
        ("regime:GRPO", entry("grad_norm")),
        ("regime:GRPO+R3", entry("kl")),
        ("milder:GRPO", entry(finished=False)),
    ):
        before, cells[name]["1"] = cells[name]["1"], wrong
        assert paper.store.claim(results)["shown"] is False, name
        cells[name]["1"] = before
    for number in range(1, len(paper.design.SEARCH) + 1):
        # Among rows that are left for later no regime is chosen.
        cells[f"search-{number}:GRPO"]["100"] = entry(reward={7: 0.3, 14: 0.4}.get(number, 0.5))
    assert 7 in paper.design.LEFT and paper.store.regime_of(results) == (paper.design.SEARCH[13], False)
    assert paper.store.claim(results)["shown"] is False
