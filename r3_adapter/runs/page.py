"""`r3 report`: one HTML page of runs side by side, which loads nothing and runs no script but its own.

Names and texts come from files that nobody vouches for: each goes through `escape` on its way into the page, or as
JSON into a block that is not a script. The page's policy lets no script run but the two that were put in.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from html import escape
from pathlib import Path
from typing import Any

from r3_adapter.errors import R3Error
from r3_adapter.runs.charts import Chart
from r3_adapter.runs.document import document, figure, scrolled, section
from r3_adapter.runs.log import ROWS, Run, mean
from r3_adapter.runs.page_samples import samples_section
from r3_adapter.runs.plots import (
    AGAINST_ROLLOUT,
    LOADS,
    SECTIONS,
    agreement_charts,
    line_chart,
    point_width,
    row_chart,
    stage_charts,
    style,
)
from r3_adapter.runs.variants import Figure, Variant, at, variants_of
from r3_adapter.runs.verdict import verdicts

MAX_EVENTS = 500
NONE = "\N{EN DASH}"

Named = tuple[str, Chart | None]
"""A plot's title, and the plot if some run recorded what it shows."""


@dataclass(frozen=True)
class Row:
    """A row of the comparison: what it is of each run, how it is written, and which end of it is the better one."""

    title: str
    of: Callable[[Run], float | None]
    show: Callable[[float], str]
    better: Callable[[Sequence[float]], float] | None = None


def write_page(path: Path, folders: Sequence[Path]) -> list[Run]:
    """Write the page of the runs in these folders; return the runs.

    Raises:
        R3Error: a folder that holds no run or a malformed one, Bokeh is not installed, or the page cannot be written.
    """
    runs = [Run.load(folder) for folder in folders]
    try:
        path.write_text(page(runs), encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise R3Error(f"{path}: cannot be written: {error.strerror}") from error
    return runs


def page(runs: Sequence[Run]) -> str:
    """Return the page of these runs.

    Raises:
        R3Error: Bokeh is not installed.
    """
    variants = variants_of(runs)
    charts: list[Chart] = []
    figures = section("Side by side" if len(runs) > 1 else "Figures", _figures(variants))
    sections = [figures, _sections(variants, charts), samples_section(runs), _events(runs), _settings(variants)]
    title = variants[0].label if len(variants) == 1 else f"{len(variants)} variants, {len(runs)} runs"
    return document(title, _head(variants), _legend(variants), "".join(sections), charts)


def _sections(variants: Sequence[Variant], charts: list[Chart]) -> str:
    """Return the sections with plots; the plots themselves are put into `charts`, in the order of their places."""
    width = point_width(variants)
    sections: dict[str, list[Named]] = {
        title: [(line.title, line_chart(line, variants, width)) for line in lines] for title, lines in SECTIONS.items()
    }
    stages: list[Named] = [(chart.title, chart) for chart in stage_charts(variants)]
    sections["Time"] = [*(stages or [("Stages", None)]), *sections["Time"]]
    layers: list[Named] = [(chart.title, chart) for chart in agreement_charts(variants, width)]
    sections[AGAINST_ROLLOUT].append(("What became of the rows", row_chart(variants)))
    sections["Agreement of live routing with the rollout"] = layers or [("Agreement by layer", None)]
    html = []
    if not any(chart for _, chart in sections[LOADS]):
        # Only runs with expert parallelism have them.
        del sections[LOADS]
    for title, found in sections.items():
        figures = []
        for chart in (chart for _, chart in found if chart):
            figures.append(figure(chart, len(charts)))
            charts.append(chart)
        missing = ", ".join(name for name, chart in found if chart is None)
        note = f'<p class="note">Not recorded by any run: {escape(missing)}</p>' if missing else ""
        html.append(section(title, f'<div class="grid">{"".join(figures)}</div>{note}'))
    return "".join(html)


def _head(variants: Sequence[Variant]) -> str:
    settings = [variant.settings() for variant in variants]
    lines = []
    if len({found["model"] for found in settings}) == 1:
        lines.append(settings[0]["model"])
    if len({found["layout"] for found in settings}) == 1:
        lines.append(settings[0]["layout"])
    versions = {key: value for run in variants[0].runs for key, value in run.config["versions"].items()}
    lines += [f"{key} {value}" for key, value in versions.items() if all(found.get(key) == value for found in settings)]
    notes = []
    runs = [run for variant in variants for run in variant.runs]
    for run in runs:
        notes += [f"{run.name}: {name} ends in half a line, which is left out" for name in run.half]
    facts = "".join(f"<li>{escape(line)}</li>" for line in lines)
    said = "".join(f"<li>{escape(line)}</li>" for line in verdicts(runs))
    return f'<ul class="verdict">{said}</ul><ul class="facts">{facts}</ul>' + "".join(
        f'<p class="note">{escape(note)}</p>' for note in notes
    )


def _legend(variants: Sequence[Variant]) -> str:
    html = []
    for number, variant in enumerate(variants):
        color, dash = style(number)
        swatch = f'<i style="border-top:3px {dash} {color}"></i>'
        html.append(
            f'<button type="button" aria-pressed="true" data-variant="{number}">'
            f"{swatch}{escape(variant.label)}</button>"
        )
    band = (
        "<span>line: mean of the seeds; band: lowest to highest</span>"
        if any(len(v.runs) > 1 for v in variants)
        else ""
    )
    return "".join(html) + band


def _comparison(variants: Sequence[Variant], colors: Sequence[str]) -> str:
    heads = "".join(
        f'<th scope="col"><i style="border-top:3px solid {color}"></i>{escape(variant.label)}</th>'
        for variant, color in zip(variants, colors, strict=True)
    )
    body = []
    for key, values in _differing(variants).items():
        body.append(_cells("setting", key, [escape(value) for value in values]))
    seeds = [", ".join(str(run.config["seed"]) for run in variant.runs) for variant in variants]
    body.append(_cells("setting", "seed", [escape(value) for value in seeds]))
    for row in _rows():
        totals = [variant.totals(row.of) for variant in variants]
        if any(totals):
            body.append(_cells("", row.title, _marked(totals, row)))
    body.append(_cells("", "collapsed", [_collapsed(variant) for variant in variants]))
    body.append(_cells("", "events", [_event_counts(variant) for variant in variants]))
    head = f"<thead><tr><td></td>{heads}</tr></thead>"
    return scrolled(f'<table class="compare">{head}<tbody>{"".join(body)}</tbody></table>')


def _cells(kind: str, title: str, cells: Iterable[str]) -> str:
    inner = "".join(f"<td>{cell}</td>" for cell in cells)
    return f'<tr class="{kind}"><th scope="row">{escape(title)}</th>{inner}</tr>'


def _rows() -> list[Row]:
    def total(figure: Figure) -> Callable[[Run], float | None]:
        return lambda run: sum(found.values()) if (found := run.series(figure)) else None

    def average(figure: Figure) -> Callable[[Run], float | None]:
        return lambda run: mean(list(run.series(figure).values()))

    def summed(key: str) -> Callable[[Run], float | None]:
        return lambda run: run.summary.get(key)

    def bytes_a_token(run: Run) -> float | None:
        both = [step for step in run.steps if "routes" in step.get("bytes", {}) and step.get("response_tokens")]
        tokens = sum(step["response_tokens"] for step in both)
        return sum(step["bytes"]["routes"] for step in both) / tokens if tokens else None

    rows = [
        Row("steps", lambda run: len(run.steps), _count),
        Row("reward, first tenth of the steps", summed("reward_first"), _short),
        Row("reward, last tenth of the steps", summed("reward_last"), _short, max),
        Row("k3 KL, mean", summed("k3"), _short, min),
        Row("F(2), mean", summed("f_2"), _short, min),
        Row("gradient norm, mean", average(at("grad_norm")), _short),
    ]
    rows += [Row(f"rows {kind}", total(at(f"rows/{kind}")), _count) for kind in ROWS]
    rows += [Row(f"micro-batches {kind}", total(at(f"micro_batches/{kind}")), _count) for kind in ("all", "planned")]
    return [
        *rows,
        Row("seconds a step", average(at("seconds/step")), _short, min),
        Row("R3's share of step time", summed("r3_share"), lambda value: f"{value:.2%}"),
        Row("route bytes a response token", bytes_a_token, _short),
    ]


def _marked(totals: Sequence[Sequence[float]], row: Row) -> list[str]:
    """Write a cell for each variant; the better one is marked, where there is one."""
    cells = [_spread(found, row.show) for found in totals]
    means = [sum(found) / len(found) for found in totals if found]
    if row.better is None or len(set(means)) < 2:
        return cells
    best = row.better(means)
    return [
        f'<b title="the better one">{cell}</b>' if found and sum(found) / len(found) == best else cell
        for cell, found in zip(cells, totals, strict=True)
    ]


def _short(value: float) -> str:
    if value == 0:
        return "0"
    return f"{value:#.3g}".rstrip(".") if 1e-3 <= abs(value) < 1e3 else f"{value:.2e}"


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _spread(values: Sequence[float], show: Callable[[float], str]) -> str:
    """Write the mean, and below it lowest and highest if they are not the same; a dash stands for not recorded."""
    if not values:
        return f'<span class="none" title="not recorded">{NONE}</span>'
    lowest, highest = show(min(values)), show(max(values))
    spread = "" if lowest == highest else f"<small>{escape(lowest)} to {escape(highest)}</small>"
    return escape(show(sum(values) / len(values))) + spread


def _collapsed(variant: Variant) -> str:
    fallen = [run for run in variant.runs if run.summary["collapsed"]]
    if not fallen:
        return "no"
    return f"<strong>{'yes' if len(variant.runs) == 1 else f'{len(fallen)} of {len(variant.runs)}'}</strong>"


def _event_counts(variant: Variant) -> str:
    counts: dict[str, int] = {}
    for run in variant.runs:
        for event in run.events:
            counts[event["kind"]] = counts.get(event["kind"], 0) + 1
    return "<br>".join(f"{escape(kind)} {count}" for kind, count in counts.items()) or "none"


def _figures(variants: Sequence[Variant]) -> str:
    """Return the comparison of the variants, and that of the single runs to be opened."""
    colors = [style(number)[0] for number in range(len(variants))]
    table = _comparison(variants, colors)
    if all(len(variant.runs) == 1 for variant in variants):
        return table
    runs = [(Variant(run.name, [run]), color) for v, color in zip(variants, colors, strict=True) for run in v.runs]
    each = _comparison([run for run, _ in runs], [color for _, color in runs])
    return f"{table}<details><summary>Each run</summary>{each}</details>"


def _differing(variants: Sequence[Variant]) -> dict[str, list[str]]:
    """Return the settings that are not the same in all runs, a value for each variant."""
    settings = [variant.settings() for variant in variants]
    keys = {key: None for found in settings for key in found}
    rows = {key: [found.get(key, NONE) for found in settings] for key in keys}
    mixed = {key for variant in variants for key in _mixed(variant)}
    return {key: values for key, values in rows.items() if len(set(values)) > 1 or key in mixed}


def _mixed(variant: Variant) -> set[str]:
    found = [Variant("", [run]).settings() for run in variant.runs]
    return {key for one in found for key in one if any(one.get(key) != other.get(key) for other in found)}


def _settings(variants: Sequence[Variant]) -> str:
    differing, settings = _differing(variants), variants[0].settings()
    rows = "".join(_cells("", key, [escape(value)]) for key, value in settings.items() if key not in differing)
    table = scrolled(f"<table><tbody>{rows}</tbody></table>")
    return section("Settings that all runs share", f"<details><summary>Show</summary>{table}</details>") if rows else ""


def _events(runs: Sequence[Run]) -> str:
    found = [(run, event) for run in runs for event in run.events]
    rows = "".join(
        f"<tr><td>{escape(run.name)}</td><td>{event['step']}</td><td>{_since(run, event)}</td>"
        f"<td>{escape(event['kind'])}</td><td>{escape(event['what'])}</td></tr>"
        for run, event in found[:MAX_EVENTS]
    )
    if not rows:
        return section("Faults and other events", "<p>None.</p>")
    heads = "".join(f'<th scope="col">{head}</th>' for head in ("run", "step", "time", "what", "and what was done"))
    more = f'<p class="note">{len(found) - MAX_EVENTS} more are left out</p>' if len(found) > MAX_EVENTS else ""
    table = scrolled(f'<table class="events"><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>')
    return section("Faults and other events", table + more)


def _since(run: Run, event: Mapping[str, Any]) -> str:
    """Return the time since the run's first step."""
    start = run.steps[0].get("time") if run.steps else None
    seconds = event["time"] - start if start is not None else -1.0
    return str(timedelta(seconds=round(seconds))) if 0 <= seconds < 1e9 else NONE
