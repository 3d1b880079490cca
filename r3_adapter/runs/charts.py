"""What a plot shows, as plain data; `drawing` makes it visible."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from r3_adapter.runs.files import Number


@dataclass(frozen=True)
class Key:
    """An entry of a plot's own legend."""

    name: str
    color: str


@dataclass(frozen=True, kw_only=True)
class Chart:
    """What all plots have. notes: what it does not show, and how it is to be read; height: in pixels."""

    title: str
    notes: Sequence[str] = ()
    height: int = 250

    @property
    def keys(self) -> Sequence[Key]:
        """The plot's own legend, if it has one beside the page's."""
        return ()


@dataclass(frozen=True)
class Series:
    """A curve: y is None where there is a gap. said: what is shown beside a point; low, high: a band.

    number: of the button that hides it; None: none does.
    """

    label: str
    color: str
    x: Sequence[int]
    y: Sequence[Number | None]
    said: Sequence[str]
    dash: str = "solid"
    number: int | None = None
    low: Sequence[Number | None] = ()
    high: Sequence[Number | None] = ()


@dataclass(frozen=True)
class Marks:
    """Points on a curve with something to say."""

    color: str
    x: Sequence[int]
    y: Sequence[Number | None]
    said: Sequence[str]
    number: int | None = None


@dataclass(frozen=True, kw_only=True)
class Lines(Chart):
    """Curves over whole numbers. level: where a thin line lies that they are to be compared with."""

    x_title: str
    y_title: str
    series: Sequence[Series]
    marks: Sequence[Marks] = ()
    log: bool = False
    percent: bool = False
    level: float | None = None


@dataclass(frozen=True, kw_only=True)
class Stack(Chart):
    """A bar for each label, of parts next to each other. parts: by key, a value for each label."""

    unit: str
    labels: Sequence[str]
    parts: Mapping[Key, Sequence[Number | None]]
    percent: bool = False

    @property
    def keys(self) -> Sequence[Key]:
        """The parts."""
        return list(self.parts)


@dataclass(frozen=True, kw_only=True)
class Groups(Chart):
    """Bars beside each other for each whole number from 0 on. said: what is shown of each bar."""

    x_title: str
    y_title: str
    groups: Mapping[Key, Sequence[float]]
    said: Mapping[Key, Sequence[str]]
    level: float | None = None

    @property
    def keys(self) -> Sequence[Key]:
        """The groups."""
        return list(self.groups)


@dataclass(frozen=True, kw_only=True)
class HeatMap(Chart):
    """Values by row and column as colours.

    z: [rows, columns] float32; NaN is not recorded. rows: their names, from below, or from above.
    start, width: where the first column begins on the axis, and how wide each is; end: of the axis.
    low, high: of the colours' range. what: that the values are, beside the colours.
    palette: colours from low to high; none for Cividis, dark blue to yellow.
    bar_ticks: what stands beside the colours at which value; bar_format: else, how values are written there.
    said: arrays [rows, columns] by name, shown of a cell, each as `formats` has it.
    dividers: where thin lines lie on the axis; x_ticks: what stands below which place of it.
    """

    x_title: str
    y_title: str
    z: npt.NDArray[np.float32]
    rows: Sequence[str]
    start: float
    width: float
    end: float
    low: float
    high: float
    what: str
    said: Mapping[str, npt.NDArray[np.generic]]
    palette: Sequence[str] = ()
    formats: Mapping[str, str] = field(default_factory=dict)
    bar_ticks: Mapping[float, str] | None = None
    bar_format: str = "0.[00]%"
    dividers: Sequence[float] = ()
    x_ticks: Mapping[float, str] | None = None
    from_above: bool = False
