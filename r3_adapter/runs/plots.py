"""The plots of the report page, as plain data.

Colours: one of `COLORS` is a variant's, wherever it stands; tints of purple are R3's, of what it did and what it took;
greys are all else; red is stale. The map of agreement alone has a scale of colours, from blue to yellow.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from r3_adapter.runs.charts import HeatMap, Key, Lines, Marks, Series, Stack
from r3_adapter.runs.files import Number, Step
from r3_adapter.runs.log import R3_STAGES, ROWS, STAGES, replays
from r3_adapter.runs.variants import MAX_POINTS, Curve, Figure, Variant, at, ratio

# Of Okabe and Ito, readable on white and told apart with each common kind of colour blindness; none is a purple.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#e69f00", "#56b4e9", "#222222")
DASHES = ("solid", "dashed", "dotted")
STAGE_COLORS = {
    "rollout": "#44546a",
    "old_logprobs": "#7b8ba3",
    "train": "#aab6c6",
    "weights": "#d0d7e0",
    "other": "#eceff3",
    "R3": "#6a3d9a",
    "capture": "#4a2574",
    "transport": "#7f56ad",
    "repack": "#a98bcb",
    "replay": "#d2c2e6",
}
ROW_COLORS = {"replayed": STAGE_COLORS["R3"], "live": "#7b8ba3", "padding": "#dfe4ea", "stale": "#c00020"}


@dataclass(frozen=True)
class Line:
    """A figure to draw over steps; events: faults are marked on its curves."""

    title: str
    unit: str
    figure: Figure
    log: bool = False
    percent: bool = False
    events: bool = False


def _scaled(key: str, factor: float) -> Figure:
    def read(step: Step) -> Number | None:
        value = at(key)(step)
        return None if value is None else value * factor

    return read


AGAINST_ROLLOUT = "Trainer against rollout"
LOADS = "Loads of experts, by expert-parallel rank"
SECTIONS: dict[str, tuple[Line, ...]] = {
    AGAINST_ROLLOUT: (
        Line("k3 KL of trainer to rollout", "nats", at("k3"), log=True),
        Line("F(2): tokens off by more than 2 times", "share of tokens", at("f_2"), percent=True),
    ),
    "Learning": (
        Line("Reward", "mean of the step", at("reward"), events=True),
        Line("Gradient norm", "norm", at("grad_norm"), log=True),
        Line("Entropy", "nats", at("entropy")),
        Line("Response length", "tokens", ratio("response_tokens", "samples")),
    ),
    "Time": (Line("Seconds a step", "seconds", at("seconds/step")),),
    LOADS: (
        Line("Tokens of the fullest rank over the mean", "1 is even", at("expert_load/ratio")),
        Line("The same, at its worst in a layer and micro-batch", "1 is even", at("expert_load/worst")),
    ),
    "Bytes and memory": (
        Line("Routes produced", "bytes a response token", ratio("bytes/routes", "response_tokens")),
        Line("Routes read by trainer ranks", "KiB a step", _scaled("bytes/routes_pulled", 2**-10)),
        Line("Weights sent", "MiB a step", _scaled("bytes/weights", 2**-20)),
        Line("Memory of the trainer", "resident, GiB", _scaled("memory/trainer_rss", 2**-30)),
        Line("Memory of the engines", "resident, GiB", _scaled("memory/engine_rss", 2**-30)),
        Line("Memory of Ray's object store", "MiB", _scaled("memory/object_store", 2**-20)),
    ),
}


def style(number: int) -> tuple[str, str]:
    """Return colour and dash of a variant."""
    return COLORS[number % len(COLORS)], DASHES[number // len(COLORS) % len(DASHES)]


def line_chart(line: Line, variants: Sequence[Variant], width: int) -> Lines | None:
    """Draw a figure over steps, one line a variant, with a band over its runs; None: nobody has it."""
    curves = [variant.curve(line.figure, width) for variant in variants]
    if not any(curve.steps for curve in curves):
        return None
    drawn: list[Series] = []
    marks: list[Marks] = []
    notes = _not_recorded([variant.label for variant, curve in zip(variants, curves, strict=True) if not curve.steps])
    for number, (variant, curve) in enumerate(zip(variants, curves, strict=True)):
        if not curve.steps:
            continue
        drawn.append(_series(line, variant, curve, number, width))
        marks += _event_marks(variant, curve, number, width) if line.events else []
        bad = [step for step, value in zip(curve.steps, curve.mean, strict=True) if not math.isfinite(value)]
        if bad:
            notes.append(f"{variant.label}: {len(bad)} points are not finite, the first at step {bad[0]}")
        if line.log and (hidden := sum(value <= 0 for value in curve.mean)):
            notes.append(f"{variant.label}: {hidden} points are 0 or less and have no place on a log scale")
    if width > 1:
        notes.append(f"each point is the mean of {width} steps")
    return Lines(
        title=line.title,
        x_title="step",
        y_title=line.unit,
        series=drawn,
        marks=marks,
        log=line.log,
        percent=line.percent,
        notes=notes,
    )


def _series(line: Line, variant: Variant, curve: Curve, number: int, width: int) -> Series:
    """Return a curve with None between points that are not neighbours, and for what has no place.

    A figure that is recorded every few steps has no neighbours: gaps count from its usual distance on.
    """
    color, dash = style(number)
    distances = sorted(after - before for before, after in pairwise(curve.steps))
    usual = distances[len(distances) // 2] if distances else width
    rows: list[tuple[int, Number | None, Number | None, Number | None, str]] = []
    values = zip(curve.steps, curve.mean, curve.low, curve.high, curve.num_runs, strict=True)
    for before, (step, mean, low, high, count) in zip([curve.steps[0], *curve.steps], values, strict=False):
        if step - before > usual:
            rows.append((before + usual, None, None, None, "not recorded"))
        of = f" (mean of {count})" if len(variant.runs) > 1 else ""
        said = (f"{mean:.3%}" if line.percent else f"{mean:.4g}") + of
        rows.append((step, _placed(mean, line.log), _placed(low, line.log), _placed(high, line.log), said))
    x, y, lows, highs, texts = (list(column) for column in zip(*rows, strict=True))
    band = {"low": lows, "high": highs} if len(variant.runs) > 1 else {}
    return Series(variant.label, color, x, y, texts, dash=dash, number=number, **band)


def _event_marks(variant: Variant, curve: Curve, number: int, width: int) -> list[Marks]:
    """Return a mark on the curve for each event, at the next point that there is."""
    points = list(zip(curve.steps, curve.mean, strict=True))
    found: dict[tuple[int, float], list[str]] = {}
    for event in (event for run in variant.runs for event in run.events):
        place = next((point for point in points if point[0] >= event["step"] // width * width), points[-1])
        found.setdefault(place, []).append(f"step {event['step']}: {event['kind']}"[:80])
    if not found:
        return []
    said = ["; ".join(some[:10]) for some in found.values()]
    return [Marks(style(number)[0], [at for at, _ in found], [_placed(y) for _, y in found], said, number)]


def _not_recorded(labels: Sequence[str]) -> list[str]:
    return [f"not recorded: {', '.join(labels)}"] if labels else []


def _placed(value: Number, log: bool = False) -> Number | None:
    """Return five digits of a value, or None of one that has no place on the axis."""
    return float(f"{value:.5g}") if math.isfinite(value) and (value > 0 or not log) else None


def point_width(variants: Sequence[Variant]) -> int:
    """Return how many steps a point of a curve stands for."""
    last = max((run.steps[-1]["step"] for variant in variants for run in variant.runs if run.steps), default=0)
    return last // MAX_POINTS + 1


def agreement_charts(variants: Sequence[Variant], width: int) -> list[HeatMap]:
    """Draw agreement by layer over steps, a map for each variant that has it, all on one axis and one scale."""
    found = []
    for variant in variants:
        layers = sorted(
            {int(layer) for run in variant.runs for step in run.steps for layer in step.get("agreement", ())}
        )
        curves = [variant.curve(at(f"agreement/{layer}"), width) for layer in layers]
        if layers:
            found.append((variant, layers, curves))
    counted = sorted({step for *_, curves in found for curve in curves for step in curve.steps})
    if not counted:
        return []
    lowest = min(value for *_, curves in found for curve in curves for value in curve.mean)
    # A scale of full percent; one that ends where it begins would have no colours.
    low = min(math.floor(100 * lowest) / 100, 0.99)
    # A cell reaches from its step to the next one that could be counted.
    apart = min((after - before for before, after in pairwise(counted)), default=1)
    last = max(run.steps[-1]["step"] for variant, *_ in found for run in variant.runs if run.steps)
    num_cells = (counted[-1] - counted[0]) // apart + 1
    note = f"colours: {low:.0%} (dark blue) to 100% (yellow) of experts equal"
    if len(found) > 1:
        note += f", the same in all {len(found)} maps, as the steps are"
    charts = []
    for variant, layers, curves in found:
        z = np.full((len(layers), num_cells), np.nan, np.float32)
        for row, curve in zip(z, curves, strict=True):
            row[[(step - counted[0]) // apart for step in curve.steps]] = curve.mean
        steps = (counted[0] + apart * np.arange(num_cells, dtype=np.int32))[None].repeat(len(layers), axis=0)
        by_layer = np.array(layers, np.int32)[:, None].repeat(num_cells, axis=1)
        charts.append(
            HeatMap(
                title=f"Experts that live routers choose as the rollout did, by layer: {variant.label}",
                x_title="step",
                y_title="layer",
                z=z,
                rows=[str(layer) for layer in layers],
                start=counted[0],
                width=apart,
                end=min(counted[0] + num_cells * apart, last + 1),
                low=low,
                high=1.0,
                what="equal experts",
                said={"step": steps, "layer": by_layer, "equal experts": z},
                formats={"equal experts": "{0.00%}"},
                notes=[note],
            )
        )
    return charts


def stage_charts(variants: Sequence[Variant]) -> list[Stack]:
    """Draw mean seconds of the stages, stacked, with R3's as one; and R3's one by one, as shares of the step."""
    labels = [variant.label for variant in variants]
    means = [{stage: variant.mean(_seconds(stage)) for stage in (*STAGES, "step")} for variant in variants]
    timed = [found for found in means if any(value is not None for value in found.values())]
    if not timed:
        return []
    columns: dict[str, list[float | None]] = {
        stage: [found[stage] for found in means] for stage in STAGES if stage not in R3_STAGES
    }
    notes = _not_recorded([label for label, found in zip(labels, means, strict=True) if found not in timed])
    columns["other"], columns["R3"] = [], []
    for label, found in zip(labels, means, strict=True):
        step, stages = found["step"], sum(found[stage] or 0.0 for stage in STAGES)
        columns["other"].append(step - stages if step is not None and step > stages else None)
        columns["R3"].append(sum(found[stage] or 0.0 for stage in R3_STAGES) or None)
        if step is None and found in timed:
            notes.append(f"{label}: the step's own seconds are not recorded")
        elif step is not None and stages > 1.001 * step:
            notes.append(f"{label}: stages overlap; they add up to {stages / step:.2f} of the step")
    charts = [_bars("Seconds a step, by stage", "seconds", labels, columns, notes)]
    shares = {stage: [_share(found[stage], found["step"]) for found in means] for stage in R3_STAGES}
    without = [label for label, *values in zip(labels, *shares.values(), strict=True) if not any(values)]
    if len(without) < len(labels):
        title = "R3's share of a step, by stage"
        charts.append(_bars(title, "share of the step", labels, shares, _not_recorded(without), percent=True))
    return charts


def _seconds(stage: str) -> Figure:
    """Return what reads a stage's seconds; R3's count where routes were replayed, else as "other"."""
    seconds = at(f"seconds/{stage}")
    return seconds if stage not in R3_STAGES else lambda step: seconds(step) if replays(step) else None


def _share(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None


def row_chart(variants: Sequence[Variant]) -> Stack | None:
    """Draw the rows by what became of them, as shares of all."""
    sums = [
        {kind: sum(sum(run.series(at(f"rows/{kind}")).values()) for run in variant.runs) for kind in ROWS}
        for variant in variants
    ]
    if not any(sum(rows.values()) for rows in sums):
        return None
    shares: dict[str, list[float | None]] = {
        kind: [rows[kind] / sum(rows.values()) if sum(rows.values()) else None for rows in sums] for kind in ROWS
    }
    notes = _not_recorded(
        [variant.label for variant, rows in zip(variants, sums, strict=True) if not sum(rows.values())]
    )
    labels = [variant.label for variant in variants]
    return _bars("What became of the rows", "share of rows, that is tokens", labels, shares, notes, percent=True)


def _bars(
    title: str,
    unit: str,
    labels: Sequence[str],
    columns: Mapping[str, Sequence[float | None]],
    notes: Sequence[str],
    percent: bool = False,
) -> Stack:
    """Stack bars, one a label."""
    colors = {**STAGE_COLORS, **ROW_COLORS}
    parts = {
        Key(name, colors[name]): [None if value is None else _placed(value) for value in values]
        for name, values in columns.items()
        if any(values)
    }
    height = 110 + 34 * len(labels)
    return Stack(title=title, unit=unit, labels=labels, parts=parts, percent=percent, notes=notes, height=height)
