"""Tables, plots and progress bars of a comparison between trainer and rollout."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from r3_adapter.errors import counted
from r3_adapter.metrics import Gap, Logprobs, gap
from r3_adapter.signals import say

_METRICS = (("reward", "reward"), ("eval reward", "eval_reward"), ("k3", "k3"), ("gradient norm", "grad_norm"))
QUIET_S = 30.0
"""Between two lines of steps that have no metrics."""

ProgressCallback = Callable[[int, int], None]
"""Called with what is done and what there is to do."""


@dataclass(frozen=True)
class Comparison:
    """A trainer's pass over the tokens of a rollout, in one mode.

    agreement: by global decoder layer, the share of the routes' experts that the trainer's router used.
    routes_replayed: those whose experts it used, and no others, because they were given to it.
    """

    gap: Gap
    agreement: Mapping[int, float]
    routes_replayed: int

    @classmethod
    def of(cls, trainer: Logprobs, rollout: Logprobs, agreement: Mapping[int, float], routes: int) -> "Comparison":
        """Compare [N] log-probabilities of the same tokens."""
        return cls(gap(trainer, rollout), agreement, routes)

    def to_json(self) -> dict[str, Any]:
        """Return a flat object, with agreement by layer."""
        agreement = {str(layer): share for layer, share in self.agreement.items()}
        return {**asdict(self.gap), "agreement": agreement, "routes_replayed": self.routes_replayed}


def comparison_table(live: Comparison, replay: Comparison, payload: Mapping[str, float]) -> Table:
    """Return both modes side by side; payload: bytes a token by name."""
    table = Table(title="Trainer against rollout, over the same tokens")
    table.add_column("")
    table.add_column("live routers", justify="right")
    table.add_column("routes replayed", justify="right")
    rows: list[tuple[str, Callable[[Comparison], str]]] = [
        ("response tokens", lambda c: f"{c.gap.tokens:,}"),
        ("mean |d logp|", lambda c: f"{c.gap.mean_abs:.2e}"),
        ("max |d logp|", lambda c: f"{c.gap.max_abs:.2e}"),
        ("k3 KL", lambda c: f"{c.gap.k3:.2e}"),
        ("F(1.2)", lambda c: f"{c.gap.f_1_2:.2e}"),
        ("F(2)", lambda c: f"{c.gap.f_2:.2e}"),
        ("routes replayed", lambda c: f"{c.routes_replayed:,}"),
    ]
    for name, show in rows:
        table.add_row(name, show(live), show(replay))
    table.add_section()
    for layer in live.agreement:
        table.add_row(f"experts equal, layer {layer}", f"{live.agreement[layer]:.2%}", f"{replay.agreement[layer]:.2%}")
    table.add_section()
    for name, size in payload.items():
        table.add_row(name, "", f"{size:.1f} B")
    return table


def plot_comparison(
    path: Path, rollout: Logprobs, trainer: Mapping[str, Logprobs], sides: Mapping[str, Comparison]
) -> None:
    """Write a picture: trainer against rollout log-probabilities, one panel a mode, and agreement by layer."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.use("Agg")
    figure = Figure(figsize=(13, 4.4), layout="constrained")
    panels = figure.subplots(1, 3)
    low = min(float(rollout.min()), *(float(found.min()) for found in trainer.values())) * 1.03
    colors = dict(zip(sides, ("#c44e52", "#4c72b0"), strict=False))
    for panel, (mode, found) in zip(panels, trainer.items(), strict=False):
        panel.plot([low, 0], [low, 0], color="#bbbbbb", linewidth=1, zorder=0)
        panel.scatter(rollout, found, s=4, alpha=0.5, linewidths=0, color=colors[mode])
        panel.set(xlim=(low, 0), ylim=(low, 0), xlabel="rollout log-probability", ylabel="trainer log-probability")
        panel.set_title(f"{mode}: k3 KL {sides[mode].gap.k3:.1e}, max |d logp| {sides[mode].gap.max_abs:.2g}")
        panel.set_aspect("equal")
    bars, width = panels[-1], 0.8 / len(sides)
    for index, (mode, side) in enumerate(sides.items()):
        at = np.arange(len(side.agreement)) + (index - (len(sides) - 1) / 2) * width
        bars.bar(at, list(side.agreement.values()), width, label=mode, color=colors[mode])
    layers = list(next(iter(sides.values())).agreement)
    bars.set_xticks(range(len(layers)), [str(layer) for layer in layers])
    lowest = min(min(side.agreement.values()) for side in sides.values())
    bars.set(xlabel="decoder layer", ylabel="experts equal to the rollout's", ylim=(max(0, 2 * lowest - 1.01), 1.001))
    bars.set_title("agreement by layer")
    bars.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=len(sides), frameon=False)
    figure.savefig(path, dpi=110)


class _DoneColumn(MofNCompleteColumn):
    """How much is done; before that is known, what is going on."""

    def render(self, task: Task) -> Text:
        return Text(task.fields["before"]) if task.total is None else super().render(task)


@contextmanager
def progress_bars(names: Mapping[str, str]) -> Iterator[list[ProgressCallback]]:
    """Show a bar for each name on stderr, or lines where that is no terminal; yield the functions that move them.

    names: each with what is going on before it is first moved; the first one is under way at once.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        say(": ".join(next(iter(names.items()))))
        yield [_lines(name) for name in names]
        return
    columns = (TextColumn("{task.description:>8}"), BarColumn(), _DoneColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        tasks = [
            progress.add_task(name, total=None, start=index == 0, before=before)
            for index, (name, before) in enumerate(names.items())
        ]

        def ticker(task: Any) -> ProgressCallback:
            def tick(done: int, total: int) -> None:
                progress.start_task(task)
                progress.update(task, completed=done, total=total)

            return tick

        yield [ticker(task) for task in tasks]


def _lines(name: str) -> ProgressCallback:
    """Return what says how far something is: as it begins, at most every half minute, and at its end."""
    start = said = time.monotonic()
    last = -1

    def tick(done: int, total: int) -> None:
        nonlocal said, last
        now = time.monotonic()
        if done != last and (last < 0 or done == total or now - said >= QUIET_S):
            said, last = now, done
            say(f"{name}: {done} of {total} ({now - start:.1f} s)")

    return tick


class Show(Protocol):
    """Takes how many steps are done, the metrics of the last one, and what else is to be said of it."""

    def __call__(self, done: int, step: Mapping[str, Any], note: str = "") -> None: ...


@contextmanager
def run_progress(name: str, total: int, done: int = 0) -> Iterator[Show]:
    """Show a long run's steps on stderr: a bar where that is a terminal, else a line a step, which a log keeps.

    done: steps that were there when the run was resumed.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _step_lines(name, total)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[metrics]}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(escape(name), total=total, completed=done, metrics="")

        def show(done: int, step: Mapping[str, Any], note: str = "") -> None:
            # After a fault of the trainer, steps are made again.
            progress.update(task, completed=done, metrics=_metrics_line(step, note))

        yield show


def _step_lines(name: str, total: int) -> Show:
    """Return what says each step in a line; steps without metrics are said at most every half minute."""
    said = time.monotonic()

    def show(done: int, step: Mapping[str, Any], note: str = "") -> None:
        nonlocal said
        now = time.monotonic()
        if step or done == total or now - said >= QUIET_S:
            said = now
            say(f"{name}: step {done} of {total}  {_metrics_line(step, note)}".rstrip())

    return show


def _metrics_line(step: Mapping[str, Any], note: str) -> str:
    """Return what a step's line has: reward, k3, gradient norm, rows and seconds, as far as they are recorded."""
    rows, seconds = step.get("rows", {}), step.get("seconds", {})
    said = [f"{label} {step[key]:.3g}" for label, key in _METRICS if key in step]
    if step.get("grad_norm") == 0:
        said[-1] += " (nothing to learn: the samples of each prompt have the same reward)"
    if "replayed" in rows:
        said.append(f"rows {rows['replayed']:,} replayed, {rows.get('live', 0):,} live, {rows.get('stale', 0):,} stale")
    if "step" in seconds:
        said.append(f"{seconds['step']:.1f} s")
    return "  ".join([*said, *([note] if note else [])])


def last_line(summary: Mapping[str, Any], page: Path) -> str:
    """Say in one line how a run went; what was not recorded is left out. summary: as summary.json has it."""
    said = [counted(summary["steps"], "step")]
    if "reward_first" in summary:
        said.append(f"reward {summary['reward_first']:.3g} -> {summary['reward_last']:.3g} (first and last tenth)")
    if summary["collapsed"]:
        said.append("COLLAPSED")
    if "k3" in summary:
        said.append(f"k3 {summary['k3']:.2e}")
    if "r3_share" in summary:
        said.append(f"R3 {summary['r3_share']:.2%} of step time")
    events = summary["events"].items()
    said.append(", ".join(f"{kind.replace('_', ' ')} {count}" for kind, count in events) or "no faults")
    return f"{summary['name']}: {'; '.join(said)}; {page}"
