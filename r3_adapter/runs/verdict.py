"""Whether R3 is working in a run, in one sentence: what an operator wants to know first."""

from collections.abc import Sequence

from r3_adapter.runs.log import ROWS, Run, mean
from r3_adapter.runs.variants import at

ON, OFF = "R3 on", "R3 off"


def verdicts(runs: Sequence[Run]) -> list[str]:
    """Return a sentence for each run: rows and what became of them, k3 beside the runs without R3, and agreement."""
    without = [run for run in runs if not _is_asked_for(run) and not _total(run, "rows/replayed")]
    names = [run.name for run in runs]
    said = [f"{run.name} ({run.folder})" if names.count(run.name) > 1 else run.name for run in runs]
    return [
        f"{name}: {_verdict(run, [other for other in without if other is not run])}"
        for name, run in zip(said, runs, strict=True)
    ]


def _progress(run: Run) -> str:
    """Say how far a run has come that has not ended; nothing of one that has."""
    if run.finished:
        return ""
    total = run.config["flags"].get("num_rollout")
    so_far = f"step {run.steps[-1]['step'] + 1}{f' of {total}' if total else ''}" if run.steps else "no step yet"
    return f"under way, {so_far}" if run.under_way else f"STOPPED before its end: {so_far}"


def _verdict(run: Run, without: Sequence[Run]) -> str:
    rows = {kind: _total(run, f"rows/{kind}") for kind in ROWS}
    said = [_rows(run, rows)]
    k3 = run.summary.get("k3")
    if k3 is not None:
        said.append(f"k3 {k3:.2e}{_beside(run, k3, without) if rows['replayed'] else ''}")
    if agreement := _agreement(run):
        would = "would have differed" if rows["replayed"] else "differ"
        said.append(f"live routers {would} in {1 - agreement:.2%} of experts")
    if under_way := _progress(run):
        said.append(under_way)
    return "; ".join(said)


def _rows(run: Run, rows: dict[str, float]) -> str:
    if not any(rows.values()):
        return "whether R3 works cannot be told: no step has recorded its rows"
    routed = rows["replayed"] + rows["live"]
    counts = f"{rows['replayed']:,.0f} of {routed:,.0f} rows replayed, {rows['stale']:,.0f} stale"
    if rows["replayed"]:
        return f"{ON}: {counts}"
    return f"R3 IS NOT WORKING, though it was asked for: {counts}" if _is_asked_for(run) else f"{OFF}: {counts}"


def _is_asked_for(run: Run) -> bool:
    return bool(run.config["flags"].get("r3") or run.config["flags"].get("r2"))


def _beside(run: Run, k3: float, without: Sequence[Run]) -> str:
    """Compare with the runs without R3 that have the same model."""
    others = [other for other in without if other.config["model"] == run.config["model"] and other.summary.get("k3")]
    if not others or not k3:
        return ""
    other = min(others, key=lambda each: float(each.summary["k3"]))
    ratio = other.summary["k3"] / k3
    times = f"{ratio:,.0f}" if ratio >= 100 else f"{ratio:.3g}"
    return f", {times} times lower than `{other.name}`" if ratio >= 1 else f", NOT lower than `{other.name}`"


def _agreement(run: Run) -> float | None:
    """Return the mean share of equal experts over steps and layers."""
    return mean([mean(list(found.values())) or 0.0 for step in run.steps if (found := step.get("agreement"))])


def _total(run: Run, key: str) -> float:
    return sum(run.series(at(key)).values())
