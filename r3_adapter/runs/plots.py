"""The plots of the report page, as Plotly's JSON: traces and what is not common in their layouts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import Any

from r3_adapter.runs.files import Number, Step
from r3_adapter.runs.log import R3_STAGES, ROWS, STAGES, replays
from r3_adapter.runs.variants import MAX_POINTS, Curve, Figure, Variant, at, ratio

# Okabe and Ito's colours that are readable on white; told apart with each common kind of colour blindness.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#222222")
DASHES = ("solid", "dash", "dot")
STAGE_COLORS = {
    "rollout": "#44546a",
    "old_logprobs": "#7b8ba3",
    "train": "#aab6c6",
    "weights": "#d0d7e0",
    "other": "#eceff3",
    "R3": "#d55e00",
    "capture": "#d55e00",
    "transport": "#e69f00",
    "repack": "#cc79a7",
    "replay": "#56b4e9",
}
ROW_COLORS = {"replayed": "#0072b2", "live": "#e69f00", "padding": "#d0d7e0", "stale": "#d55e00"}

Json = dict[str, Any]


@dataclass(frozen=True)
class Chart:
    """A plot: what Plotly draws, its title, and notes on what it does not show. height: in pixels."""

    title: str
    traces: list[Json]
    layout: Json
    notes: Sequence[str] = ()
    height: int = 250


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


def text(value: str) -> str:
    """Return a string that Plotly shows as it is; it would read tags and entities."""
    return escape(value)


def line_chart(line: Line, variants: Sequence[Variant], width: int) -> Chart | None:
    """Draw a figure over steps, one line a variant, with a band over its runs; None: nobody has it."""
    curves = [variant.curve(line.figure, width) for variant in variants]
    if not any(curve.steps for curve in curves):
        return None
    traces: list[Json] = []
    notes = _not_recorded([variant.label for variant, curve in zip(variants, curves, strict=True) if not curve.steps])
    for number, (variant, curve) in enumerate(zip(variants, curves, strict=True)):
        if not curve.steps:
            continue
        traces += _traces(line, variant, curve, number, width)
        traces += _event_marks(variant, curve, number, width) if line.events else []
        bad = [step for step, value in zip(curve.steps, curve.mean, strict=True) if not math.isfinite(value)]
        if bad:
            notes.append(f"{variant.label}: {len(bad)} points are not finite, the first at step {bad[0]}")
        if line.log and (hidden := sum(value <= 0 for value in curve.mean)):
            notes.append(f"{variant.label}: {hidden} points are 0 or less and have no place on a log scale")
    if width > 1:
        notes.append(f"each point is the mean of {width} steps")
    axis: Json = {"title": {"text": text(line.unit)}}
    axis |= _decades(curves) if line.log else {"rangemode": "tozero"}
    axis |= {"tickformat": ".2~%"} if line.percent else {}
    return Chart(line.title, traces, {"xaxis": {"title": {"text": "step"}}, "yaxis": axis}, notes)


def _decades(curves: Sequence[Curve]) -> Json:
    """Return a log axis over whole decades, so that there are ticks to read it by."""
    drawn = [value for curve in curves for value in (*curve.low, *curve.high) if value > 0 and math.isfinite(value)]
    low = math.floor(math.log10(min(drawn, default=1)))
    high = max(low + 1, math.ceil(math.log10(max(drawn, default=10))))
    span = [low - 0.04, high + 0.04]
    return {"type": "log", "range": span, "dtick": (high - low - 1) // 6 + 1, "exponentformat": "power"}


def _traces(line: Line, variant: Variant, curve: Curve, number: int, width: int) -> list[Json]:
    color, dash = style(number)
    steps, means, low, high, counts = _with_gaps(curve, width)
    common = {"meta": number, "name": text(variant.label), "x": steps, "type": "scatter", "mode": "lines"}
    band = {**common, "line": {"width": 0, "color": color}, "hoverinfo": "skip", "showlegend": False}
    shown = "%{y:.3~%}" if line.percent else "%{y:.4~g}"
    many = len(variant.runs) > 1
    drawn = {
        **common,
        "y": means,
        "customdata": counts,
        "line": {"width": 1.6, "color": color, "dash": dash},
        "hovertemplate": shown + (" (mean of %{customdata})" if many else ""),
    }
    if not many:
        return [drawn]
    lower = {**band, "y": low}
    upper = {**band, "y": high, "fill": "tonexty", "fillcolor": f"{color}26"}
    return [lower, upper, drawn]


def _event_marks(variant: Variant, curve: Curve, number: int, width: int) -> list[Json]:
    """Return a mark on the curve for each event, at the next point that there is."""
    points = list(zip(curve.steps, curve.mean, strict=True))
    marks: dict[tuple[int, float], list[str]] = {}
    for event in (event for run in variant.runs for event in run.events):
        place = next((point for point in points if point[0] >= event["step"] // width * width), points[-1])
        marks.setdefault(place, []).append(f"step {event['step']}: {event['kind']}")
    if not marks:
        return []
    return [
        {
            "meta": number,
            "type": "scatter",
            "mode": "markers",
            "name": text(f"{variant.label}, events"),
            "x": [step for step, _ in marks],
            "y": [_digits(value) for _, value in marks],
            "marker": {
                "symbol": "diamond",
                "size": 8,
                "color": "#fff",
                "line": {"width": 1.6, "color": style(number)[0]},
            },
            "customdata": ["<br>".join(text(said[:80]) for said in some[:10]) for some in marks.values()],
            "hovertemplate": "%{customdata}",
        }
    ]


def _not_recorded(labels: Sequence[str]) -> list[str]:
    return [f"not recorded: {', '.join(labels)}"] if labels else []


def _with_gaps(curve: Curve, width: int) -> tuple[list[Number | None], ...]:
    """Return the curve's lists with None between points that are not neighbours, and for what is not finite.

    A figure that is recorded every few steps has no neighbours: gaps count from its usual distance on.
    """
    distances = sorted(after - before for before, after in zip(curve.steps, curve.steps[1:], strict=False))
    usual = distances[len(distances) // 2] if distances else width
    rows: list[tuple[Number | None, ...]] = []
    for before, step, *values in zip(
        [curve.steps[0], *curve.steps], curve.steps, curve.mean, curve.low, curve.high, curve.num_runs, strict=False
    ):
        if step - before > usual:
            rows.append((before + usual, None, None, None, None))
        rows.append((step, *(_digits(value) for value in values)))
    return tuple(list(column) for column in zip(*rows, strict=True))


def _digits(value: Number) -> Number | None:
    return float(f"{value:.5g}") if math.isfinite(value) else None


def point_width(variants: Sequence[Variant]) -> int:
    """Return how many steps a point of a curve stands for."""
    last = max((run.steps[-1]["step"] for variant in variants for run in variant.runs if run.steps), default=0)
    return last // MAX_POINTS + 1


def agreement_charts(variants: Sequence[Variant], width: int) -> list[Chart]:
    """Draw agreement by layer over steps, one panel for each variant that has it, all on one scale."""
    found = []
    for variant in variants:
        layers = sorted(
            {int(layer) for run in variant.runs for step in run.steps for layer in step.get("agreement", ())}
        )
        curves = [variant.curve(at(f"agreement/{layer}"), width) for layer in layers]
        if layers:
            found.append((variant, layers, curves))
    low = min((value for *_, curves in found for curve in curves for value in curve.mean), default=0.0)
    # Cells reach from their step to the next one that was counted: centred ones would begin before the first.
    counted = sorted({step for *_, curves in found for curve in curves for step in curve.steps})
    apart = min((after - before for before, after in pairwise(counted)), default=1)
    span = [counted[0], counted[-1] + apart] if counted else []
    charts = []
    for variant, layers, curves in found:
        steps = sorted({step for curve in curves for step in curve.steps})
        rows = [dict(zip(curve.steps, curve.mean, strict=True)) for curve in curves]
        trace = {
            "type": "heatmap",
            "x": [*steps, steps[-1] + apart],
            "y": [str(layer) for layer in layers],
            "text": [[f"step {step}" for step in steps]] * len(layers),
            "z": [[_digits(row[step]) if step in row else None for step in steps] for row in rows],
            "zmin": low,
            "zmax": 1,
            "colorscale": "Cividis",
            "colorbar": {
                "thickness": 10,
                "title": {"text": "equal experts", "side": "right", "font": {"size": 11}},
                "tickfont": {"size": 11},
                "outlinewidth": 0,
                "tickformat": ".1~%",
                "nticks": 5,
            },
            "hovertemplate": "%{text}, layer %{y}: %{z:.2%}<extra></extra>",
        }
        layout = {
            "hovermode": "closest",
            "xaxis": {"title": {"text": "step"}, "showgrid": False, "range": span, "autorange": False},
            "yaxis": {"title": {"text": "layer"}, "type": "category", "nticks": 9, "showgrid": False},
        }
        charts.append(Chart(f"Agreement by layer: {variant.label}", [trace], layout))
    return charts


def stage_charts(variants: Sequence[Variant]) -> list[Chart]:
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
    charts = [_bars("Seconds a step, by stage", "seconds", labels, columns, "%{x:.3~g} s", notes)]
    shares = {stage: [_share(found[stage], found["step"]) for found in means] for stage in R3_STAGES}
    without = [label for label, *values in zip(labels, *shares.values(), strict=True) if not any(values)]
    if len(without) < len(labels):
        title = "R3's stages"
        charts.append(
            _bars(title, "share of the step", labels, shares, "%{x:.3~%}", _not_recorded(without), percent=True)
        )
    return charts


def _seconds(stage: str) -> Figure:
    """Return what reads a stage's seconds; R3's count where routes were replayed, else as "other"."""
    seconds = at(f"seconds/{stage}")
    return seconds if stage not in R3_STAGES else lambda step: seconds(step) if replays(step) else None


def _share(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None


def row_chart(variants: Sequence[Variant]) -> Chart | None:
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
    return _bars("Rows", "share of (token, layer) rows", labels, shares, "%{x:.3~%}", notes, percent=True)


def _bars(
    title: str,
    unit: str,
    labels: Sequence[str],
    columns: dict[str, list[float | None]],
    shown: str,
    notes: Sequence[str],
    percent: bool = False,
) -> Chart:
    """Stack bars, one a label; R3's stages are hatched."""
    hatched = ("R3", *R3_STAGES)
    names = [text(label if len(label) <= 30 else f"{label[:29]}…") + " " for label in labels]
    traces = []
    for name, values in columns.items():
        if not any(values):
            continue
        color = {**STAGE_COLORS, **ROW_COLORS}[name]
        marker: Json = {"color": color, "line": {"color": "#ffffff", "width": 0.5}}
        if name in hatched:
            marker["pattern"] = {
                "shape": "/",
                "fillmode": "overlay",
                "size": 5,
                "fgcolor": "#ffffff",
                "fgopacity": 0.6,
                "solidity": 0.2,
            }
        traces.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": name,
                "x": [None if value is None else _digits(value) for value in values],
                "y": list(range(len(labels))),
                "marker": marker,
                "hovertemplate": f"{name}: {shown}<extra></extra>",
            }
        )
    layout = {
        "barmode": "stack",
        "hovermode": "closest",
        "showlegend": True,
        "xaxis": {"title": {"text": unit}, "rangemode": "tozero"} | ({"tickformat": ".3~%"} if percent else {}),
        "yaxis": {
            "autorange": "reversed",
            "showgrid": False,
            "zeroline": False,
            "tickvals": list(range(len(labels))),
            "ticktext": names,
        },
    }
    return Chart(title, traces, layout, notes, height=150 + 30 * len(labels))
