"""Bring a series to another release: merge it, look for what breaks without a conflict, run its tests, write it."""

import shutil
from dataclasses import dataclass, field
from pathlib import Path

from packaging.version import Version

from r3_adapter.errors import PatchError
from r3_adapter.patch.git import Repo, open_repo
from r3_adapter.patch.rebase.breaks import Tell, find_breaks
from r3_adapter.patch.rebase.sides import Finding, make_side
from r3_adapter.patch.rebase.traps import read_traps
from r3_adapter.patch.rebase.tree import (
    as_patched,
    changed_files,
    commit_files,
    commit_series,
    leave_to_mend,
    open_tree,
    package_files,
    patch_of,
    plant_release,
    released_files,
)
from r3_adapter.patch.rebase.unit_tests import run_unit_tests
from r3_adapter.patch.release import release_files
from r3_adapter.patch.series import Contents, Series, digest, load_series, read_patches
from r3_adapter.patch.threeway import Conflict, Fit, fit, paths_of
from r3_adapter.patch.wheels import NEWEST, checked_version, download, version_of, wheel_files


@dataclass(frozen=True)
class Request:
    """What is asked for.

    version: of the release, or NEWEST. origin: the pinned version whose series is taken; None for the nearest one.
    wheel, origin_wheel: files in place of what the registry or this environment has.
    source: a git tree whose HEAD is the version, which no registry has.
    tree: where the tree is, or is to be. python: has the release installed, for the unit tests.
    """

    distribution: str
    version: str
    origin: str | None = None
    wheel: Path | None = None
    source: Path | None = None
    origin_wheel: Path | None = None
    tree: Path | None = None
    python: Path | None = None
    root: Path | None = None


@dataclass
class Outcome:
    """What came of it.

    origin: the series that was taken. hunks: how many it has in files that upstream has.
    conflicts: hunks that did not fit. stopped: whether the tree waits for a maintainer.
    tests: what the unit tests said last; None where they did not run. passed: whether they passed.
    """

    distribution: str
    version: str
    origin: Series
    pinned: bool
    hunks: int = 0
    conflicts: list[Conflict] = field(default_factory=list)
    stopped: bool = False
    findings: list[tuple[Finding, str]] = field(default_factory=list)
    tests: str | None = None
    passed: bool = True

    @property
    def breaks(self) -> list[tuple[Finding, str]]:
        """The findings with which the patched engine would fail or do something else."""
        return [each for each in self.findings if each[0].breaks]

    @property
    def clean(self) -> bool:
        """Whether nothing is wrong, as far as was looked."""
        return not (self.stopped or self.breaks) and self.passed

    @property
    def state(self) -> str:
        """The outcome as the table has it."""
        source = "" if self.pinned else f" of the series for {self.origin.version}"
        if self.stopped:
            more = f"; breaks in what fits: {len(self.breaks)}" if self.breaks else ""
            return f"conflicts: {len(self.conflicts)} of {self.hunks} hunks{source}{more}"
        if self.breaks:
            return f"breaks: {len(self.breaks)}{source}"
        return "pinned" if self.pinned else f"clean: {self.hunks} of {self.hunks} hunks{source}"


def rebase(request: Request, work: Path, tell: Tell) -> tuple[Outcome, Repo, Contents]:
    """Merge a series into a release and look at what comes of it; return that, the tree and the release's files.

    work: an empty folder for what is needed meanwhile; the tree is there if the request names none.
    tell: is called with what is done next.

    Raises:
        PatchError: What is asked for is not to be had.
    """
    pins = load_series(request.root).get(request.distribution)
    if not pins:
        raise PatchError(f"{request.distribution}: no such distribution, only {', '.join(load_series(request.root))}")
    place = request.tree or work / "tree"
    source = ""
    if request.source and request.wheel:
        raise PatchError(f"--source {request.source} and --wheel {request.wheel} exclude each other")
    if place.exists():
        version = checked_version(request.version)
        repo = open_tree(place, request.distribution, version)
        released = released_files(repo)
    elif request.source:
        version, released, source = commit_files(request.source, pins[0], request.version)
    else:
        tell(f"the release {request.distribution} {request.version}")
        version, released = _release(request, pins[0], work)
    series, near = _series(request, pins, version, released)
    outcome = Outcome(request.distribution, version, series, any(pin.version == version for pin in pins), near.hunks)
    base = released if series.version == version else _origin(request, series, tell)
    if not place.exists():
        repo = plant_release(place, series, version, released, source)
        tell(f"the series for {series.version}")
        found = fit(read_patches(series), _wanted(series, released), _wanted(series, base))
        outcome.conflicts = found.conflicts
        if not found.conflicts:
            commit_series(repo, series, found)
        elif not leave_to_mend(repo, series, found, base):
            outcome.stopped = True
            fitting = {path: data for _, step in found.steps for path, data in step.items()}
            outcome.findings = [(each, "") for each in _look(outcome, released, fitting, base, work, tell)]
            return outcome, repo, released
    if series.version != version or request.tree:
        found_there = _look(outcome, released, changed_files(repo), base, work, tell)
        outcome.findings = [(each, patch_of(repo, each.path, each.line) if each.line else "") for each in found_there]
    if request.python:
        tell("the series' unit tests")
        tested = run_unit_tests(request.python, series, version, changed_files(repo), work / "tests")
        outcome.passed, outcome.tests = tested
    return outcome, repo, released


def _look(
    outcome: Outcome, released: Contents, changed: Contents, base: Contents, work: Path, tell: Tell
) -> list[Finding]:
    """Return what breaks without a conflict.

    changed: what the series makes of the new release, as far as it fits. base: the release that the series is for.
    """
    series, root = outcome.origin, outcome.origin.folder.parents[1]
    pinned = make_side(work / "pinned", series, series.version, base, as_patched(read_patches(series), base))
    new = make_side(work / "new", series, outcome.version, released, changed)
    return find_breaks(pinned, new, read_traps(root, outcome.distribution), tell)


def nearest(pins: tuple[Series, ...], version: str, files: Contents) -> tuple[Series, Fit]:
    """Return the pinned series of which the fewest hunks are a conflict, and how it fits.

    files: those of the release, by upstream path. This version's own comes first; of equals, one that is before it.
    """
    wanted = Version(version)
    order = sorted(pins, key=lambda pin: Version(pin.version), reverse=True)
    order.sort(key=lambda pin: Version(pin.version) > wanted)
    fits = [(pin, fit(read_patches(pin), _wanted(pin, files), {})) for pin in order]
    exact = [each for each in fits if each[0].version == version]
    return exact[0] if exact else min(fits, key=lambda each: len(each[1].conflicts))


def keep_tree(repo: Repo, place: Path) -> Path:
    """Move a tree to where a maintainer finds it."""
    if place.exists():
        raise PatchError(f"{place}: is there already; name another place with --tree, or remove it")
    shutil.move(repo.top, place)
    return place


def _release(request: Request, pin: Series, work: Path) -> tuple[str, Contents]:
    if request.wheel:
        wheel = request.wheel
    else:
        (work / "wheel").mkdir()
        wheel = download(request.distribution, request.version, work / "wheel")
    version = version_of(wheel, request.distribution)
    if request.version not in (NEWEST, version) and Version(request.version) != Version(version):
        raise PatchError(f"{wheel}: version {version} != {request.version}")
    return version, {pin.prefix + path: data for path, data in wheel_files(wheel, pin.package).items()}


def _series(request: Request, pins: tuple[Series, ...], version: str, released: Contents) -> tuple[Series, Fit]:
    if request.origin is None:
        # What is looked for needs all files of the version that a series is for.
        there = [pin.version == version or not pin.source or _has(request.source, pin) for pin in pins]
        return nearest(tuple(pin for pin, has in zip(pins, there, strict=True) if has), version, released)
    found = tuple(pin for pin in pins if pin.version == request.origin)
    if not found:
        raise PatchError(f"--from {request.origin}: none of {', '.join(pin.version for pin in pins)}")
    return nearest(found, version, released)


def _has(source: Path | None, series: Series) -> bool:
    """Say whether a git tree has the commit that a version is which no registry has."""
    return (
        source is not None
        and open_repo(source).says("cat-file", "-e", f"{series.source.split()[1]}^{{tree}}") is not None
    )


def _origin(request: Request, series: Series, tell: Tell) -> Contents:
    """Return the source files of the release that a series is for; those that it touches are known by the lock."""
    tell(f"the release {series.distribution} {series.version}")
    if request.origin_wheel:
        if (found := version_of(request.origin_wheel, series.distribution)) != series.version:
            raise PatchError(f"{request.origin_wheel}: version {found} != {series.version}, which the series is for")
        files: Contents = {
            series.prefix + path: data for path, data in wheel_files(request.origin_wheel, series.package).items()
        }
    elif request.source and series.source and _has(request.source, series):
        repo = open_repo(request.source)
        files = package_files(repo, series.source.split()[1], series)
    elif series.source:
        raise PatchError(
            f"no registry has {series.version}, it is {series.source}: give a wheel of it, --from-wheel FILE, or fetch "
            "that commit into the tree of --source"
        )
    else:
        files = release_files(series.distribution, series.version, series.prefix, series.package)
    package = f"{series.prefix}{series.package}/"
    files = {path: data for path, data in files.items() if path.startswith(package) and path.endswith((".py", ".pyi"))}
    for path, pin in series.files.items():
        have = digest(files.get(series.prefix + path))
        if have != pin.before:
            raise PatchError(f"{series.distribution} {series.version}: {path}: {have} != {pin.before} of the lock")
    return files


def _wanted(series: Series, files: Contents) -> Contents:
    return {path: files.get(path) for path in paths_of(read_patches(series))}
