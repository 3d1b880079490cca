"""README.md and its plots, from results.json and nothing else."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import earlier
from design import ADDED, FAMILIES, HURTS, SEARCH, SEEDS, SHAPES, STEPS, VARIANTS, Cell, base_of, search_cells
from plots import Panel, svg
from store import Results, entries, regime_of

PANELS = (
    ("reward", "reward", False),
    ("k3", "k3 KL, trainer and engine", True),
    ("f_2", "F(2): share of tokens", False),
    ("grad_norm", "norm of the gradient", True),
    ("entropy", "entropy", False),
)
STEP_SECONDS = 3.9
"""Of CPU time, of all processes of a run: see DESIGN.md."""
PLACES = ("regime", "milder", "harsher")
ALONE = Path(__file__).with_name("page.md")
"""What the page says beside figures; {name} is where they go."""


def write_page(results: Results, folder: Path) -> None:
    """Write README.md and a plot for each row of the search and each regime that has runs."""
    plots = {}
    for name, cells in groups(results).items():
        plots[f"{name}.svg"] = picture(name, cells)
    for old in folder.glob("*.svg"):
        if old.name not in plots:
            old.unlink()
    for name, text in plots.items():
        (folder / name).write_text(text, encoding="utf-8")
    parts = {
        "said": said(results),
        "status": status(results),
        "stage0": stage0(results["stage0"]),
        "search": search(results),
        "table": table(results),
        "hurts": hurts(results),
        "costs": costs(results),
        "seconds": str(STEP_SECONDS),
        "plots": "\n\n".join(f"![{name.removesuffix('.svg')}]({name})" for name in plots) or "No run has begun.",
        "earlier": earlier.page(results),
    }
    text = ALONE.read_text(encoding="utf-8")
    for name, part in parts.items():
        text = text.replace(f"{{{name}}}", part)
    (folder / "README.md").write_text(text, encoding="utf-8")


def groups(results: Results) -> dict[str, dict[str, dict[str, Results]]]:
    """Return the cells that have figures by the place in which they are drawn, by variant, by seed."""
    found: dict[str, dict[str, dict[str, Results]]] = {}
    for name, seeds in results["cells"].items():
        place, _, variant = name.partition(":")
        found.setdefault(place, {})[variant] = seeds
    return dict(sorted(found.items()))


def picture(place: str, cells: Mapping[str, Mapping[str, Results]]) -> str:
    """Return the plots of a place: a line for each seed."""
    panels = [
        Panel(
            title, {name: [list(enumerate(each[key])) for each in seeds.values()] for name, seeds in cells.items()}, log
        )
        for key, title, log in PANELS
    ]
    evaluated = {
        name: [[(int(step), value) for step, value in each["evaluation"].items()] for each in seeds.values()]
        for name, seeds in cells.items()
    }
    return svg([*panels, Panel("evaluation, live routers", evaluated)], place)


def grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def said(results: Results) -> str:
    """Say what the experiment shows, in one paragraph."""
    claim = results.get("claim", {})
    if claim.get("shown"):
        return "**Shown:** in the regime, GRPO collapsed by its reward with every seed, and GRPO + R3 with none."
    return (
        f"**Not shown:** {claim.get('why', 'nothing has run')}. Nothing here says that R3 keeps a run from collapsing."
    )


def status(results: Results) -> str:
    """Say what has run and what has not."""
    measured = sum(len(each) for each in results["stage0"].values())
    wanted = len(SHAPES) * sum(map(len, FAMILIES))
    cells = [each for seeds in results["cells"].values() for each in seeds.values()]
    search_runs = [seeds for name, seeds in results["cells"].items() if name.startswith("search-")]
    table_runs = [
        each for name, seeds in results["cells"].items() if name.partition(":")[0] in PLACES for each in seeds.values()
    ]
    ended = sum(each["finished"] for each in cells)
    return grid(
        ["Stage", "ran", "of"],
        [
            ["0: combinations of shape and precision", str(measured), str(wanted)],
            ["1: runs of the search that have begun", str(sum(map(len, search_runs))), f"at most {2 * len(SEARCH)}"],
            ["2 and 3: runs that have begun", str(len(table_runs)), str(len(SEEDS) * (3 * len(VARIANTS) + 6))],
            ["runs that came to their end", str(ended), f"{len(cells)} that have begun"],
        ],
    )


def stage0(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the table of stage 0, in the order of the rule."""
    rows = [
        [
            shape,
            name,
            f"{each['routers_that_differ']:.1%}",
            f"{each['tokens_that_differ']:.1%}",
            *(f"{each[side]['k3']:.1e}" for side in ("live", "replay", "engine")),
            *(f"{each[side]['f_2']:.1e}" for side in ("live", "replay", "bias")),
            f"{each['reward']:.2f}",
            f"{each['live']['tokens']:,}",
        ]
        for family in FAMILIES
        for shape in SHAPES
        for name in family
        if (each := found.get(shape, {}).get(name))
    ]
    head = ["shape", "precision", "routes that differ", "tokens", "k3 live", "replayed", "engine itself"]
    head += ["F(2) live", "replayed", "R3's bias", "reward", "tokens scored"]
    base, missing = base_of(found)
    rule = (
        f"The rule cannot tell the base yet: next is {' in '.join(missing[0])}."
        if base is None
        else f"By the rule, as it was changed after two rows had been seen, the base is {' in '.join(base)}."
    )
    return f"{grid(head, rows)}\n\n{rule}"


def search(results: Results) -> str:
    """Return the table of the search."""
    base, _ = base_of(results["stage0"])
    if base is None:
        return "Not begun: it needs the base."
    rows = []
    for number, (pair, regime) in enumerate(zip(search_cells(base), SEARCH, strict=True), start=1):
        rate = f"{regime.lr:g}" + (f" after {regime.warmup_steps} steps" if regime.warmup_steps else "")
        settings = f"{rate}, {regime.num_steps}, {regime.lag}, {regime.task}"
        settings += f", {regime.precision}" if regime.precision else ""
        shown = f"{number} (added)" if regime in ADDED else str(number)
        rows += [[shown, settings, *_row(results, cell)] for cell in pair if entries(results, cell.name)]
    head = ["row", "learning rate, optimizer steps, lag, task", *_HEAD]
    found = regime_of(results)
    said = (
        "The rule cannot tell the regime yet."
        if found is None
        else f"The regime is that of row {SEARCH.index(found[0]) + 1}, "
        + (
            "the first in which GRPO collapsed and GRPO + R3 did not."
            if found[1]
            else "which has the largest difference."
        )
    )
    if found is not None and found[0] in ADDED:
        said += " **Its row was added after others had been seen.**"
    return f"{grid(head, rows)}\n\n{said}" if rows else "Not begun."


def costs(results: Results) -> str:
    """Return what all runs of each stage would take, if each step took as long as what was measured."""
    found = regime_of(results)
    steps = STEPS if found is None else found[0].table_steps
    stages = {
        "1: search, if all of its rows are run": sum(2 * regime.search_steps for regime in SEARCH),
        "2: table": len(PLACES) * len(VARIANTS) * len(SEEDS) * steps,
        "3: where R3 hurts": len(HURTS) * len(SEEDS) * steps,
    }
    rows = [[name, f"{number:,}", f"{number * STEP_SECONDS / 3600:.1f}"] for name, number in stages.items()]
    return grid(["Stage", "steps", "hours of one core"], rows)


_HEAD = ("variant", "seed", "steps", "reward: best, last 20", "k3: first, last 20", "evaluation", "collapsed at")


def _row(results: Results, cell: Cell) -> list[str]:
    each = entries(results, cell.name).get(str(cell.seed))
    return [cell.name.partition(":")[2], str(cell.seed), *(_figures(each) if each else ["0", "", "", "", ""])]


def _figures(each: Results) -> list[str]:
    reward, k3 = ([value for value in each[name] if value is not None] for name in ("reward", "k3"))
    means = [sum(reward[end - 20 : end]) / 20 for end in range(20, len(reward) + 1)]
    evaluated = list(each["evaluation"].values())
    why = [f"{step} ({rule})" for rule, step in each["collapse"].items() if step is not None]
    return [
        f"{each['steps']}{'' if each['finished'] else ' so far'}",
        f"{max(means):.2f}, {means[-1]:.2f}" if means else "",
        f"{_mean(k3[:20]):.1e}, {_mean(k3[-20:]):.1e}" if k3 else "",
        f"{evaluated[0]:.2f} to {evaluated[-1]:.2f}" if evaluated else "",
        ", ".join(why) or "not",
    ]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))


def table(results: Results) -> str:
    """Return by regime and variant how many seeds collapsed, with mean and spread of the last reward."""
    regimes = results.get("claim", {}).get("regimes", {})
    rows = []
    for place, each in regimes.items():
        for variant, counts in each["variants"].items():
            if not counts["seeds"]:
                continue
            last = [
                _mean([v or 0.0 for v in e["reward"][-20:]]) for e in entries(results, f"{place}:{variant}").values()
            ]
            spread = f"{_mean(last):.2f} ({min(last):.2f} to {max(last):.2f})"
            counted = [f"{counts['collapsed']} of {counts['ended']}", str(counts["by_reward"]), spread]
            rows.append([place, variant, str(counts["seeds"]), *counted])
    head = ["", "variant", "seeds begun", "collapsed, of ended", "by reward", "reward, last 20 steps"]
    return grid(head, rows) if rows else "Not begun." if regimes else "Not begun: it needs the regime."


def hurts(results: Results) -> str:
    """Return how runs with a lag went."""
    rows = [
        [name.partition(":")[2], seed, *_figures(each)]
        for name, seeds in results["cells"].items()
        if "-lag" in name
        for seed, each in seeds.items()
    ]
    return grid(_HEAD, rows) if rows else "Not begun."
