"""The plots of the report page, as Plotly's JSON: traces and what is not common in their layouts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from r3_adapter.runfiles import Number, Step
from r3_adapter.runs import R3_STAGES, ROWS, STAGES
from r3_adapter.variants import MAX_POINTS, Curve, Figure, Variant, at, r3_share, ratio

# Okabe and Ito's colours that are readable on white; told apart with each common kind of colour blindness.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#222222")
DASHES = ("solid", "dash", "dot")
STAGE_COLORS = {
    "rollout": "#44546a",
    "old_logprobs": "#7b8ba3",
    "train": "#aab6c6",
    "weights": "#d0d7e0",
    "other": "#eceff3",
    "capture": "#d55e00",
    "transport": "#e69f00",
    "repack": "#cc79a7",
    "replay": "#56b4e9",
}
ROW_COLORS = {"replayed": "#0072b2", "live": "#e69f00", "padding": "#d0d7e0", "stale": "#d55e00"}

Json = dict[str, Any]


@dataclass(frozen=True)
class Chart:
    """A plot: what Plotly draws, its title and unit, and notes on what it does not show.

    height: in pixels. wide: it takes the page's whole width.
    """

    title: str
    unit: str
    traces: list[Json]
    layout: Json
    notes: Sequence[str] = ()
    height: int = 250
    wide: bool = False


@dataclass(frozen=True)
class Line:
    """A figure to draw over steps."""

    title: str
    unit: str
    figure: Figure
    log: bool = False
    percent: bool = False


def _scaled(key: str, factor: float) -> Figure:
    def read(step: Step) -> Number | None:
        value = at(key)(step)
        return None if value is None else value * factor

    return read


SECTIONS: dict[str, tuple[Line, ...]] = {
    "Learning": (
        Line("Reward", "mean of the step", at("reward")),
        Line("Gradient norm", "", at("grad_norm"), log=True),
        Line("Entropy", "nats", at("entropy")),
        Line("Response length", "tokens", ratio("response_tokens", "samples")),
    ),
    "Trainer against rollout": (
        Line("k3 KL", "nats", at("k3"), log=True),
        Line("F(2)", "share of tokens", at("f_2"), percent=True),
    ),
    "Time": (
        Line("Step", "s", at("seconds/step")),
        Line("R3's stages", "share of the step", r3_share, percent=True),
    ),
    "Bytes and memory": (
        Line("Routes produced", "bytes a response token", ratio("bytes/routes", "response_tokens")),
        Line("Routes read by trainer ranks", "KiB a step", _scaled("bytes/routes_pulled", 2**-10)),
        Line("Weights sent", "MiB a step", _scaled("bytes/weights", 2**-20)),
        Line("Trainer", "resident, GiB", _scaled("memory/trainer_rss", 2**-30)),
        Line("Engine", "resident, GiB", _scaled("memory/engine_rss", 2**-30)),
        Line("Object store", "MiB", _scaled("memory/object_store", 2**-20)),
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
    traces, notes = [], []
    for number, (variant, curve) in enumerate(zip(variants, curves, strict=True)):
        if not curve.steps:
            notes.append(f"{variant.label}: not recorded")
            continue
        traces += _traces(line, variant, curve, number, width)
        if (
            first := next((at for at, value in zip(curve.steps, curve.mean, strict=True) if not _ok(value)), None)
        ) is not None:
            notes.append(f"{variant.label}: not finite at step {first}")
        if line.log and (hidden := sum(value <= 0 for value in curve.mean)):
            notes.append(f"{variant.label}: {hidden} points are 0 or less and have no place on a log scale")
    if width > 1:
        notes.append(f"each point is the mean of {width} steps")
    axis: Json = {"title": {"text": text(line.unit)}}
    axis |= {"type": "log", "dtick": 1, "exponentformat": "power"} if line.log else {"rangemode": "tozero"}
    axis |= {"tickformat": ".2~%"} if line.percent else {}
    return Chart(line.title, line.unit, traces, {"xaxis": {"title": {"text": "step"}}, "yaxis": axis}, notes)


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
        "line": {"width": 1.7, "color": color, "dash": dash},
        "hovertemplate": shown + (" (mean of %{customdata})" if many else ""),
    }
    if not many:
        return [drawn]
    lower = {**band, "y": low}
    upper = {**band, "y": high, "fill": "tonexty", "fillcolor": f"{color}26"}
    return [lower, upper, drawn]


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


def _ok(value: float) -> bool:
    return math.isfinite(value)


def _digits(value: Number) -> Number | None:
    return float(f"{value:.5g}") if _ok(value) else None


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
    charts = []
    for variant, layers, curves in found:
        steps = sorted({step for curve in curves for step in curve.steps})
        rows = [dict(zip(curve.steps, curve.mean, strict=True)) for curve in curves]
        trace = {
            "type": "heatmap",
            "x": steps,
            "y": layers,
            "z": [[_digits(row[step]) if step in row else None for step in steps] for row in rows],
            "zmin": low,
            "zmax": 1,
            "colorscale": "Cividis",
            "colorbar": {"thickness": 10, "outlinewidth": 0, "tickformat": ".1~%", "nticks": 5},
            "hovertemplate": "step %{x}, layer %{y}: %{z:.2%}<extra></extra>",
        }
        layout = {
            "hovermode": "closest",
            "xaxis": {"title": {"text": "step"}, "showgrid": False},
            "yaxis": {"title": {"text": "layer"}, "dtick": max(1, len(layers) // 8), "showgrid": False},
        }
        charts.append(Chart(variant.label, "experts equal to the rollout's", [trace], layout))
    return charts


def stage_charts(variants: Sequence[Variant]) -> list[Chart]:
    """Draw mean seconds of each stage, stacked, and those of R3's stages as shares of the step."""
    means = [{stage: variant.mean(at(f"seconds/{stage}")) for stage in (*STAGES, "step")} for variant in variants]
    notes, others = [], []
    for variant, seconds in zip(variants, means, strict=True):
        step, stages = seconds["step"], sum(seconds[stage] or 0.0 for stage in STAGES)
        others.append(step - stages if step is not None and step > stages else None)
        if step is None:
            notes.append(f"{variant.label}: not recorded")
        elif stages > 1.001 * step:
            notes.append(f"{variant.label}: stages overlap; they add up to {stages / step:.2f} of the step")
    columns: dict[str, list[float | None]] = {stage: [seconds[stage] for seconds in means] for stage in STAGES}
    columns = {"other": others, **columns}
    order = [stage for stage in STAGE_COLORS if any(value is not None for value in columns[stage])]
    shares = {stage: [_share(seconds[stage], seconds["step"]) for seconds in means] for stage in R3_STAGES}
    labels = [variant.label for variant in variants]
    charts = [
        _bars("Seconds a step, by stage", "s", labels, {stage: columns[stage] for stage in order}, "%{x:.3~g} s", notes)
    ]
    r3 = {stage: values for stage, values in shares.items() if any(value is not None for value in values)}
    if r3:
        missing = [
            f"{label}: none recorded"
            for label, *values in zip(labels, *r3.values(), strict=True)
            if not any(value is not None for value in values)
        ]
        charts.append(_bars("R3's stages", "share of the step", labels, r3, "%{x:.3~%}", missing, percent=True))
    return charts if order else []


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
    notes = [
        f"{variant.label}: not recorded" for variant, rows in zip(variants, sums, strict=True) if not sum(rows.values())
    ]
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
    names = [text(label if len(label) <= 30 else f"{label[:29]}…") + " " for label in labels]
    traces = []
    for name, values in columns.items():
        color = {**STAGE_COLORS, **ROW_COLORS}[name]
        marker: Json = {"color": color, "line": {"color": "#ffffff", "width": 0.5}}
        if name in R3_STAGES:
            marker["pattern"] = {"shape": "/", "size": 5, "fgcolor": "#ffffff", "fgopacity": 0.55, "solidity": 0.25}
        traces.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": f"R3: {name}" if name in R3_STAGES else name,
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
        "yaxis": {"autorange": "reversed", "showgrid": False, "tickvals": list(range(len(labels))), "ticktext": names},
    }
    return Chart(title, unit, traces, layout, notes, height=150 + 30 * len(labels))
