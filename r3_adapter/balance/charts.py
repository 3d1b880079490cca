"""The plots of loads: a heat map of layers and experts, bars of ranks before and after, and each way's evenness.

L: MoE layers; E: experts of a layer; R: ranks that share them out.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from r3_adapter.balance.compare import REAL, Balance
from r3_adapter.balance.loads import identity, rank_loads, summed
from r3_adapter.runs.charts import Groups, HeatMap, Key, Lines, Series
from r3_adapter.runs.plots import style

SHORT = {
    "arrival": "as it is",
    "shuffled": "shuffled",
    "packed": "packed",
    "placed_last_shuffled": "placed by the step before",
    "placed_last": "placed by the step before, packed",
    "placed": "placed by the very step, packed",
    "eplb": "EPLB",
    "eplb_copies": "EPLB, a copy a rank",
    "oracle": "a placement a micro-step",
    "bound": "hottest expert alone",
}
_BEFORE, _AFTER = "arrival", "placed_last"
_BLUE, _WHITE, _RED = ((33, 102, 172), (247, 247, 247), (178, 24, 43))
_MOST = 2.0
"""Doublings over or under the mean that colours tell apart."""


def load_maps(found: Balance) -> Iterator[HeatMap]:
    """Yield the loads of experts by layer: where the checkpoint has them, and as they are placed."""
    counts = found.shown.counts.sum(axis=0, dtype=np.int64).astype(np.float64)
    mean = counts.mean(axis=1, keepdims=True)
    over = np.divide(counts, mean, out=np.ones_like(counts), where=mean > 0)
    as_is = identity(*counts.shape)
    yield _load_map("Load of each expert, where the checkpoint has it", over, as_is, found.num_ranks)
    title = "The same experts, placed: ranks between the lines get equal sums"
    yield _load_map(title, over, found.shown.placed, found.num_ranks)


def _load_map(title: str, over: npt.NDArray[np.float64], placed: npt.NDArray[np.int32], num_ranks: int) -> HeatMap:
    by_slot = np.take_along_axis(over, placed, axis=1).astype(np.float32)
    num_layers, num_slots = by_slot.shape
    slots = num_slots // num_ranks
    every = -(-num_ranks // 8)
    return HeatMap(
        title=title,
        x_title="rank",
        y_title="MoE layer",
        z=np.clip(np.log2(np.maximum(by_slot, 1e-9)), -_MOST, _MOST),
        rows=[str(layer) for layer in range(num_layers)],
        start=-0.5,
        width=1,
        end=num_slots - 0.5,
        low=-_MOST,
        high=_MOST,
        what="load over the mean",
        palette=_palette(),
        bar_ticks={-2: "1/4", -1: "1/2", 0: "1", 1: "2", 2: "4"},
        said={
            "layer": np.arange(num_layers, dtype=np.int32)[:, None].repeat(num_slots, axis=1),
            "expert": np.ascontiguousarray(placed, np.int32),
            "of the mean": by_slot,
        },
        formats={"of the mean": "{0.00}"},
        dividers=[rank * slots - 0.5 for rank in range(1, num_ranks)],
        x_ticks={rank * slots + (slots - 1) / 2: str(rank) for rank in range(0, num_ranks, every)},
        from_above=True,
        notes=["colours: a quarter of the mean load or less (blue), the mean (white), four times or more (red)"],
        height=max(280, min(560, 110 + 9 * num_layers)),
    )


def _palette() -> list[str]:
    """Return colours from blue over white to red."""
    sides = [np.linspace(*ends, 64) for ends in ((_BLUE, _WHITE), (_WHITE, _RED))]
    return [f"#{red:02x}{green:02x}{blue:02x}" for red, green, blue in np.concatenate(sides).round().astype(int)]


def rank_bars(found: Balance) -> Iterator[Groups]:
    """Yield the loads of ranks before and after: of the layer that is the worst, in its worst micro-step and in all."""
    shown, num_ranks = found.shown, found.num_ranks
    as_is = identity(*shown.counts.shape[1:])
    before = rank_loads(summed(shown.arrived, shown.counts), as_is, num_ranks)
    after = rank_loads(summed(shown.packed, shown.counts), shown.placed, num_ranks)
    over = before.max(axis=2) / np.maximum(before.mean(axis=2), 1e-9)
    first, layer = (int(each) for each in np.unravel_index(over.argmax(), over.shape))
    last = int((after[:, layer].max(axis=1) / np.maximum(after[:, layer].mean(axis=1), 1e-9)).argmax())
    colors = [_color(found, _BEFORE), _color(found, _AFTER)]
    yield _bars(
        f"MoE layer {layer} in its worst micro-step",
        {
            Key(f"as it is, micro-step {first}", colors[0]): before[first, layer],
            Key(f"placed and packed, micro-step {last}", colors[1]): after[last, layer],
        },
    )
    names = ("as it is", "placed and packed")
    sums = {
        Key(name, color): loads[:, layer].sum(axis=0)
        for name, color, loads in zip(names, colors, (before, after), strict=True)
    }
    yield _bars(f"MoE layer {layer}, all micro-steps of the step", sums)


def _bars(title: str, loads: Mapping[Key, npt.NDArray[np.integer]]) -> Groups:
    over = {key: each / max(float(each.mean()), 1e-9) for key, each in loads.items()}
    return Groups(
        title=title,
        x_title="rank",
        y_title="tokens over the mean",
        groups={key: np.round(each, 3).tolist() for key, each in over.items()},
        said={
            key: [f"{part:.2f} of the mean, {tokens:,} tokens" for part, tokens in zip(each, loads[key], strict=True)]
            for key, each in over.items()
        },
        level=1,
        height=290,
    )


def way_lines(found: Balance) -> Iterator[Lines]:
    """Yield each way's ratio by layer, by micro-step, by step, and by the age of the placement."""
    ways = shown_ways(found)
    yield _lines("By layer", "MoE layer", ways, {name: found.ways[name].by_layer() for name in ways})
    sorted_steps = {name: sorted(found.ways[name].by_micro_step(), reverse=True) for name in ways}
    yield _lines("By micro-step, the least even first", "micro-step", ways, sorted_steps)
    if len(found.by_step) > 1:
        yield _lines("By step", "step", ways, {name: [each[name] for each in found.by_step] for name in ways}, first=1)
    if found.ago:
        kept = {ago: each.ratio for ago, each in found.ago if ago >= 0}
        said = [f"{ratio:.3f}" for ratio in kept.values()]
        series = Series("packed", _color(found, _AFTER), list(kept), list(kept.values()), said)
        yield _ratios("A placement of k steps before, packed; the last step", "k", [series])


def shown_ways(found: Balance) -> list[str]:
    """Return the ways that have lines, in the order of their colours."""
    return [name for name in REAL if name in found.ways]


def _color(found: Balance, way: str) -> str:
    """Return the colour of a way; that of the very step stands in where there is no step before."""
    ways = shown_ways(found)
    return style(ways.index(way if way in ways else "placed"))[0]


def _lines(
    title: str, what: str, ways: Sequence[str], values: Mapping[str, Sequence[float]], *, first: int = 0
) -> Lines:
    drawn = []
    for number, name in enumerate(ways):
        color, dash = style(number)
        x = list(range(first, first + len(values[name])))
        said = [f"{value:.3f}" for value in values[name]]
        drawn.append(Series(SHORT[name], color, x, values[name], said, dash=dash, number=number))
    return _ratios(title, what, drawn)


def _ratios(title: str, what: str, series: Sequence[Series]) -> Lines:
    return Lines(title=title, x_title=what, y_title="fullest over mean", series=series, level=1)
