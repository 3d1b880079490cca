"""The experiment on collapse that DESIGN.md describes, over as many sittings as it takes.

    python benchmarks/paper/run.py --resume --minutes 90      # go on; two of these may run beside each other
    python benchmarks/paper/run.py --cell search-1:GRPO --seed 100
    python benchmarks/paper/run.py --table                    # README.md and plots, from results.json

The folder of the work keeps what is done. Killed at any point, a run loses what came after its last checkpoint.
"""

import argparse
import fcntl
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from design import FAMILIES, LEFT, SHAPES, Cell, base_of, search_cells, table_cells
from runs import Diverged, Sitting, TimeIsUp, connected, folder_of, train
from static import measure
from store import DIVERGED, Results, entries, entry_of, opened, put, read, regime_of, versions
from table import write_page

from r3_adapter.errors import R3Error
from r3_adapter.signals import run_command

HERE = Path(__file__).resolve().parent
EVERY = 10
"""Steps after which a run's figures are put into the results."""


@dataclass(frozen=True)
class Job:
    """Something to do; a name of its own for each."""

    name: str
    do: Callable[[], None]


def main() -> int:
    """Do what is asked for; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--resume", action="store_true", help="go on with what comes next by the design")
    what.add_argument("--cell", metavar="NAME", help="make one run, or go on with it; needs --seed")
    what.add_argument("--static", nargs=2, metavar=("SHAPE", "PRECISION"), help="measure one row of stage 0")
    what.add_argument("--table", action="store_true", help="write README.md and the plots beside it")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--minutes", type=float, help="stop after that long, between two steps")
    parser.add_argument("--work", type=Path, default=Path("paper"), help="folder of checkpoints and runs")
    parser.add_argument("--out", type=Path, default=HERE / "results.json", help="results to add to")
    args = parser.parse_args()
    if args.table:
        write_page(read(args.out), args.out.parent)
        return 0
    args.work.mkdir(parents=True, exist_ok=True)
    sitting = Sitting(args.work.resolve(), args.minutes and time.monotonic() + 60 * args.minutes)
    try:
        if args.static:
            static_job(sitting, args.out, *args.static).do()
        elif args.cell:
            cell_job(sitting, args.out, cell_named(read(args.out), args.cell, args.seed)).do()
        else:
            resume(sitting, args.out)
    except TimeIsUp:
        print("time is up", flush=True)
    return 0


def resume(sitting: Sitting, out: Path) -> None:
    """Do the next job that nobody else does, until there is none."""
    with connected():
        while True:
            sitting.check()
            for job in due(sitting, out):
                with alone(sitting.work / f"job-{job.name.replace(':', '-')}.lock") as is_mine:
                    if is_mine:
                        print(time.strftime("%H:%M"), job.name, flush=True)
                        job.do()
                        break
            else:
                print("nothing is left to do, or others do it", flush=True)
                return


@contextmanager
def alone(path: Path) -> Iterator[bool]:
    """Say whether this process is the one that holds a lock."""
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def due(sitting: Sitting, out: Path) -> list[Job]:
    """Return what is not done, in the design's order, as far as the rules can tell now."""
    results = read(out)
    base, missing = base_of(results["stage0"])
    if base is None:
        return [static_job(sitting, out, *each) for each in missing]
    rows = dict(enumerate(search_cells(base), start=1))
    pairs = [cell for number in sorted(rows, key=LEFT.__contains__) for cell in rows[number]]
    found = regime_of(results)
    cells = pairs if found is None else [*table_cells(base, found[0]), *pairs]
    jobs = [cell_job(sitting, out, cell) for cell in cells if not is_done(results, cell)]
    rest = [(shape, name) for family in FAMILIES for shape in SHAPES for name in family]
    late = [each for each in rest if each[1] not in results["stage0"].get(each[0], {})]
    return [*jobs, *(static_job(sitting, out, *each) for each in late)]


def is_done(results: Results, cell: Cell) -> bool:
    """Say whether a run has come to its end, here or on another machine."""
    return bool(entries(results, cell.name).get(str(cell.seed), {}).get("finished"))


def cell_named(results: Results, name: str, seed: int | None) -> Cell:
    """Return a cell of the design.

    Raises:
        R3Error: there is none of that name and seed, as far as the rules can tell now.
    """
    base, missing = base_of(results["stage0"])
    if base is None:
        raise R3Error(f"cell {name!r}: the base is not known before stage 0 has measured {missing[0]}")
    found = regime_of(results)
    known = [cell for pair in search_cells(base) for cell in pair]
    known += [] if found is None else table_cells(base, found[0])
    for cell in known:
        if (cell.name, cell.seed) == (name, seed):
            return cell
    raise R3Error(f"cell {name!r} of seed {seed} is none of {sorted({f'{cell.name} {cell.seed}' for cell in known})}")


def cell_job(sitting: Sitting, out: Path, cell: Cell) -> Job:
    """Return the job of a run; its figures get into the results while it is under way."""

    def keep() -> None:
        folder = folder_of(sitting.work, cell)
        if (folder / "metrics.jsonl").exists():
            entry = entry_of(cell, folder)
            with opened(out) as results:
                put(results, cell, entry)

    def observe(step: int) -> None:
        if step % EVERY == 0:
            keep()

    def do() -> None:
        try:
            train(sitting, cell, versions(), observe)
        except Diverged as error:
            (folder_of(sitting.work, cell) / DIVERGED).write_text(str(error), encoding="utf-8")
        finally:
            keep()

    return Job(f"{cell.name}-{cell.seed}", do)


def static_job(sitting: Sitting, out: Path, shape: str, precision: str) -> Job:
    """Return the job of a row of stage 0."""

    def do() -> None:
        figures = json.loads((measure(sitting, shape, precision) / "figures.json").read_text(encoding="utf-8"))
        losses = json.loads(next(sitting.work.glob(f"start-{shape}-running-*/losses.json")).read_text(encoding="utf-8"))
        with opened(out) as results:
            results["stage0"].setdefault(shape, {})[precision] = {**figures, "supervised_steps": len(losses)}

    return Job(f"static-{shape}-{precision}", do)


if __name__ == "__main__":
    sys.exit(run_command("paper", main, "the same command goes on"))
