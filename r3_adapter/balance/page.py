"""The page of `r3 balance`: what the loads of a run look like, and what each way would make of them."""

from html import escape
from pathlib import Path

from r3_adapter.balance.charts import SHORT, load_maps, rank_bars, shown_ways, way_lines
from r3_adapter.balance.compare import REAL, WAYS, Balance
from r3_adapter.balance.tables import drift_line
from r3_adapter.errors import R3Error, counted
from r3_adapter.runs.charts import Chart
from r3_adapter.runs.document import document, figure, scrolled, section
from r3_adapter.runs.plots import style


def write_page(path: Path, found: Balance, source: str) -> None:
    """Write the page. source: what routes are of, in words.

    Raises:
        R3Error: Bokeh is not installed, or the page cannot be written.
    """
    try:
        path.write_text(page(found, source), encoding="utf-8")
    except OSError as error:
        raise R3Error(f"{path}: cannot be written: {error.strerror}") from error


def page(found: Balance, source: str) -> str:
    """Return the page.

    Raises:
        R3Error: Bokeh is not installed.
    """
    charts: list[Chart] = []

    def grid(more: list[Chart], kind: str = "grid") -> str:
        places = [figure(chart, len(charts) + at) for at, chart in enumerate(more)]
        charts.extend(more)
        return f'<div class="{kind}">{"".join(places)}</div>'

    body = [
        section("What each way gives", _table(found)),
        section("Load by layer and expert", grid(list(load_maps(found)), "grid wide")),
        section("Loads of ranks, before and after", grid(list(rank_bars(found)), "grid wide")),
        section("Evenness", grid(list(way_lines(found)))),
    ]
    title = f"Loads of {counted(found.num_ranks, 'expert-parallel rank')}"
    return document(title, _head(found, source), _legend(found), "".join(body), charts)


def _head(found: Balance, source: str) -> str:
    before = found.ways["arrival"].figures
    best = "placed_last" if "placed_last" in found.ways else "placed"
    after = found.ways[best].figures
    said = [
        f"As it is, the fullest ranks carry {before.ratio:.2f} times the mean load, {before.worst:.2f} times at worst.",
        f"{SHORT[best].capitalize()}: {after.ratio:.2f} times, {after.worst:.2f} at worst.",
    ]
    samples, layers, experts = found.shown.counts.shape
    facts = [
        source,
        counted(found.num_steps, "step"),
        f"{counted(samples, 'sample')} in the last",
        counted(found.num_micro_steps, "micro-step"),
        counted(layers, "MoE layer"),
        counted(experts, "expert"),
        f"planned in {found.seconds:.2f} s a step",
    ]
    verdict = "".join(f"<li>{escape(line)}</li>" for line in said)
    listed = "".join(f"<li>{escape(fact)}</li>" for fact in facts)
    return f'<ul class="verdict">{verdict}</ul><ul class="facts">{listed}</ul>'


def _legend(found: Balance) -> str:
    html = []
    for number, name in enumerate(shown_ways(found)):
        color, dash = style(number)
        swatch = f'<i style="border-top:3px {dash} {color}"></i>'
        html.append(
            f'<button type="button" aria-pressed="true" data-variant="{number}">{swatch}{escape(SHORT[name])}</button>'
        )
    return "".join(html)


def _table(found: Balance) -> str:
    heads = ("ratio", "p50", "p95", "worst", "most tokens of a rank")
    figures = {name: way.figures for name, way in found.ways.items()}
    best = min(each.ratio for name, each in figures.items() if name in REAL)
    rows = []
    for name, says in WAYS.items():
        if (each := figures.get(name)) is None:
            continue
        ratio = f"{each.ratio:.3f}"
        cells = [
            f'<b title="the best that a trainer can have">{ratio}</b>'
            if name in REAL and each.ratio == best
            else ratio,
            *(f"{value:.2f}" for value in (each.p50, each.p95, each.worst)),
            f"{each.peak_tokens:,}",
        ]
        kind = "" if name in REAL else ' class="setting"'
        inner = "".join(f"<td>{cell}</td>" for cell in cells)
        rows.append(f'<tr{kind}><th scope="row">{escape(says)}</th>{inner}</tr>')
    head = "".join(f'<th scope="col">{head}</th>' for head in heads)
    more = found.num_ranks / found.shown.counts.shape[2]
    notes = [
        "Ratio: the sum of the fullest ranks' loads over the sum of the mean ones, over layers and micro-steps; 1 is "
        "even.",
        f"Shaded rows are to compare with: a copy more on each rank takes {more:.1%} more expert weights; the last two "
        "cannot be had.",
        drift_line(found),
    ]
    said = "".join(f'<p class="note soft">{escape(note)}</p>' for note in notes if note)
    table = (
        f'<table class="compare loads"><thead><tr><td></td>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    )
    return scrolled(table) + said
