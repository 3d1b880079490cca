"""The README's picture: how far trainer and rollout are apart, with live routers and with routes replayed.

python docs/site/effect.py draws it from docs/effect.json; --take FILE first takes that from a result of
benchmarks/paper/run.py. One picture for a light page and one for a dark one.
"""

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

DOCS = Path(__file__).resolve().parents[1]
FIGURES = DOCS / "effect.json"
THEMES: Mapping[str, Mapping[str, str]] = {
    "light": {
        "text": "#1f2328",
        "faint": "#59636e",
        "line": "#d1d9e0",
        "live": "#cf222e",
        "replay": "#0969da",
        "dense": "#6e7781",
    },
    "dark": {
        "text": "#f0f6fc",
        "faint": "#9198a1",
        "line": "#3d444d",
        "live": "#ff7b72",
        "replay": "#58a6ff",
        "dense": "#9198a1",
    },
}
_SERIES = (("live", "live routers"), ("replay", "routes replayed"), ("dense", "a dense model"))
_WIDTH, _HEIGHT = 860, 330
_LEFT, _TOP, _PLOT_WIDTH, _PLOT_HEIGHT = 62, 62, 330, 200
_DECADES = (-5, -1)
"""Powers of ten of the lowest and the highest share; a share of 0 is drawn on the axis."""


def taken(results: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the picture needs of a result of benchmarks/paper/run.py."""
    static = results["static"]
    sides = {"live": static["moe"]["live"], "replay": static["moe"]["replay"], "dense": static["dense"]["live"]}
    return {
        "command": results["command"],
        "response_tokens": results["response_tokens"],
        "engine_against_itself_k3": static["moe"]["engine"]["k3"],
        **{name: {"k3": side["k3"], "share_beyond": side["f"]} for name, side in sides.items()},
    }


def picture(figures: Mapping[str, Any], colors: Mapping[str, str]) -> str:
    """Return an SVG: the share of tokens beyond a factor, and the k3 KL."""
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" '
            f'height="{_HEIGHT}" '
            'font-family="-apple-system, Segoe UI, Helvetica, Arial, sans-serif" font-size="13">',
            *_curves(figures, colors),
            *_bars(figures, colors),
            "</svg>\n",
        ]
    )


def _curves(figures: Mapping[str, Any], colors: Mapping[str, str]) -> list[str]:
    factors = list(figures["live"]["share_beyond"])
    bottom = _TOP + _PLOT_HEIGHT
    at = {factor: _LEFT + _PLOT_WIDTH * index / (len(factors) - 1) for index, factor in enumerate(factors)}
    out = [_text(_LEFT - 44, 24, "Tokens whose probability differs between", colors["text"], size=15, weight=600)]
    out.append(_text(_LEFT - 44, 43, "trainer and rollout by more than a factor", colors["text"], size=15, weight=600))
    low, high = _DECADES
    for power in range(low, high + 1):
        y = bottom - _PLOT_HEIGHT * (power - low) / (high - low)
        out.append(f'<path d="M{_LEFT} {y:.1f}H{_LEFT + _PLOT_WIDTH}" stroke="{colors["line"]}"/>')
        label = "0" if power == low else f"{10 ** (power + 2):g} %"
        out.append(_text(_LEFT - 8, y + 4, label, colors["faint"], anchor="end"))
    out += [
        _text(x, bottom + 19, factor.removesuffix(".0"), colors["faint"], anchor="middle") for factor, x in at.items()
    ]
    out.append(_text(_LEFT + _PLOT_WIDTH / 2, bottom + 40, "factor", colors["faint"], anchor="middle"))
    for name, _ in reversed(_SERIES):
        points = [(at[factor], _height(share, bottom)) for factor, share in figures[name]["share_beyond"].items()]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        dashed = ' stroke-dasharray="5 4"' if name == "dense" else ""
        out.append(f'<path d="M{path}" fill="none" stroke="{colors[name]}" stroke-width="2.5"{dashed}/>')
        out += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colors[name]}"/>' for x, y in points]
    return out


def _height(share: float, bottom: float) -> float:
    low, high = _DECADES
    return bottom - _PLOT_HEIGHT * max(0.0, (math.log10(share) - low) / (high - low)) if share else bottom


def _bars(figures: Mapping[str, Any], colors: Mapping[str, str]) -> list[str]:
    left, width = 470, 270
    bars = [(label, figures[name]["k3"], colors[name]) for name, label in _SERIES]
    bars.append(("the engine against itself", figures["engine_against_itself_k3"], colors["line"]))
    largest = max(value for _, value, _ in bars)
    out = [_text(left, 24, "k3 KL between trainer and rollout", colors["text"], size=15, weight=600)]
    for index, (label, value, color) in enumerate(bars):
        y = _TOP + 4 + index * 52
        out.append(_text(left, y, label, colors["text"]))
        out.append(
            f'<rect x="{left}" y="{y + 8}" width="{width * value / largest:.1f}" height="20" rx="3" fill="{color}"/>'
        )
        out.append(
            _text(left + width * value / largest + 8, y + 23, f"{value:.1e}".replace("e-0", "e-"), colors["text"])
        )
    words = f"A tiny Qwen3-MoE in bfloat16 on a CPU, {figures['response_tokens']:,} tokens"
    out.append(_text(left, _TOP + _PLOT_HEIGHT + 40, words, colors["faint"], size=12))
    return out


def _text(
    x: float, y: float, words: str, color: str, *, anchor: str = "start", size: int = 13, weight: int = 400
) -> str:
    attributes = (
        f'x="{x:.1f}" y="{y:.1f}" fill="{color}" text-anchor="{anchor}" font-size="{size}" font-weight="{weight}"'
    )
    return f"<text {attributes}>{escape(words)}</text>"


def main(argv: Sequence[str]) -> int:
    """Draw the pictures."""
    parser = argparse.ArgumentParser(description="draw the README's picture")
    parser.add_argument(
        "--take", type=Path, metavar="FILE", help="take the figures from a result of benchmarks/paper/run.py"
    )
    args = parser.parse_args(argv)
    if args.take:
        figures = taken(json.loads(args.take.read_text(encoding="utf-8")))
        FIGURES.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    figures = json.loads(FIGURES.read_text(encoding="utf-8"))
    for name, colors in THEMES.items():
        (DOCS / f"effect-{name}.svg").write_text(picture(figures, colors), encoding="utf-8", newline="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
