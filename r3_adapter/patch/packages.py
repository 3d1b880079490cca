"""Apply, revert and verify the patch series on installed packages.

A file is changed only when its hash is one that the lock or the record of what was applied pins; all results are
computed and checked in memory before the first byte is written.
"""

import re
from base64 import urlsafe_b64encode
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.metadata import Distribution
from pathlib import Path

from r3_adapter.errors import PatchError
from r3_adapter.patch.installed import Kind, State, Status, advice, explain, find, inspect, read_files, site_of
from r3_adapter.patch.record import Note, Record, journal_path, record_path
from r3_adapter.patch.series import (
    LOCK_NAME,
    Contents,
    Hashes,
    Series,
    digest,
    load_series,
    make_series,
    patched,
    patches_root,
    read_lock,
    read_patches,
    touched,
    unlisted,
    unpatched,
    upstream_tests,
    write_lock,
)
from r3_adapter.patch.transaction import Change, commit, exclusive, journal, lock_path

__all__ = ["Outcome", "State", "Status", "advice", "apply", "each", "explain", "lock", "revert", "status"]

# The states that a distribution can be brought to either end from; the others are somebody else's doing.
MOVABLE = (State.APPLIED, State.NOT_APPLIED, State.OTHER, State.HALF, State.LEFTOVER)


@dataclass(frozen=True)
class Outcome:
    """What apply or revert did to a distribution; no changed files when nothing was to be done."""

    distribution: str
    version: str
    changed: tuple[str, ...]


def status(names: Sequence[str] = (), *, site: Path | None = None, root: Path | None = None) -> list[Status]:
    """Look at the named distributions, by default at all that have a series.

    site: the site-packages folder to look in; None for this interpreter's.
    root: the folder of the series; None for the ones that this package ships.
    """
    pins = load_series(root or patches_root())
    wanted = dict.fromkeys(_canonical(name) for name in names) or pins
    for name in wanted:
        _check_known(pins, name)
    if site is not None and not site.is_dir():
        raise PatchError(f"{site}: not a folder")
    return [inspect(name, pins[name], site) for name in wanted]


def apply(names: Sequence[str] = (), *, site: Path | None = None, root: Path | None = None) -> list[Outcome]:
    """Patch the named distributions, by default all pinned ones that are installed: all of them or none.

    One that another series patched, or that an interrupted run left half patched, is brought to this series. Files that
    earlier patches added and a new installation left are taken away.

    Raises:
        PatchError: One is missing, of a version without a series, or has a file of somebody else's; nothing is changed.
    """
    return _move(State.APPLIED, names, site, root)


def revert(names: Sequence[str] = (), *, site: Path | None = None, root: Path | None = None) -> list[Outcome]:
    """Restore the released bytes: the exact inverse of apply, with the same refusals.

    Where no version is installed that the patches are for, what earlier ones left is taken away.
    """
    return _move(State.NOT_APPLIED, names, site, root)


def each(
    move: Callable[..., list[Outcome]], names: Sequence[str] = (), *, site: Path | None = None
) -> tuple[list[Outcome], list[PatchError]]:
    """Apply or revert one distribution after the other, so that one's refusal does not keep the others from it."""
    goal = State.APPLIED if move is apply else State.NOT_APPLIED
    outcomes: list[Outcome] = []
    refusals: list[PatchError] = []
    for chosen in _choose(goal, names, site, None):
        try:
            outcomes += move([chosen.distribution], site=site)
        except PatchError as error:
            refusals.append(error)
    return outcomes, refusals


def lock(name: str, version: str, *, site: Path | None = None, root: Path | None = None) -> Series:
    """Recompute the lock of a series from a pristine installation, and write it.

    Raises:
        PatchError: A touched file is not as its wheel recorded it, or the series itself is not in order.
    """
    root, name = root or patches_root(), _canonical(name)
    tables = read_lock(root)
    _check_known(tables, name)
    installed = find(name, site)
    if installed is None or installed.version != version:
        found = "none" if installed is None else installed.version
        raise PatchError(f"{name}: installed version ({found}) != version to lock ({version})")
    series = make_series(root, name, version, {**tables[name], "versions": {}})
    patches, stray = read_patches(series), unlisted(series.folder.parent)
    if stray:
        raise PatchError(f"{name}: no series lists {', '.join(map(str, stray))}")
    before = read_files(site_of(installed), touched(series, patches))
    _check_pristine(installed, before)
    after = patched(series, patches, before)
    upstream_tests(series, patches)
    files = {path: Hashes(digest(before[path]), digest(after[path])) for path in before}
    same = [path for path, pin in files.items() if pin.before == pin.after]
    if same or not files:
        raise PatchError(f"{name} {version}: the whole series leaves as it was: {', '.join(same) or series.package}")
    tables[name]["versions"][version] = {p: {"before": h.before, "after": h.after} for p, h in files.items()}
    write_lock(root, tables)
    return replace(series, files=files)


@dataclass(frozen=True)
class _Plan:
    """What is to be done to a distribution: its files and its record, and what the journal says meanwhile."""

    changes: Sequence[Change] = ()
    journal: tuple[Path, bytes] | None = None


def _move(goal: State, names: Sequence[str], site: Path | None, root: Path | None) -> list[Outcome]:
    """Bring distributions to a state."""
    chosen = _choose(goal, names, site, root)
    if all(_is_done(status, goal) and not lock_path(_site(status)).exists() for status in chosen):
        # No lock needed, so this also works where one may not write, as in an image that was built patched.
        return [Outcome(status.distribution, status.installed, ()) for status in chosen]
    with ExitStack() as stack:
        for folder in sorted({status.site for status in chosen if status.site}):
            stack.enter_context(exclusive(folder))
        chosen = _choose(goal, names, site, root)
        plans = [_plan(status, goal) for status in chosen]
        for plan in plans:
            if plan.journal:
                stack.enter_context(journal(*plan.journal, plan.changes))
        commit([change for plan in plans for change in plan.changes])
    return [
        Outcome(status.distribution, status.installed, _changed(status, plan))
        for status, plan in zip(chosen, plans, strict=True)
    ]


def _changed(status: Status, plan: _Plan) -> tuple[str, ...]:
    paths = {_site(status) / path for path in status.contents}
    return tuple(str(change.path) for change in plan.changes if change.old != change.new and change.path in paths)


def _choose(goal: State, names: Sequence[str], site: Path | None, root: Path | None) -> list[Status]:
    """Return the named distributions; by default those that are installed, or of which something is left to revert."""
    found = status(names, site=site, root=root)
    missing = State.NOT_INSTALLED
    chosen = [status for status in found if names or status.state is not missing or _is_litter(status, goal)]
    if not chosen:
        raise PatchError("; ".join(explain(status) for status in found) or "no distribution has a series")
    return chosen


def _is_litter(status: Status, goal: State) -> bool:
    """Say whether revert can take something away although no version is there that the patches are for."""
    gone = status.state in (State.NOT_INSTALLED, State.NOT_PINNED) and goal is State.NOT_APPLIED
    return gone and (status.begun or bool(status.leftovers) or _record(status).exists())


def _is_done(status: Status, goal: State) -> bool:
    return status.state is goal and (goal is State.APPLIED or not _record(status).exists())


def _plan(status: Status, goal: State) -> _Plan:
    """Compute and check the new bytes of a distribution's files; nothing for one that is as it should be."""
    if _is_done(status, goal):
        return _Plan()
    if status.state not in MOVABLE and not _is_litter(status, goal):
        raise PatchError(explain(status))
    series, pins = status.series, status.series.files if status.series else {}
    result = known = released(status)
    if series and goal is State.APPLIED:
        result = known | patched(series, read_patches(series), {path: known[path] for path in pins})
    for path, pin in pins.items():
        want, have = pin.after if goal is State.APPLIED else pin.before, digest(result[path])
        if have != want:
            raise PatchError(f"{status.distribution} {status.installed}: {path}: result {have} != {want} of the lock")
    changes = [Change(_site(status) / path, data, result[path]) for path, data in status.contents.items()]
    for path in status.contents:
        _check_inside(_site(status), path)
    # The record comes last: as long as a file is as another series made it, that series' record is there.
    record = _record(status)
    old = read_files(record.parent, [record.name])[record.name]
    after = {path: Note(known[path], frozenset({pin.after})) for path, pin in pins.items()}
    new = Record(status.installed, after).to_bytes() if goal is State.APPLIED else None
    changes.append(Change(record, old, new))
    return _Plan(changes, (journal_path(_site(status), status.distribution), _on_the_way(status, known).to_bytes()))


def released(status: Status) -> Contents:
    """Return the released bytes of all files: what others than this series did is in their record."""
    contents, series = dict(status.contents), status.series
    if series:
        contents |= unpatched(series, read_patches(series), {path: contents[path] for path in series.files})
    others = [path for path, kind in status.kinds.items() if kind is Kind.OTHER]
    return contents | {path: status.notes[path].released for path in others}


def _on_the_way(status: Status, released: Contents) -> Record:
    """Return what may be found if the change is stopped: the released bytes, what is there now, what is to be."""
    notes = {}
    for path, data in released.items():
        ours = {digest(status.contents[path])}
        if status.series and path in status.series.files:
            ours.add(status.series.files[path].after)
        if path in status.notes:
            ours |= status.notes[path].ours
        notes[path] = Note(data, frozenset(ours - {digest(data)}))
    return Record(status.installed, notes)


def _site(status: Status) -> Path:
    assert status.site is not None
    return status.site


def _record(status: Status) -> Path:
    return record_path(_site(status), status.distribution)


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _check_known(tables: Mapping[str, object], name: str) -> None:
    if name not in tables:
        raise PatchError(f"{name}: no such distribution in {LOCK_NAME}, only {', '.join(tables)}")


def _check_inside(site: Path, path: str) -> None:
    """Refuse to write through a linked folder; a linked file is replaced, but a folder's files lie elsewhere."""
    folder = (site / path).parent.resolve()
    if not folder.is_relative_to(site.resolve()):
        raise PatchError(f"{site / path}: its folder is really {folder}, outside of {site}; install a copy instead")


def _check_pristine(installed: Distribution, contents: Contents) -> None:
    """Compare files with the hashes that the wheel's RECORD holds; what a patch creates must not be there."""
    record = {str(file): file.hash for file in installed.files or ()}
    for path, data in contents.items():
        entry = record.get(path)
        want = None if entry is None or entry.mode != "sha256" else entry.value
        have = None if data is None else urlsafe_b64encode(bytes.fromhex(digest(data))).rstrip(b"=").decode()
        if have != want:
            raise PatchError(f"{path}: not as released: sha256 {have} != {want} in RECORD (None: no file)")
