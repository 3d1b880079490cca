"""The tables of `r3 balance`."""

from collections.abc import Iterator

import numpy as np
from rich.table import Table

from r3_adapter.balance.compare import REAL, WAYS, Balance
from r3_adapter.errors import counted

_FIGURES = ("ratio", "p50", "p95", "worst", "most tokens of a rank")
_SHOWN_AGO = (0, 1, 2, 4, 8, 16, 32, -1)


def tables_of(found: Balance) -> Iterator[Table]:
    """Yield what each way gives, and how long a placement stays good where there are steps enough to say it."""
    yield ways_table(found)
    if found.ago:
        yield _drift_table(found)


def drift_line(found: Balance) -> str:
    """Say how fast loads change; nothing of a single step."""
    if not found.moved:
        return ""
    most = max(found.moved, key=lambda each: each.most)
    mean = sum(each.mean for each in found.moved) / len(found.moved)
    return (
        f"From step to step {mean:.1%} of a layer's tokens go to other experts; at most {most.most:.1%}, in MoE layer "
        f"{most.layer}."
    )


def ways_table(found: Balance) -> Table:
    """Return the figures of each way; the least ratio that a trainer can have is marked."""
    ranks, steps = counted(found.num_ranks, "expert-parallel rank"), counted(found.num_micro_steps, "micro-step")
    table = Table(title=f"Loads of {ranks}, {steps}")
    for name in ("", *_FIGURES):
        table.add_column(name, justify="right" if name else "left")
    figures = {name: way.figures for name, way in found.ways.items()}
    best = min(each.ratio for name, each in figures.items() if name in REAL)
    for name, says in WAYS.items():
        if name == "eplb":
            table.add_section()
        if (each := figures.get(name)) is None:
            table.add_row(says, *"-----")
            continue
        cells = (
            f"{each.ratio:.3f}",
            f"{each.p50:.2f}",
            f"{each.p95:.2f}",
            f"{each.worst:.2f}",
            f"{each.peak_tokens:,}",
        )
        table.add_row(says, *cells, style="bold" if name in REAL and each.ratio == best else None)
    layers = found.ways["arrival"].by_layer()
    least, more = int(np.argmax(layers)), found.num_ranks / found.shown.counts.shape[2]
    table.caption = (
        f"1 is even. Planned in {found.seconds:.2f} s a step. As it is, layers are at {min(layers):.2f} to "
        f"{max(layers):.2f}, MoE layer {least} the worst.\nA copy more on each rank takes {more:.1%} more expert "
        "weights. The last two rows cannot be had:\nexperts that move at no cost, and a bound without copies."
    )
    return table


def _drift_table(found: Balance) -> Table:
    table = Table(title="Drift")
    for name in ("placed by the routes of", "ratio", "worst"):
        table.add_column(name, justify="right" if table.columns else "left")
    names = {0: "the very step", 1: "the step before", -1: "nothing: experts as they are"}
    for ago, each in found.ago:
        if ago in _SHOWN_AGO or ago == len(found.ago) - 2:
            table.add_row(names.get(ago, f"{ago} steps before"), f"{each.ratio:.3f}", f"{each.worst:.2f}")
    table.caption = f"Packed, the last of {found.num_steps} steps."
    return table
