"""The page's section of texts: what the policy said at the first and the last step, and what it got for it."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from r3_adapter.runs.document import scrolled, section
from r3_adapter.runs.log import Run

_MOST_OPEN = 2
"""Runs whose texts are open on the page; those of more are opened by a click."""


def samples_section(runs: Sequence[Run]) -> str:
    """Return the section; nothing if no run has kept texts."""
    found = [(run, run.samples) for run in runs if run.samples]
    if not found:
        return ""
    is_open = " open" if len(found) <= _MOST_OPEN else ""
    parts = [
        f"<details{is_open}><summary>{escape(run.name)}</summary>{_table(lines)}</details>" for run, lines in found
    ]
    missing = ", ".join(run.name for run in runs if not run.samples)
    note = f'<p class="note soft">not recorded: {escape(missing)}</p>' if missing else ""
    return section("Texts of a few samples, at the last step and the first", "".join(parts) + note)


def _table(lines: Sequence[Mapping[str, Any]]) -> str:
    shown = [lines[-1], lines[0]] if len(lines) > 1 else lines
    rows = "".join(
        f"<tr><td>{line['step']}</td><td>{sample['reward']:.3g}</td>"
        f'<td><div class="text">{escape(sample["prompt"])}</div></td>'
        f'<td><div class="text">{escape(sample["response"])}</div></td></tr>'
        for line in shown
        for sample in line["samples"]
    )
    heads = "".join(f'<th scope="col">{head}</th>' for head in ("step", "reward", "prompt", "response"))
    return scrolled(f'<table class="samples"><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>')
