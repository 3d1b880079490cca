"""Apply, revert and verify the patch series on installed packages.

A file is read further only when its hash is one that the lock pins; all results are computed and checked in memory
before the first byte is written.
"""

import re
from base64 import urlsafe_b64encode
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from enum import StrEnum
from importlib.metadata import Distribution, distributions
from pathlib import Path

from r3_adapter.errors import PatchError
from r3_adapter.series import (
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
    unpatched,
    upstream_tests,
    write_lock,
)
from r3_adapter.transaction import Change, commit, exclusive


class State(StrEnum):
    """How an installed distribution stands to its series."""

    APPLIED = "applied"
    NOT_APPLIED = "not applied"
    MIXED = "mixed"
    EDITED = "edited"
    NOT_INSTALLED = "not installed"
    NOT_PINNED = "version not pinned"


@dataclass(frozen=True)
class Status:
    """What was found of a distribution; contents are the touched files' bytes, None for no file."""

    distribution: str
    state: State
    pinned: tuple[str, ...]
    installed: str = ""
    site: Path | None = None
    series: Series | None = None
    contents: Mapping[str, bytes | None] = field(default_factory=dict, repr=False)


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
    return [_inspect(name, pins[name], site) for name in wanted]


def apply(names: Sequence[str] = (), *, site: Path | None = None, root: Path | None = None) -> list[Outcome]:
    """Patch the named distributions, by default all pinned ones that are installed: all of them or none.

    Raises:
        PatchError: One is missing, of a version without a series, edited or half patched; nothing is changed.
    """
    return _move(State.APPLIED, names, site, root)


def revert(names: Sequence[str] = (), *, site: Path | None = None, root: Path | None = None) -> list[Outcome]:
    """Restore the released bytes: the exact inverse of apply, with the same refusals."""
    return _move(State.NOT_APPLIED, names, site, root)


def lock(name: str, version: str, *, site: Path | None = None, root: Path | None = None) -> Series:
    """Recompute the lock of a series from a pristine installation, and write it.

    Raises:
        PatchError: A touched file is not as its wheel recorded it, or the series itself is not in order.
    """
    root, name = root or patches_root(), _canonical(name)
    tables = read_lock(root)
    _check_known(tables, name)
    installed = _find(name, site)
    if installed is None or installed.version != version:
        found = "none" if installed is None else installed.version
        raise PatchError(f"{name}: installed version ({found}) != version to lock ({version})")
    series = make_series(root, name, version, {**tables[name], "versions": {}})
    patches = read_patches(series)
    before = _read(_site_of(installed), touched(series, patches))
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


def explain(status: Status) -> str:
    """Say what was found and, where that stops apply and revert, which versions or files do."""
    pinned = ", ".join(status.pinned) or "no version yet"
    if status.state is State.NOT_INSTALLED:
        return f"{status.distribution}: not installed (patches are for {pinned})"
    head = f"{status.distribution} {status.installed}: {status.state}"
    if status.state is State.NOT_PINNED:
        return f"{head}: installed {status.installed} != {pinned}, which the patches are for"
    if status.series is None or status.state in (State.APPLIED, State.NOT_APPLIED):
        return head
    found = {path: digest(data) for path, data in status.contents.items()}
    pins = status.series.files
    if status.state is State.MIXED:
        new = ", ".join(path for path in pins if found[path] == pins[path].after)
        old = ", ".join(path for path in pins if found[path] == pins[path].before)
        return f"{head}: only some files are patched; reinstall it\n  patched: {new}\n  not patched: {old}"
    edits = [
        f"\n  {path}: sha256 {found[path]} != {pin.before} (released), != {pin.after} (patched)"
        for path, pin in pins.items()
        if found[path] not in (pin.before, pin.after)
    ]
    return f"{head}: neither released nor patched by this series; undo the edit or reinstall it{''.join(edits)}"


def _move(goal: State, names: Sequence[str], site: Path | None, root: Path | None) -> list[Outcome]:
    """Bring distributions to a state."""
    chosen = _choose(names, site, root)
    if all(status.state is goal for status in chosen):
        # No lock needed, so this also works where one may not write, as in an image that was built patched.
        return [Outcome(status.distribution, status.installed, ()) for status in chosen]
    with ExitStack() as stack:
        for folder in sorted({status.site for status in chosen if status.site}):
            stack.enter_context(exclusive(folder))
        chosen = _choose(names, site, root)
        plans = [_plan(status, goal) for status in chosen]
        commit([change for plan in plans for change in plan])
    return [
        Outcome(status.distribution, status.installed, tuple(str(change.path) for change in plan))
        for status, plan in zip(chosen, plans, strict=True)
    ]


def _choose(names: Sequence[str], site: Path | None, root: Path | None) -> list[Status]:
    found = status(names, site=site, root=root)
    chosen = found if names else [status for status in found if status.state is not State.NOT_INSTALLED]
    if not chosen:
        raise PatchError("; ".join(explain(status) for status in found) or "no distribution has a series")
    return chosen


def _inspect(name: str, pins: Sequence[Series], site: Path | None) -> Status:
    versions = tuple(series.version for series in pins)
    installed = _find(name, site)
    if installed is None:
        return Status(name, State.NOT_INSTALLED, versions)
    place, version = _site_of(installed), installed.version
    series = next((series for series in pins if series.version == version), None)
    if series is None:
        return Status(name, State.NOT_PINNED, versions, version, place)
    contents = _read(place, series.files)
    return Status(name, _state(series, contents), versions, version, place, series, contents)


def _state(series: Series, contents: Contents) -> State:
    found = [(digest(contents[path]), pin) for path, pin in series.files.items()]
    if any(have not in (pin.before, pin.after) for have, pin in found):
        return State.EDITED
    if all(have == pin.before for have, pin in found):
        return State.NOT_APPLIED
    return State.APPLIED if all(have == pin.after for have, pin in found) else State.MIXED


def _plan(status: Status, goal: State) -> list[Change]:
    """Compute and check the new bytes of a distribution's files; nothing for one that is as it should be."""
    if status.state is goal:
        return []
    if status.state not in (State.APPLIED, State.NOT_APPLIED) or status.series is None or status.site is None:
        raise PatchError(explain(status))
    patches = read_patches(status.series)
    change = patched if goal is State.APPLIED else unpatched
    result = change(status.series, patches, status.contents)
    for path, pin in status.series.files.items():
        want, have = pin.after if goal is State.APPLIED else pin.before, digest(result[path])
        if have != want:
            raise PatchError(f"{status.distribution} {status.installed}: {path}: result {have} != {want} of the lock")
        _check_inside(status.site, path)
    return [Change(status.site / path, status.contents[path], result[path]) for path in status.series.files]


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _check_known(tables: Mapping[str, object], name: str) -> None:
    if name not in tables:
        raise PatchError(f"{name}: no such distribution in {LOCK_NAME}, only {', '.join(tables)}")


def _find(name: str, site: Path | None) -> Distribution | None:
    if site is not None and not site.is_dir():
        raise PatchError(f"{site}: not a folder")
    found = list(distributions(name=name) if site is None else distributions(name=name, path=[str(site)]))
    # The first on the path is the one that is imported; two in one folder cannot be told apart.
    versions = {other.version for other in found if _site_of(other) == _site_of(found[0])}
    if len(versions) > 1:
        raise PatchError(f"{name}: {_site_of(found[0])} has the metadata of several versions: {sorted(versions)}")
    return found[0] if found else None


def _site_of(installed: Distribution) -> Path:
    return Path(str(installed.locate_file("")))


def _read(site: Path, paths: Iterable[str]) -> Contents:
    contents: Contents = {}
    for path in paths:
        try:
            contents[path] = (site / path).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            contents[path] = None
        except OSError as error:
            raise PatchError(f"{site / path}: cannot be read: {error.strerror}") from error
    return contents


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
