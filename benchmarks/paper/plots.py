"""Small line plots as SVG: a panel for each figure, a line for each seed, nothing but text and polylines."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

COLORS = ("#c0392b", "#2471a3", "#7d8a97", "#d68910", "#7d3c98", "#148f77", "#1b2631", "#a04000", "#5d6d7e")
"""By the order of names; readable on white and on black."""
_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM, _COLUMNS = 380, 220, 64, 34, 30, 2

Line = Sequence[tuple[float, float | None]]


@dataclass(frozen=True)
class Panel:
    """A figure over steps; lines: by name, one for each seed."""

    title: str
    lines: Mapping[str, Sequence[Line]]
    log: bool = False


def svg(panels: Sequence[Panel], title: str) -> str:
    """Return a picture of the panels, two in a row, and a legend below."""
    names = list(dict.fromkeys(name for panel in panels for name in panel.lines))
    colors = {name: COLORS[place % len(COLORS)] for place, name in enumerate(names)}
    rows = -(-len(panels) // _COLUMNS)
    height = rows * _HEIGHT + 24 * (1 + (len(names) - 1) // 4)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_COLUMNS * _WIDTH}" height="{height}" '
        f'viewBox="0 0 {_COLUMNS * _WIDTH} {height}" font-family="sans-serif" font-size="11" role="img">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{_COLUMNS * _WIDTH}" height="{height}" fill="#fff"/>',
    ]
    for place, panel in enumerate(panels):
        parts.append(f'<g transform="translate({place % _COLUMNS * _WIDTH} {place // _COLUMNS * _HEIGHT})">')
        parts += [*_panel(panel, colors), "</g>"]
    for place, name in enumerate(names):
        x, y = _LEFT + place % 4 * 170, rows * _HEIGHT + 14 + place // 4 * 24
        parts.append(f'<path d="M{x} {y - 4}h22" stroke="{colors[name]}" stroke-width="2"/>')
        parts.append(f'<text x="{x + 28}" y="{y}" fill="#222">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(panel: Panel, colors: Mapping[str, str]) -> list[str]:
    shown = [(name, _known(line, panel.log)) for name, lines in panel.lines.items() for line in lines]
    points = [point for _, line in shown for point in line]
    parts = [f'<text x="{_LEFT}" y="20" fill="#222" font-size="13">{escape(panel.title)}</text>']
    if not points:
        return [*parts, f'<text x="{_LEFT}" y="{_HEIGHT / 2}" fill="#666">no figures yet</text>']
    last = max(x for x, _ in points) or 1.0
    low, high = min(y for _, y in points), max(y for _, y in points)
    if not panel.log:
        low = min(low, 0.0)
    high = high if high > low else low + 1.0
    wide, tall = _WIDTH - _LEFT - 14, _HEIGHT - _TOP - _BOTTOM

    def at(x: float, y: float) -> str:
        return f"{_LEFT + wide * x / last:.1f},{_TOP + tall * (high - y) / (high - low):.1f}"

    for share in (0.0, 0.5, 1.0):
        value, y = low + share * (high - low), _TOP + tall * (1 - share)
        text = f"{10**value if panel.log else value:.2g}"
        parts.append(f'<path d="M{_LEFT} {y:.1f}h{wide}" stroke="#ddd"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end" fill="#444">{text}</text>')
    for x in (0.0, last):
        where = _LEFT + wide * x / last
        parts.append(f'<text x="{where}" y="{_HEIGHT - 12}" text-anchor="middle" fill="#444">{x:g}</text>')
    for name, line in shown:
        path = " ".join(at(x, y) for x, y in line)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colors[name]}" stroke-width="1.3"/>')
    return parts


def _known(line: Line, log: bool) -> list[tuple[float, float]]:
    """Return the points that can be drawn: on a logarithmic axis those above zero."""
    known = [(x, y) for x, y in line if y is not None]
    return [(x, math.log10(y)) for x, y in known if y > 0] if log else known
