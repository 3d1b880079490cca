"""The released files of a distribution: from a git repository's objects, from what is installed, or from pip."""

import tempfile
from collections.abc import Sequence
from importlib.metadata import Distribution
from pathlib import Path

from r3_adapter.errors import PatchError
from r3_adapter.patch import installed
from r3_adapter.patch.git import Repo, read_blobs
from r3_adapter.patch.packages import released
from r3_adapter.patch.patchfile import Patch
from r3_adapter.patch.series import ABSENT, Contents, Series, digest, load_series
from r3_adapter.patch.wheels import download, wheel_files


def base_of(
    series: Series, patches: Sequence[Patch], repo: Repo | None = None, *, download: bool = True
) -> tuple[Contents, str]:
    """Return the released bytes of the files that patches change, by upstream path, and why some are not to be had.

    Each is known by the lock's hash, wherever it comes from: the repository's objects, what is installed, pip if it is
    to download.
    """
    wanted = {series.prefix + path: pin.before for path, pin in series.files.items() if pin.before != ABSENT}
    base: Contents = {}

    def keep(found: Contents) -> None:
        base.update({path: data for path, data in found.items() if digest(data) == wanted.get(path)})

    if repo:
        names = {diff.path: diff.blob for patch in reversed(patches) for diff in patch.diffs}
        blobs = read_blobs(repo, filter(None, names.values()))
        keep({path: blobs.get(names.get(path, "")) for path in wanted})
    if base.keys() < wanted.keys():
        keep({series.prefix + path: data for path, data in _installed_files(series).items()})
    if series.source and base.keys() < wanted.keys():
        return base, f"no registry has {series.version}, and here is no {series.source}: fetch that commit"
    if download and base.keys() < wanted.keys():
        try:
            keep(release_files(series.distribution, series.version, series.prefix, series.package))
        except PatchError as error:
            return base, str(error)
    missing = [path for path in wanted if path not in base]
    return base, f"not as the lock has them: {', '.join(missing)}" if missing else ""


def release_files(name: str, version: str, prefix: str, package: str) -> Contents:
    """Return all files that a release has beside or below its package, by upstream path, as they were released.

    prefix, package: as in the lock.

    Raises:
        PatchError: The version is not installed, and pip does not give its wheel.
    """
    top = package.partition("/")[0]
    found = installed.find(name, None)
    files = _as_installed(found, top) if found and found.version == version else None
    if files is None:
        files = _downloaded(name, version, top)
    return {prefix + path: data for path, data in sorted(files.items())}


def _installed_files(series: Series) -> Contents:
    """Return the released bytes of the installed files that a series touches, whatever version is installed."""
    pins = load_series(series.folder.parents[1])[series.distribution]
    status = installed.inspect(series.distribution, pins, None)
    if status.state in (installed.State.UNREADABLE, installed.State.EDITABLE):
        return {}
    return {path: data for path, data in released(status).items() if data is not None}


def _as_installed(found: Distribution, top: str) -> Contents | None:
    """Return the files of an installed distribution as released; None where they are not known to be that."""
    site = installed.site_of(found)
    pins = load_series().get(found.metadata["Name"].replace("_", "-").lower(), ())
    status = installed.inspect(found.name, pins, None)
    if status.state not in (installed.State.APPLIED, installed.State.NOT_APPLIED):
        return None
    paths = [str(path) for path in found.files or () if path.parts[0] == top and path.suffix != ".pyc"]
    contents = installed.read_files(site, paths) | released(status)
    return {path: data for path, data in contents.items() if data is not None}


def _downloaded(name: str, version: str, top: str) -> Contents:
    """Return the files of a wheel that pip downloads."""
    with tempfile.TemporaryDirectory(prefix="r3-patch-") as folder:
        return dict(wheel_files(download(name, version, Path(folder)), top, source=False))
