"""Draws plots with Bokeh: each becomes the JSON that its script in the page makes a canvas of.

Axes have fixed ranges and there are no tools but the values under the pointer, so that plots beside each other stay
comparable.
"""

import math
from collections.abc import Mapping, Sequence
from functools import cache, singledispatch
from itertools import groupby
from typing import Any

from bokeh.embed import json_item
from bokeh.models import (
    BasicTicker,
    ColumnDataSource,
    FixedTicker,
    HoverTool,
    LinearColorMapper,
    LogTickFormatter,
    NumeralTickFormatter,
    PlainText,
    Range1d,
    Span,
)
from bokeh.palettes import Cividis256
from bokeh.plotting import figure
from bokeh.themes import Theme

from r3_adapter.runs.charts import Chart, Groups, HeatMap, Lines, Marks, Series, Stack
from r3_adapter.runs.files import Number

_FEW = 60
"""Points of a curve up to which each is marked: a lone one would not be seen."""
_FONT = "system-ui, 'Segoe UI', 'Helvetica Neue', Arial, sans-serif"
_TEXT, _SOFT, _LINE, _EMPTY = "#1c2430", "#5b6675", "#edf0f3", "#eceff3"


def as_json(chart: Chart) -> dict[str, Any]:
    """Return what Bokeh's script embeds: texts from files are in it as they are, and are shown as texts."""
    item: dict[str, Any] = json_item(_draw(chart), theme=_theme())
    return item


@singledispatch
def _draw(chart: Chart) -> Any:
    raise TypeError(type(chart).__name__)


@_draw.register
def _lines(chart: Lines) -> Any:
    shown = [value for series in chart.series for value in (*series.y, *series.low, *series.high) if value is not None]
    low, high = _decades(shown) if chart.log else _from_zero([*shown, *([chart.level] if chart.level else [])])
    steps = sorted({step for series in chart.series for step in series.x})
    plot = figure(
        height=chart.height,
        y_axis_type="log" if chart.log else "linear",
        x_range=_steps(steps),
        y_range=Range1d(low, high),
        **_common(chart.x_title, chart.y_title),
    )
    _whole_ticks(plot.xaxis[0])
    if chart.log:
        first, last = round(math.log10(low) + 0.5), round(math.log10(high) - 0.5)
        plot.yaxis.ticker = FixedTicker(ticks=[10.0**at for at in range(first, last + 1, (last - first) // 7 + 1)])
        plot.yaxis.formatter = LogTickFormatter()
    elif chart.percent:
        plot.yaxis.formatter = NumeralTickFormatter(format="0.[000]%")
    if chart.level is not None:
        plot.add_layout(_line(chart.level, "width", dash="dotted"))
    for series in chart.series:
        _curve(plot, series)
    if steps:
        _values_of_all(plot, chart, steps)
    for marks in chart.marks:
        _marks(plot, marks)
    return plot


def _curve(plot: Any, series: Series) -> None:
    drawn = []
    if series.low:
        for part in _unbroken(series):
            x, low, high = ([getattr(series, name)[at] for at in part] for name in ("x", "low", "high"))
            drawn.append(plot.varea(x, low, high, fill_color=series.color, fill_alpha=0.15))
    y = [math.nan if value is None else value for value in series.y]
    drawn.append(plot.line(series.x, y, line_color=series.color, line_dash=series.dash, line_width=2))
    if len(y) <= _FEW:
        drawn.append(plot.scatter(series.x, y, size=4, color=series.color))
    for renderer in drawn:
        renderer.tags = _tags(series.number)


def _tags(number: int | None) -> list[int]:
    """Return what the page's script knows by whose a renderer is."""
    return [] if number is None else [number]


def _unbroken(series: Series) -> list[list[int]]:
    """Return the places of the points between gaps."""
    sides = [series.low[at] is not None and series.high[at] is not None for at in range(len(series.x))]
    return [list(part) for whole, part in groupby(range(len(series.x)), key=lambda at: sides[at]) if whole]


def _values_of_all(plot: Any, chart: Lines, steps: Sequence[int]) -> None:
    """Show the values of all curves at the step under the pointer; a curve that nobody sees is what is pointed at."""
    columns: dict[str, Sequence[Any]] = {"x": steps}
    near: dict[int, Number] = {}
    for number, series in enumerate(chart.series):
        said = dict(zip(series.x, series.said, strict=True))
        columns[f"said{number}"] = [said.get(step, "not recorded") for step in steps]
        near |= {x: y for x, y in zip(series.x, series.y, strict=True) if y is not None}
    columns["y"] = [near.get(step, plot.y_range.end) for step in steps]
    pointed = plot.line("x", "y", source=ColumnDataSource(columns), line_alpha=0)
    tooltips = [(_short(series.label, 40), f"@said{number}") for number, series in enumerate(chart.series)]
    numbers = [series.number for series in chart.series]
    tool = {"mode": "vline", "line_policy": "nearest", "attachment": "horizontal", "tags": [numbers]}
    plot.add_tools(HoverTool(renderers=[pointed], tooltips=[(chart.x_title, "@x{0,0}"), *tooltips], **tool))


def _marks(plot: Any, marks: Marks) -> None:
    source = ColumnDataSource({"x": marks.x, "y": marks.y, "said": marks.said})
    style = {"marker": "diamond", "size": 11, "fill_color": "#fff", "line_color": marks.color, "line_width": 1.7}
    drawn = plot.scatter("x", "y", source=source, **style)
    drawn.tags = _tags(marks.number)
    plot.add_tools(HoverTool(renderers=[drawn], tooltips=[("", "@said")], attachment="below"))


@_draw.register
def _stack(chart: Stack) -> Any:
    places = list(range(len(chart.labels)))
    sums = [sum(values[at] or 0.0 for values in chart.parts.values()) for at in places]
    plot = figure(
        height=chart.height,
        x_range=Range1d(0, 1.02 * max(sums, default=1) or 1),
        y_range=Range1d(len(places) - 0.4, -0.6),
        **_common(chart.unit, ""),
    )
    plot.xaxis.ticker = BasicTicker(desired_num_ticks=4)
    if chart.percent:
        plot.xaxis.formatter = NumeralTickFormatter(format="0.[000]%")
    plot.yaxis.ticker = FixedTicker(ticks=places)
    # A name is no formula, even with dollars around it.
    names = {at: PlainText(text=_short(label, 20)) for at, label in enumerate(chart.labels)}
    plot.yaxis.major_label_overrides = names
    plot.ygrid.visible = False
    left = [0.0 for _ in places]
    for key, values in chart.parts.items():
        right = [at + (value or 0.0) for at, value in zip(left, values, strict=True)]
        said = ["not recorded" if v is None else f"{v:.3%}" if chart.percent else f"{v:.3g}" for v in values]
        source = ColumnDataSource({"y": places, "left": left, "right": right, "said": said})
        look = {"height": 0.72, "fill_color": key.color, "line_color": "#fff", "line_width": 0.5}
        drawn = plot.hbar("y", left="left", right="right", source=source, **look)
        plot.add_tools(HoverTool(renderers=[drawn], tooltips=[(key.name, "@said")], attachment="below"))
        left = right
    return plot


@_draw.register
def _groups(chart: Groups) -> Any:
    num_bars = len(next(iter(chart.groups.values())))
    high = max((value for values in chart.groups.values() for value in values), default=1.0)
    plot = figure(
        height=chart.height,
        x_range=Range1d(-0.6, num_bars - 0.4),
        y_range=Range1d(0, 1.05 * max(high, chart.level or 0)),
        **_common(chart.x_title, chart.y_title),
    )
    _whole_ticks(plot.xaxis[0])
    plot.xgrid.visible = False
    width = 0.76 / len(chart.groups)
    for number, (key, values) in enumerate(chart.groups.items()):
        shift = (number - (len(chart.groups) - 1) / 2) * width
        places = [at + shift for at in range(num_bars)]
        source = ColumnDataSource({"x": places, "y": values, "said": chart.said[key], "at": list(range(num_bars))})
        drawn = plot.vbar("x", top="y", width=width, source=source, color=key.color)
        plot.add_tools(HoverTool(renderers=[drawn], tooltips=[(chart.x_title, "@at"), (key.name, "@said")]))
    if chart.level is not None:
        plot.add_layout(_line(chart.level, "width", dash="dotted"))
    return plot


@_draw.register
def _heat_map(chart: HeatMap) -> Any:
    num_rows, num_columns = chart.z.shape
    rows = Range1d(num_rows - 0.5, -0.5) if chart.from_above else Range1d(-0.5, num_rows - 0.5)
    plot = figure(
        height=chart.height,
        x_range=Range1d(chart.start, chart.end),
        y_range=rows,
        **_common(chart.x_title, chart.y_title),
    )
    mapper = LinearColorMapper(
        palette=list(chart.palette or Cividis256), low=chart.low, high=chart.high, nan_color=_EMPTY
    )
    columns: Mapping[str, Any] = {"image": [chart.z], **{name: [cells] for name, cells in chart.said.items()}}
    drawn = plot.image(
        image="image", source=ColumnDataSource(columns), color_mapper=mapper,
        x=chart.start, y=-0.5, dw=num_columns * chart.width, dh=num_rows,
    )  # fmt: skip
    shown = [(name, f"@{{{name}}}{chart.formats.get(name, '')}") for name in chart.said]
    plot.add_tools(HoverTool(renderers=[drawn], tooltips=shown))
    plot.grid.visible = False
    plot.yaxis.ticker = FixedTicker(ticks=list(range(0, num_rows, -(-num_rows // 12))))
    plot.yaxis.major_label_overrides = dict(enumerate(chart.rows))
    if chart.x_ticks is None:
        _whole_ticks(plot.xaxis[0])
    else:
        plot.xaxis.ticker = FixedTicker(ticks=list(chart.x_ticks))
        plot.xaxis.major_label_overrides = dict(chart.x_ticks)
    for at in chart.dividers:
        plot.add_layout(_line(at, "height", width=0.6))
    bar = {"width": 10, "title": chart.what, "formatter": NumeralTickFormatter(format=chart.bar_format)}
    if chart.bar_ticks is not None:
        bar |= {"ticker": FixedTicker(ticks=list(chart.bar_ticks)), "major_label_overrides": dict(chart.bar_ticks)}
    plot.add_layout(drawn.construct_color_bar(**bar), "right")
    return plot


def _common(x_title: str, y_title: str) -> dict[str, Any]:
    return {
        "tools": "",
        "toolbar_location": None,
        "sizing_mode": "stretch_width",
        "min_width": 200,
        "x_axis_label": x_title,
        "y_axis_label": y_title,
        "output_backend": "canvas",
    }


def _steps(steps: Sequence[int]) -> Range1d:
    """Return a range with a little room at its ends."""
    first, last = (steps[0], steps[-1]) if steps else (0, 1)
    room = max(last - first, 1) * 0.03
    return Range1d(first - room, last + room)


def _from_zero(values: Sequence[Number]) -> tuple[float, float]:
    low, high = min(0.0, *values, 0.0), max(0.0, *values, 0.0)
    # A curve that lies at zero is to be seen whole.
    return (1.05 * low - 0.02 * high, 1.05 * high) if high > low else (-0.02, 1.0)


def _decades(values: Sequence[Number]) -> tuple[float, float]:
    """Return whole decades, with a little room, so that there are ticks to read them by."""
    drawn = [value for value in values if value > 0]
    low = math.floor(math.log10(min(drawn, default=1)))
    high = max(low + 1, math.ceil(math.log10(max(drawn, default=10))))
    return 10 ** (low - 0.08), 10 ** (high + 0.08)


def _whole_ticks(axis: Any) -> None:
    axis.ticker = BasicTicker(mantissas=[1, 2, 5], min_interval=1, num_minor_ticks=0)
    axis.formatter = NumeralTickFormatter(format="0,0")


def _line(at: float, dimension: str, *, width: float = 1, dash: str = "solid") -> Span:
    return Span(location=at, dimension=dimension, line_color=_TEXT, line_width=width, line_dash=dash)


def _short(label: str, most: int) -> str:
    """Return a label without its middle if it is long: names of runs differ at their ends."""
    half = most // 2
    return label if len(label) <= most else f"{label[: half - 1]}…{label[-half:]}"


@cache
def _theme() -> Theme:
    text = {"text_font": _FONT, "text_font_size": "11px", "text_font_style": "normal"}
    axis = {f"{part}_{key}": value for part in ("axis_label", "major_label") for key, value in text.items()}
    bar = {f"{part}_{key}": value for part in ("title", "major_label") for key, value in text.items()}
    soft = {"axis_label_text_color": _SOFT, "major_label_text_color": _TEXT, "axis_line_color": "#b8c1cc"}
    ticks = {"major_tick_line_color": "#b8c1cc", "major_tick_in": 0, "major_tick_out": 4, "minor_tick_line_color": None}
    return Theme(
        json={
            "attrs": {
                "Plot": {"outline_line_color": None, "border_fill_color": None, "background_fill_color": None},
                "Axis": {**axis, **soft, **ticks, "axis_label_standoff": 6},
                "LogAxis": {"minor_tick_line_color": None},
                "Grid": {"grid_line_color": _LINE},
                "BaseColorBar": {**bar, "title_text_color": _SOFT, "background_fill_color": None, "padding": 4},
            }
        }
    )
