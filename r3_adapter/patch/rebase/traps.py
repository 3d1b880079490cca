"""Names of the engine's that mean something else from a release on: nothing breaks, and the result is wrong.

`patches/traps.toml` has them by distribution. Lines of the series that read such a name are breaks where the series
comes from an older release, unless the function that they are in also reads what tells both meanings apart.
"""

import ast
import tomllib
from dataclasses import dataclass
from pathlib import Path

from packaging.version import Version

from r3_adapter.errors import PatchError
from r3_adapter.patch.rebase.sides import Finding, Side, parsed

TRAPS = "traps.toml"


@dataclass(frozen=True)
class Trap:
    """A name that means something else since a version.

    unless: names of which one in the same function says that both meanings are known there.
    """

    name: str
    since: str
    says: str
    unless: frozenset[str]


def read_traps(root: Path, distribution: str) -> tuple[Trap, ...]:
    """Return the traps of a distribution.

    Raises:
        PatchError: The file is malformed.
    """
    path = root / TRAPS
    if not path.exists():
        return ()
    try:
        entries = tomllib.loads(path.read_text(encoding="utf-8")).get(distribution, [])
        traps = [Trap(each["name"], each["since"], each["says"], frozenset(each["unless"])) for each in entries]
        for trap in traps:
            Version(trap.since)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PatchError(f"{path}: malformed: {error!r}") from error
    return tuple(traps)


def sprung(traps: tuple[Trap, ...], pinned: Side, new: Side) -> list[Finding]:
    """Return where lines of the series read a name that came to mean something else between the two releases."""
    between = [trap for trap in traps if Version(pinned.version) < Version(trap.since) <= Version(new.version)]
    found = set()
    for path in new.sources():
        tree = parsed(new.folder / path)
        for node in _scopes(tree) if tree and between else ():
            reads = {each.attr for each in ast.walk(node) if isinstance(each, ast.Attribute)}
            reads |= {str(each.value) for each in ast.walk(node) if isinstance(each, ast.Constant)}
            for trap in between:
                if trap.name in reads and not trap.unless & reads:
                    found |= _places(node, path, trap, new)
    return sorted(found)


def _scopes(tree: ast.Module) -> list[ast.stmt]:
    """Return the outermost functions, of classes too."""
    nodes = [node for each in tree.body for node in (each.body if isinstance(each, ast.ClassDef) else [each])]
    return [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def _places(node: ast.stmt, path: str, trap: Trap, side: Side) -> set[Finding]:
    lines = {each.lineno for each in ast.walk(node) if isinstance(each, ast.Attribute) and each.attr == trap.name}
    text = f"reads {trap.name}; since {trap.since} {trap.says}"
    return {Finding(path, line, "traps", text) for line in lines & side.ours[path]}
