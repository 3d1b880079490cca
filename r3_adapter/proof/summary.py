"""The table of `r3 prove`: how near each kind of replay is to the rollout."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from r3_adapter.errors import counted
from r3_adapter.proof.evidence import Evidence
from r3_adapter.proof.server import ServerVerdict
from r3_adapter.proof.verdict import Verdict

_SIZES = ("tp", "pp", "vpp", "cp", "ep", "etp", "dp")


def summary(verdict: Verdict | ServerVerdict) -> Table:
    """Return the gaps of replay and of what it was compared with, and the counts behind the verdict."""
    table = Table(title=f"Trainer against rollout, {_ranks(verdict.layout)}")
    table.add_column("|d log p| x temperature")
    for name in ("tokens", "mean", "largest"):
        table.add_column(name, justify="right")
    if verdict.evidence is not None:
        _add_gaps(table, verdict.evidence)
    said = [f"{verdict.routes_replayed:,} of {verdict.routes_expected:,} routes replayed"]
    if (found := verdict.evidence) is not None:
        said.append(f"{found.seen} of {found.misplaced} single misplaced routes seen beyond {found.token_limit:.1e}")
    table.caption = "\n".join(said)
    return table


def _add_gaps(table: Table, evidence: Evidence) -> None:
    spreads = {
        "floor: noise alone": evidence.floor,
        "routes replayed": evidence.replay,
        "live routers": evidence.live,
        "routes shifted by a token": evidence.shifted,
    }
    for name, spread in spreads.items():
        if spread is not None:
            table.add_row(name, f"{spread.tokens:,}", f"{spread.mean:.1e}", f"{spread.worst:.1e}")


def _ranks(layout: Mapping[str, Any]) -> str:
    sizes = ", ".join(f"{name} {layout[name]}" for name in _SIZES if layout[name] > 1)
    return counted(layout["world_size"], "rank") + (f": {sizes}" if sizes else "")
