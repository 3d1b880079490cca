"""Runs that differ only in their seed, taken together."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from r3_adapter.runs.files import Number, Step
from r3_adapter.runs.log import Run, mean

MAX_POINTS = 500
"""Points of a curve; each is the mean of the steps that fall together if there are more."""

Figure = Callable[[Step], Number | None]
"""A figure of a step, or None if the step does not have it."""


@dataclass(frozen=True)
class Curve:
    """A figure over steps: mean, lowest and highest over the runs that have it there, and how many these are."""

    steps: list[int]
    mean: list[float]
    low: list[float]
    high: list[float]
    num_runs: list[int]


@dataclass(frozen=True)
class Variant:
    """Runs of one variant, each of another seed."""

    label: str
    runs: Sequence[Run]

    def curve(self, figure: Figure, width: int) -> Curve:
        """Return a figure over steps, each point over `width` of them; a point without it is left out."""
        points: dict[int, dict[int, list[float]]] = {}
        for number, run in enumerate(self.runs):
            for step, value in run.series(figure).items():
                points.setdefault(step // width, {}).setdefault(number, []).append(value)
        found = [(at, [sum(seen) / len(seen) for seen in points[at].values()]) for at in sorted(points)]
        return Curve(
            steps=[at * width for at, _ in found],
            mean=[sum(values) / len(values) for _, values in found],
            low=[min(values) for _, values in found],
            high=[max(values) for _, values in found],
            num_runs=[len(values) for _, values in found],
        )

    def totals(self, of: Callable[[Run], float | None]) -> list[float]:
        """Return a figure of each run that has it."""
        return [value for value in map(of, self.runs) if value is not None]

    def mean(self, figure: Figure) -> float | None:
        """Return a figure's mean over all steps of all runs."""
        return mean([value for run in self.runs for value in run.series(figure).values()])

    def settings(self) -> dict[str, str]:
        """Return model, layout, flags but the seed's, and versions; different values of one setting by commas."""
        found: dict[str, dict[str, None]] = {}
        for run in self.runs:
            for key, value in _settings(run).items():
                found.setdefault(key, {})[value] = None
        return {key: ", ".join(values) for key, values in found.items()}


def at(key: str) -> Figure:
    """Return what reads a figure of a step: "reward", "rows/live"."""
    outer, _, inner = key.partition("/")

    def read(step: Step) -> Number | None:
        value = step.get(outer)
        return value.get(inner) if isinstance(value, Mapping) else value

    return read


def ratio(above: str, below: str) -> Figure:
    """Return what divides one figure of a step by another that is not zero."""

    def read(step: Step) -> Number | None:
        numerator, denominator = at(above)(step), at(below)(step)
        return numerator / denominator if numerator is not None and denominator else None

    return read


def variants_of(runs: Sequence[Run]) -> list[Variant]:
    """Group runs whose names differ only in "-seedN" at the end, or whose settings differ only in the seed.

    Two runs of one seed are not seeds of one variant: they stay apart. Labels are distinct.
    """
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        stem = re.sub(r"-seed\d+$", "", run.name)
        key = ("name", stem) if stem != run.name else ("settings", json.dumps(_settings(run), sort_keys=True))
        groups.setdefault(key, []).append(run)
    variants = []
    for group in groups.values():
        seeds = [run.config["seed"] for run in group]
        together = len(group) > 1 and len(set(seeds)) == len(seeds)
        for some in [group] if together else [[run] for run in group]:
            label = re.sub(r"-seed\d+$", "", some[0].name) if together else some[0].name
            variants.append(Variant(label, some))
    labels = [variant.label for variant in variants]
    return [
        Variant(f"{variant.label} ({variant.runs[0].folder})", variant.runs)
        if labels.count(variant.label) > 1
        else variant
        for variant in variants
    ]


def _settings(run: Run) -> dict[str, str]:
    config: Mapping[str, Any] = run.config
    layout = " ".join(f"{key} {_say(value)}" for key, value in config["layout"].items())
    flags = {key: _say(value) for key, value in config["flags"].items() if key != "seed"}
    versions = {key: _say(value) for key, value in config["versions"].items()}
    return {"model": config["model"], "layout": layout, **flags, **versions}


def _say(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
