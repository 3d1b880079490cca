"""How an installed distribution stands to its patch series, told by the hash of each file alone.

A file is as released, as this series makes it, as another series made it that the record beside the distribution
(or the lock, for another version) knows of, or of somebody else: such a file is never changed or removed.
"""

import json
import shlex
import sysconfig
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from importlib.metadata import Distribution, distributions
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from r3_adapter.errors import PatchError, counted
from r3_adapter.patch.record import Note, Record, journal_path, read_record, record_path
from r3_adapter.patch.series import ABSENT, Contents, Hashes, Series, digest, far, is_release, read_patches
from r3_adapter.patch.threeway import fit, paths_of
from r3_adapter.patch.transaction import is_begun

_SHOWN = 3


class State(StrEnum):
    """How an installed distribution stands to its series."""

    APPLIED = "applied"
    NOT_APPLIED = "not applied"
    OTHER = "applied by another series"
    HALF = "half applied"
    LEFTOVER = "leftover"
    EDITED = "edited"
    EDITABLE = "editable install"
    NOT_INSTALLED = "not installed"
    NOT_PINNED = "version not pinned"
    UNREADABLE = "unreadable"


class Kind(StrEnum):
    """Whose the bytes of a file are."""

    RELEASED = "released"
    PATCHED = "patched"
    OTHER = "patched by another series"
    FOREIGN = "foreign"


@dataclass(frozen=True)
class Status:
    """What was found of a distribution.

    contents: the bytes of each file that is known of, by path in site-packages; None for no file.
    kinds: whose these bytes are.
    notes: what record and journal know of them.
    begun: whether a change of files was stopped on the way.
    reason: why it is unreadable, or which source an editable install is of.
    pins: the series that there are.
    """

    distribution: str
    state: State
    pinned: tuple[str, ...]
    installed: str = ""
    site: Path | None = None
    series: Series | None = None
    contents: Mapping[str, bytes | None] = field(default_factory=dict, repr=False)
    kinds: Mapping[str, Kind] = field(default_factory=dict, repr=False)
    notes: Mapping[str, Note] = field(default_factory=dict, repr=False)
    begun: bool = False
    reason: str = ""
    pins: Sequence[Series] = field(default=(), repr=False)

    @property
    def leftovers(self) -> list[str]:
        """The files that patches added and that do not go with the rest."""
        pins = self.series.files if self.series else {}
        ours = [path for path, kind in self.kinds.items() if kind in (Kind.PATCHED, Kind.OTHER)]
        return [path for path in ours if path not in pins] or ours


def inspect(name: str, pins: Sequence[Series], site: Path | None) -> Status:
    """Look at a distribution; what keeps it from being understood is in the result, so that others can still be."""
    versions = tuple(series.version for series in pins)
    try:
        return _inspect(name, pins, versions, site)
    except PatchError as error:
        return Status(name, State.UNREADABLE, versions, reason=str(error))


def explain(status: Status) -> str:
    """Say in one line what was found, which versions or files stop apply and revert, and what to do."""
    pinned = ", ".join(status.pinned) or "no version yet"
    if status.state is State.UNREADABLE:
        return status.reason
    if status.state is State.NOT_INSTALLED:
        said = f"{status.distribution}: not installed (patches are for {pinned})"
    else:
        said = f"{status.distribution} {status.installed}: {status.state}"
    if status.state is State.NOT_PINNED:
        said += f": installed {status.installed} != {pinned}, which the patches are for"
    elif status.state is State.HALF:
        said += f": stopped on the way; patched: {_listed(status, Kind.PATCHED, Kind.OTHER)}"
        said += f"; not patched: {_listed(status, Kind.RELEASED)}"
    elif status.state is State.LEFTOVER:
        said += f": a patch added {_some(status.leftovers)}, which reinstalling left there"
    elif status.state is State.EDITED:
        said += f": neither released nor patched by a known series: {_listed(status, Kind.FOREIGN)}"
    elif status.state is State.EDITABLE:
        said += f" of {status.reason}"
    todo = advice(status)
    return f"{said}; {todo}" if todo and status.state is not State.NOT_APPLIED else said


def advice(status: Status) -> str:
    """Say what to run next; nothing where all is well, or where nothing helps."""
    reinstall = f"`pip install --force-reinstall --no-deps {status.distribution}=={status.installed}`"
    match status.state:
        case State.NOT_APPLIED:
            return "`r3 patch apply` patches it"
        case State.OTHER:
            return "`r3 patch apply` brings it to this series, `r3 patch revert` to the release"
        case State.HALF:
            return "`r3 patch apply` completes it, `r3 patch revert` takes it back"
        case State.LEFTOVER:
            return "`r3 patch apply` patches it, `r3 patch revert` removes what was left"
        case State.EDITED:
            foreign = [path for path, kind in status.kinds.items() if kind is Kind.FOREIGN]
            added = [path for path in foreign if _pin(status, path).before == ABSENT]
            moves = [f"move {_some(added)} away"] if added else []
            edits = [f"undo the edit or reinstall it: {reinstall}"] if len(foreign) > len(added) else []
            return ", and ".join(moves + edits) + "; then `r3 patch apply`"
        case State.EDITABLE:
            folder = url2pathname(urlsplit(status.reason).path)
            return f"`r3 patch apply --source {shlex.quote(folder)}` patches its git tree"
        case State.NOT_PINNED | State.NOT_INSTALLED if status.leftovers:
            return f"earlier patches left {_some(status.leftovers)}: `r3 patch revert` removes them"
        case State.NOT_PINNED:
            return _nearest(status)
    return ""


def _nearest(status: Status) -> str:
    """Say which series is the nearest to an installed version that has none, and what makes one."""
    found = []
    for series in status.pins:
        patches = read_patches(series)
        paths = paths_of(patches)
        sites = read_files(status.site or Path(), [path.removeprefix(series.prefix) for path in paths])
        fitted = fit(patches, dict(zip(paths, sites.values(), strict=True)), {})
        found.append((fitted.hunks - fitted.fitting, far(status.installed, series.version), series.version, fitted))
    if not found:
        return ""
    _, _, version, fitted = min(found, key=lambda each: each[:2])
    # What no registry has must come from where it was installed from.
    wheel = "" if is_release(status.installed) else " --wheel FILE"
    command = f"`r3 patch rebase {status.distribution} {status.installed}{wheel}`"
    return f"the nearest series is that for {version}: {fitted}; {command} makes one"


def find(name: str, site: Path | None) -> Distribution | None:
    """Return the installed distribution that is imported; None where there is none."""
    found = list(distributions(name=name) if site is None else distributions(name=name, path=[str(site)]))
    # The first on the path is the one that is imported; two in one folder cannot be told apart.
    versions = {str(other.version) for other in found if site_of(other) == site_of(found[0])}
    if len(versions) > 1:
        raise PatchError(f"{name}: {site_of(found[0])} has the metadata of several versions: {sorted(versions)}")
    if versions == {"None"}:
        raise PatchError(
            f"{name}: its metadata in {site_of(found[0])} gives no version; remove that and install it again"
        )
    return found[0] if found else None


def site_of(installed: Distribution) -> Path:
    """Return the folder that a distribution's files are in."""
    return Path(str(installed.locate_file("")))


def read_files(site: Path, paths: Iterable[str]) -> Contents:
    """Return the bytes of files; None for those that are not there.

    Raises:
        PatchError: One cannot be read, or is a link to nothing, which is not ours to replace.
    """
    contents: Contents = {}
    for path in paths:
        try:
            contents[path] = (site / path).read_bytes()
        except (FileNotFoundError, NotADirectoryError) as error:
            if (site / path).is_symlink():
                raise PatchError(f"{site / path}: a link to a file that does not exist") from error
            contents[path] = None
        except OSError as error:
            raise PatchError(f"{site / path}: cannot be read: {error.strerror}") from error
    return contents


def _inspect(name: str, pins: Sequence[Series], versions: tuple[str, ...], site: Path | None) -> Status:
    installed = find(name, site)
    version = installed.version if installed else ""
    place = site_of(installed) if installed else site or Path(sysconfig.get_path("purelib"))
    series = next((series for series in pins if series.version == version), None)
    source = _editable(installed) if installed and pins and not (place / pins[0].package).is_dir() else ""
    if source:
        return Status(name, State.EDITABLE, versions, version, place, series, reason=source)
    records = [
        record
        for path in (record_path(place, name), journal_path(place, name))
        if pins and (record := read_record(path, pins[0].package))
    ]
    notes = _notes(records, pins, version, installed)
    contents = read_files(place, sorted({*(series.files if series else ()), *notes}))
    kinds = {
        path: kind
        for path, data in contents.items()
        if (kind := _kind(digest(data), series.files.get(path) if series else None, notes.get(path)))
    }
    contents = {path: contents[path] for path in kinds}
    state = State.NOT_PINNED if installed else State.NOT_INSTALLED
    begun = is_begun(journal_path(place, name))
    if series:
        recorded = next((record.files for record in records if record.version == version), {})
        state = _state(series.files, kinds, recorded, begun)
    return Status(name, state, versions, version, place, series, contents, kinds, notes, begun, pins=pins)


def _notes(
    records: Sequence[Record], pins: Sequence[Series], version: str, installed: Distribution | None
) -> dict[str, Note]:
    """Return what is known beyond the lock of this version: of another version only the files that its patches add."""
    known: list[tuple[str, Note]] = []
    for record in records:
        same = record.version == version
        known += [(path, note) for path, note in record.files.items() if same or note.released is None]
    for series in (series for series in pins if series.version != version):
        added = [(path, pin) for path, pin in series.files.items() if pin.before == ABSENT]
        known += [(path, Note(None, frozenset({pin.after}))) for path, pin in added]
    notes: dict[str, Note] = {}
    for path, note in known:
        other = notes.get(path, note)
        notes[path] = Note(other.released if note.released is None else note.released, note.ours | other.ours)
    # A release may have a file now that an earlier one's patches added: then it is the release's.
    shipped = {str(file) for file in installed.files or ()} if installed and notes else set()
    return {path: note for path, note in notes.items() if note.released is not None or path not in shipped}


def _kind(found: str, pin: Hashes | None, note: Note | None) -> Kind | None:
    """Say whose a file is; None for one that no patch of this version touches and that is not ours."""
    before = pin.before if pin else digest(note.released) if note else ABSENT
    if found == before:
        return Kind.RELEASED
    if pin and found == pin.after:
        return Kind.PATCHED
    if note and found in note.ours and digest(note.released) == before:
        return Kind.OTHER
    return None if pin is None and before == ABSENT else Kind.FOREIGN


def _state(pins: Mapping[str, Hashes], kinds: Mapping[str, Kind], recorded: Mapping[str, Note], begun: bool) -> State:
    changed = {path for path, kind in kinds.items() if kind is not Kind.RELEASED}
    added = {path for path in changed if path not in pins or pins[path].before == ABSENT}
    if Kind.FOREIGN in kinds.values():
        return State.EDITED
    if begun:
        return State.HALF
    if not changed:
        return State.NOT_APPLIED
    if changed == pins.keys() and all(kinds[path] is Kind.PATCHED for path in pins):
        return State.APPLIED
    if recorded and changed == recorded.keys():
        return State.OTHER
    if changed == added or (pins.keys() <= changed and all(kinds[path] is Kind.PATCHED for path in pins)):
        return State.LEFTOVER
    return State.HALF


def _editable(installed: Distribution) -> str:
    """Return the address of the source that an editable install points to; nothing for another install."""
    try:
        origin = json.loads(installed.read_text("direct_url.json") or "{}")
        return str(origin["url"]) if origin["dir_info"]["editable"] else ""
    except (ValueError, KeyError, TypeError):
        return ""


def _pin(status: Status, path: str) -> Hashes:
    pins = status.series.files if status.series else {}
    note = status.notes.get(path)
    return pins.get(path) or Hashes(digest(note.released if note else None), "unknown")


def _listed(status: Status, *kinds: Kind) -> str:
    return _some([path for path, kind in status.kinds.items() if kind in kinds]) or "none"


def _some(paths: Sequence[str]) -> str:
    """Name files as far as a line is read."""
    more = len(paths) - _SHOWN
    return ", ".join(paths[:_SHOWN]) + (f" and {counted(more, 'other')}" if more > 0 else "")
