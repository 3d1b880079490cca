"""All that catches a break which is no conflict, in the order of how sure it is."""

import tempfile
from collections.abc import Callable
from pathlib import Path

from r3_adapter.patch.rebase.hooks import callers_of_changed, changed_hosts, changed_uses, moved_calls
from r3_adapter.patch.rebase.imports import undefined_names, unresolved_imports
from r3_adapter.patch.rebase.sides import Finding, Side, fresh
from r3_adapter.patch.rebase.traps import Trap, sprung
from r3_adapter.patch.rebase.types import type_errors
from r3_adapter.patch.rebase.uses import vanished_names

Tell = Callable[[str], None]


def find_breaks(pinned: Side, new: Side, traps: tuple[Trap, ...] = (), tell: Tell = lambda step: None) -> list[Finding]:
    """Return what is wrong with a series on a new release that is not wrong with it on the pinned one.

    tell: is called with what is looked at next.

    Raises:
        PatchError: mypy is not installed, or failed.
    """
    files = new.files()
    tell("names")
    found = fresh(
        undefined_names(new.folder, files),
        undefined_names(new.released, files),
        undefined_names(pinned.folder, files),
    )
    found += fresh(unresolved_imports(new), unresolved_imports(pinned))
    tell("types")
    found += _types(pinned, new)
    tell("uses")
    found += vanished_names(pinned, new)
    found += sprung(traps, pinned, new)
    tell("hooks")
    return found + moved_calls(pinned, new) + changed_hosts(pinned, new) + changed_uses(pinned, new)


def _types(pinned: Side, new: Side) -> list[Finding]:
    """Look at the touched files, and at those that call a function of which a patch changed the parameters."""
    files = [*new.files(), *callers_of_changed(new)]

    with tempfile.TemporaryDirectory(prefix="r3-mypy-") as cache:

        def run(side: Side, folder: Path) -> list[Finding]:
            return type_errors(folder / side.prefix, folder, files, Path(cache))

        return fresh(run(new, new.folder), run(new, new.released), run(pinned, pinned.folder))
