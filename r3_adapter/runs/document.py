"""An HTML page of plots, which loads nothing and runs no script but its own.

Texts are escaped by whoever puts them in; plots go as JSON into a block that is not a script. The page's policy lets no
script run but the two that were put in: Bokeh's, which is compressed so that the page stays small, and the page's own.
"""

import base64
import gzip
import hashlib
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from r3_adapter.errors import R3Error
from r3_adapter.runs.charts import Chart

_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src $hashes">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>$css</style>
</head>
<body>
<header><h1>$title</h1>$head</header>
$legend<main>$body</main>
<script type="application/json" id="charts">$charts</script>
<script type="text/plain" id="bokeh">$bokeh</script>
<script>$js</script>
</body>
</html>
""")


def document(title: str, head: str, legend: str, body: str, charts: Sequence[Chart]) -> str:
    """Return the page. head, legend, body: HTML; title: a text; charts: by their places in the body.

    Raises:
        R3Error: Bokeh is not installed.
    """
    bokeh, drawn = _bokeh(charts)
    js = _asset("page.js")
    return _PAGE.substitute(
        title=escape(title),
        css=_asset("page.css"),
        head=head,
        legend=f'<nav aria-label="variants">{legend}</nav>\n' if legend else "",
        body=body,
        charts=_json(drawn),
        bokeh=base64.b64encode(gzip.compress(bokeh.encode(), 9, mtime=0)).decode(),
        js=js,
        hashes=" ".join(_hash(script) for script in (bokeh, js)),
    )


def figure(chart: Chart, number: int) -> str:
    """Return the place of a plot that is the charts' `number`th, with its title, its legend and notes."""
    notes = "".join(f"<p>{escape(note)}</p>" for note in chart.notes)
    caption = f"<figcaption><h3>{escape(chart.title)}</h3></figcaption>"
    keys = "".join(f'<li><i style="background-color:{key.color}"></i>{escape(key.name)}</li>' for key in chart.keys)
    legend = f'<ul class="keys">{keys}</ul>' if keys else ""
    plot = f'<div class="plot" id="chart-{number}" style="height:{chart.height}px"></div>'
    return f"<figure>{caption}{legend}{plot}{notes}</figure>"


def section(title: str, inner: str) -> str:
    """Return a section of the page; inner: HTML."""
    return f"<section><h2>{escape(title)}</h2>{inner}</section>"


def scrolled(table: str) -> str:
    """Return a table that scrolls sideways where it is too wide, and says so; table: HTML."""
    more = '<p class="more">more columns to the right \N{RIGHTWARDS ARROW}</p>'
    return f'<div class="table">{more}<div class="scroll">{table}</div></div>'


def _asset(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _bokeh(charts: Sequence[Chart]) -> tuple[str, dict[str, Any]]:
    """Return Bokeh's script, and the plots by their places, as it reads them."""
    try:
        from bokeh.resources import Resources

        from r3_adapter.runs.drawing import as_json
    except ImportError as error:
        raise R3Error("pages are drawn with Bokeh, which is not installed: pip install 'r3-adapter[report]'") from error
    script = Resources(mode="inline", components=["bokeh"]).js_raw[0]
    return script, {f"chart-{number}": as_json(chart) for number, chart in enumerate(charts)}


def _hash(script: str) -> str:
    digest = hashlib.sha256(script.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def _json(value: object) -> str:
    """Return JSON that ends no block of HTML."""
    dumped = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return dumped.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
