"""results.json: what runs have shown so far, put together over sittings, and what follows from it by the rules."""

import fcntl
import json
import math
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from collapse import WINDOW, collapse, collapsed
from design import ADDED, LEFT, SEARCH, SEEDS, Cell, Regime, base_of, beside, search_cells, table_cells

from r3_adapter.runs.log import Run

DIVERGED = "diverged.txt"
"""In the folder of a run that ended before its last step: why."""
COLUMNS = ("reward", "k3", "f_2", "grad_norm", "entropy")
Results = dict[str, Any]


@contextmanager
def opened(path: Path) -> Iterator[Results]:
    """Read the results, and write what was made of them; other processes wait."""
    lock = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        results = read(path)
        yield results
        results["claim"] = claim(results)
        partial = path.with_suffix(".part")
        partial.write_text(dump(results), encoding="utf-8")
        os.replace(partial, path)
    finally:
        os.close(lock)


def read(path: Path) -> Results:
    """Return the results; those of nothing where there are none."""
    found: Results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for key in ("stage0", "cells"):
        found.setdefault(key, {})
    return found


def dump(results: Results) -> str:
    """Return the file's text: a column of figures a line, everything else indented."""
    columns: dict[str, str] = {}

    def mark(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: mark(each) for key, each in value.items()}
        if isinstance(value, list) and len(value) > 8:
            columns[name := f"@{len(columns)}@"] = json.dumps(value)
            return name
        return value

    text = json.dumps(mark(results), indent=2)
    for name, column in columns.items():
        text = text.replace(f'"{name}"', column, 1)
    return text + "\n"


def versions() -> dict[str, str]:
    """Return what the figures depend on."""
    return {name: version(name) for name in ("sglang", "megatron-core", "torch", "ray", "r3-adapter")}


def machine() -> str:
    """Return the processor's name, and whether it has instructions for bfloat16."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}
    has = "with" if "avx512_bf16" in facts.get("flags", "").split() else "without"
    return f"{os.cpu_count()} cores, {facts.get('model name', platform.machine())}, {has} bfloat16 instructions"


def entry_of(cell: Cell, folder: Path) -> Results:
    """Return what is published of a run, which may be under way."""
    run = Run.load(folder)
    series = {name: [_short(step.get(name)) for step in run.steps] for name in COLUMNS}
    evaluated = {0: run.steps[0].get("eval_reward_before")} if run.steps else {}
    evaluated |= {step["step"] + 1: step["eval_reward"] for step in run.steps if "eval_reward" in step}
    why = (folder / DIVERGED).read_text(encoding="utf-8") if (folder / DIVERGED).exists() else None
    found = collapse(series["reward"], series["grad_norm"], series["k3"])
    if why is not None and not collapsed(found):
        # The step whose log-probabilities were not finite has no figures.
        found["kl"] = len(run.steps)
    agreement = [value for step in run.steps for value in step.get("agreement", {}).values()]
    return {
        "settings": {
            "shape": cell.base[0],
            "precision": cell.base[1],
            **_settings(cell.regime),
            # Some variants have a lag of their own.
            "lag": cell.lag,
            "steps": cell.num_rollouts,
        },
        "machine": machine(),
        "versions": run.config["versions"],
        "steps": len(run.steps),
        "finished": len(run.steps) == cell.num_rollouts or why is not None,
        "diverged": why,
        "seconds_a_step": _short(sum(step["seconds"]["step"] for step in run.steps) / max(1, len(run.steps))),
        "ids_that_agree": _short(sum(agreement) / len(agreement)) if agreement else None,
        "collapse": found,
        "evaluation": {str(step): _short(value) for step, value in evaluated.items() if value is not None},
        **series,
    }


def put(results: Results, cell: Cell, entry: Results) -> None:
    """Take a run's entry, unless one with more steps is there."""
    seeds = results["cells"].setdefault(cell.name, {})
    before = seeds.get(str(cell.seed))
    if before is None or entry["steps"] >= before["steps"]:
        seeds[str(cell.seed)] = entry


def entries(results: Results, name: str) -> dict[str, Results]:
    """Return a cell's entries by seed."""
    return dict(results["cells"].get(name, {}))


def regime_of(results: Results) -> tuple[Regime, bool] | None:
    """Return the regime, and whether it is what the rule asks for; None where that cannot be told yet."""
    base, _ = base_of(results["stage0"])
    if base is None:
        return None
    differences: list[tuple[float, Regime]] = []
    for number, ((plain, replayed), regime) in enumerate(zip(search_cells(base), SEARCH, strict=True), start=1):
        if number in LEFT:
            continue
        pair = [entries(results, cell.name).get(str(cell.seed)) for cell in (plain, replayed)]
        without, with_r3 = pair
        if without is None or with_r3 is None or not (without["finished"] and with_r3["finished"]):
            return None
        if without["collapse"]["reward"] is not None and not collapsed(with_r3["collapse"]):
            return regime, True
        last = [sum(value or 0.0 for value in each["reward"][-WINDOW:]) / WINDOW for each in (with_r3, without)]
        differences.append((last[0] - last[1], regime))
    return max(differences, key=lambda each: each[0])[1], False


def claim(results: Results) -> Results:
    """Return what the experiment says: its regimes, by variant the seeds that ended and collapsed, and `shown`."""
    base, _ = base_of(results["stage0"])
    found = regime_of(results)
    if base is None or found is None:
        return {"shown": False, "why": "the regime is not found yet", "base": base, "regimes": {}}
    regime, by_rule = found
    names: dict[str, dict[str, list[Cell]]] = {}
    for cell in table_cells(base, regime):
        place, _, variant = cell.name.partition(":")
        names.setdefault(place, {}).setdefault(variant, []).append(cell)
    regimes = {
        place: {
            "settings": _settings(each),
            "variants": {variant: _counts(results, cells[0].name) for variant, cells in names[place].items()},
        }
        for place, each in beside(regime).items()
    }
    return {"base": base, "by_rule": by_rule, "added": regime in ADDED, "regimes": regimes, **_shown(regimes, by_rule)}


def _settings(regime: Regime) -> Results:
    return {
        "lr": regime.lr,
        "warmup_steps": regime.warmup_steps,
        "optimizer_steps": regime.num_steps,
        "lag": regime.lag,
        "task": regime.task,
        "precision": regime.precision,
    }


def _counts(results: Results, name: str) -> Results:
    mine = [each for seed, each in entries(results, name).items() if int(seed) in SEEDS]
    return {
        "seeds": len(mine),
        "ended": sum(each["finished"] for each in mine),
        "collapsed": sum(collapsed(each["collapse"]) for each in mine),
        "by_reward": sum(each["collapse"]["reward"] is not None for each in mine),
    }


def _shown(regimes: Mapping[str, Any], by_rule: bool) -> Results:
    both = [regimes[place]["variants"][name] for place in regimes for name in ("GRPO", "GRPO+R3")]
    if not by_rule:
        return {"shown": False, "why": "no row of the search had a collapse of GRPO without one of GRPO + R3"}
    if any(each["ended"] < len(SEEDS) for each in both):
        return {"shown": False, "why": "not all runs of GRPO and GRPO + R3 have ended"}
    plain, replayed = (regimes["regime"]["variants"][name] for name in ("GRPO", "GRPO+R3"))
    shown = plain["by_reward"] == len(SEEDS) and replayed["collapsed"] == 0
    return {"shown": shown, "why": "every seed" if shown else "not every seed did what the claim says"}


def _short(value: Any) -> float | None:
    """Return a number in five digits; None in place of one that JSON has not."""
    return float(f"{value:.5g}") if value is not None and math.isfinite(value) else None
