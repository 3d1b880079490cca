"""A run of the experiment on collapse that is stopped after its first step, and then goes on: paper_cell.py FOLDER."""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "paper"))

from design import SEARCH_SEED, VARIANTS, Cell, Regime
from runs import Sitting, TimeIsUp, connected, folder_of, train
from store import entry_of, opened, put

from r3_adapter.proof.tiny import TinyModel, write_checkpoint
from r3_adapter.ray import loop
from r3_adapter.ray.pool import RolloutPool
from r3_adapter.rl.tasks import VOCABULARY

SHAPE = TinyModel(num_layers=1, num_experts=4, topk=2, hidden_size=16, vocab_size=VOCABULARY, max_length=64)
CELL = Cell("search-1:GRPO+R3", SEARCH_SEED, ("16x32", "fp32-fp8"), Regime(1e-3), VARIANTS["GRPO+R3"], 2)


POOLS: list[RolloutPool] = []


def pool(*args: Any, **options: Any) -> RolloutPool:
    """Return one pool for both sittings: its engine has the weights of the step that is gone on from."""
    if not POOLS:
        POOLS.append(RolloutPool(*args, **options))
        POOLS[0].close = lambda: None  # type: ignore[method-assign]
    return POOLS[0]


def main(folder: Path) -> None:
    """Stop before the second step, go on, and put both into results."""
    loop.RolloutPool = pool  # type: ignore[assignment,misc,attr-defined]
    sitting = Sitting(folder, shapes={"16x32": SHAPE}, save_interval=1)
    write_checkpoint(folder / f"start-16x32-running-{SEARCH_SEED}", dtype="float32", seed=0, shape=SHAPE)
    begun: list[int] = []

    def stop(step: int) -> None:
        begun.append(step)
        if step == 1:
            raise TimeIsUp

    with connected():
        try:
            train(sitting, CELL, {}, stop)
        except TimeIsUp:
            keep(folder)
        train(sitting, CELL, {}, begun.append)
    keep(folder)
    print(begun)


def keep(folder: Path) -> None:
    with opened(folder / "results.json") as results:
        put(results, CELL, entry_of(CELL, folder_of(folder, CELL)))
        seed = results["cells"][CELL.name][str(SEARCH_SEED)]
        print(seed["steps"], seed["finished"], len(seed["reward"]), sorted(seed["evaluation"]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
