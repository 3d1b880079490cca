"""Apply, revert and verify the patch series on a git tree of an engine: its source, or an editable install of it.

The patches become commits on top of what is checked out, three-way merged; `git log` shows them, by a trailer they are
known again. All is made and checked before the branch is moved, once.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from r3_adapter.errors import PatchError
from r3_adapter.patch.commits import Ours, find_ours, is_of, on_top, take_back
from r3_adapter.patch.git import Repo, Stack, check_quiet, commits_on, dirty, open_repo, read_tree
from r3_adapter.patch.gittree import commit_steps
from r3_adapter.patch.moving import mend, move, was_stopped
from r3_adapter.patch.patchfile import Patch
from r3_adapter.patch.release import base_of
from r3_adapter.patch.series import Contents, Series, far, is_release, load_series, parsed_version, read_patches
from r3_adapter.patch.threeway import Fit, fit, paths_of, show
from r3_adapter.patch.transaction import exclusive

# Where a tree says its version; only that of a tag or of a build is in SGLang's.
_VERSIONS = ("_version.py", "version.py", "package_info.py")
_VERSION = re.compile(r"^(?:__version__ = )?(?:__version__|version) = ['\"](\d[^'\"]*)['\"]", re.MULTILINE)
_PARTS = re.compile(r"^(MAJOR|MINOR|PATCH|PRE_RELEASE) = '?(\w*)'?", re.MULTILINE)

Check = Callable[["Made"], list[str]]
"""Looks at patched files before the branch moves; says what it found, or raises PatchError where they do not hold."""


class TreeState(StrEnum):
    """How a git tree stands to the series."""

    APPLIED = "applied"
    NOT_APPLIED = "not applied"
    OTHER = "applied by another series"
    EDITED = "edited"
    STOPPED = "half applied"


@dataclass(frozen=True)
class Checkout:
    """A git tree of a distribution.

    inside: the folder of the repository that upstream's paths start from, with a slash at its end; empty for the top.
    version: what the tree says that it is; empty where it does not.
    pins: the series that there are.
    """

    repo: Repo
    distribution: str
    inside: str
    version: str
    pins: tuple[Series, ...]

    @property
    def folder(self) -> Path:
        """The folder that upstream's paths start from."""
        return self.repo.top / self.inside

    def __str__(self) -> str:
        """Return distribution, version and place."""
        return f"{self.distribution} {self.version or '(of unknown version)'} in {self.folder}"


@dataclass(frozen=True)
class Made:
    """Patched files of a checkout that no branch has yet: bytes by upstream path."""

    checkout: Checkout
    series: Series
    patches: tuple[Patch, ...]
    files: Mapping[str, bytes | None]


@dataclass
class TreeOutcome:
    """What was found or done, in lines; `changed` says whether the branch was moved."""

    checkout: Checkout
    state: TreeState
    said: list[str] = field(default_factory=list)
    changed: bool = False


def open_checkout(folder: Path, names: Sequence[str] = (), root: Path | None = None) -> Checkout:
    """Return the git tree of an engine that a folder is, or is in.

    names: distributions to choose from; all that have a series, if empty.

    Raises:
        PatchError: The folder is in no repository, or holds no engine or several.
    """
    repo, pins = open_repo(folder), load_series(root)
    unknown = [name for name in names if name not in pins]
    if unknown:
        raise PatchError(f"{', '.join(unknown)}: no such distribution, only {', '.join(pins)}")
    marks = {name: f"{series[0].prefix}{series[0].package}/__init__.py" for name, series in pins.items() if series}
    places = [folder.resolve(), *folder.resolve().parents]
    for place in places[: places.index(repo.top.resolve()) + 1]:
        found = [name for name, mark in marks.items() if (place / mark).is_file()]
        if not found:
            continue
        chosen = [name for name in found if not names or name in names]
        if len(chosen) != 1:
            wanted = f"not {', '.join(names)}" if names else "name one of them"
            raise PatchError(f"{place}: holds {', '.join(found)}; {wanted}")
        inside = place.relative_to(repo.top.resolve()).as_posix()
        series = pins[chosen[0]][0]
        version = _version(repo, place / series.prefix / series.package)
        return Checkout(repo, chosen[0], "" if inside == "." else f"{inside}/", version, pins[chosen[0]])
    raise PatchError(f"{folder}: no source of {' or '.join(marks)}: has no {' or '.join(marks.values())}")


def status(checkout: Checkout) -> TreeOutcome:
    """Say how a tree stands: which patches it has, or how near the nearest series is."""
    repo = checkout.repo
    if was_stopped(repo):
        said = "a run was stopped on the way; `r3 patch apply` and `r3 patch revert` put it right first"
        return TreeOutcome(checkout, TreeState.STOPPED, [said])
    head = repo.head
    ours = find_ours(repo, head, checkout.distribution)
    place = f"{len(ours)} commits{'' if on_top(repo, head, ours) else ', below others'}"
    try:
        with _without(repo, head, ours) as stack:
            near = nearest(checkout, stack.top)
    except PatchError as error:
        return TreeOutcome(checkout, TreeState.EDITED, [place, str(error)])
    changed = dirty(repo)
    if not ours:
        more = [f"not committed: {', '.join(changed[:3])}"] if changed else []
        return TreeOutcome(checkout, TreeState.NOT_APPLIED, [near.describe(), *more])
    if not is_of(ours, near.series, near.patches, near.idle):
        advice = f"`r3 patch apply` brings it to that for {near.series.version}"
        return TreeOutcome(checkout, TreeState.OTHER, [place, advice])
    edited = {checkout.inside + path for path in paths_of(near.patches)}.intersection(changed)
    if edited:
        return TreeOutcome(checkout, TreeState.EDITED, [place, f"not committed: {', '.join(sorted(edited))}"])
    return TreeOutcome(checkout, TreeState.APPLIED, [f"the series for {near.series.version}, {place}"])


def apply(checkout: Checkout, check: Check = lambda made: []) -> TreeOutcome:
    """Commit the nearest series on top of what is checked out; what earlier patches made is taken back first.

    check: looks at the patched files before anything is changed.

    Raises:
        PatchError: The tree is not clean, hunks do not fit, or the check says no; nothing is changed.
    """
    repo = checkout.repo
    with _alone(repo) as said:
        head = repo.head
        ours = find_ours(repo, head, checkout.distribution)
        with _without(repo, head, ours) as stack:
            near = nearest(checkout, stack.top)
            if ours and is_of(ours, near.series, near.patches, near.idle):
                return TreeOutcome(checkout, TreeState.APPLIED, [*said, "already applied, nothing to do"])
            said.append(near.describe())
            if near.fit.conflicts:
                raise PatchError(near.refusal())
            idle = commit_steps(stack, near.series, near.fit, checkout.inside)
            said.extend(f"{patch.name}: changes nothing, its lines are there already" for patch in idle)
            made = {path: data for _, step in near.fit.steps for path, data in step.items()}
            said.extend(check(Made(checkout, near.series, near.patches, made)))
            count = repo.line("rev-list", "--count", f"{head}..{stack.top}")
            said.append(f"applied, {count} commits on top of {head[:12]}; `git log` shows them")
            move(repo, stack.top, f"r3 patch apply: {checkout.distribution} {near.series.version}")
        return TreeOutcome(checkout, TreeState.APPLIED, said, changed=True)


def revert(checkout: Checkout) -> TreeOutcome:
    """Take away the commits that patches were made into: back to the commit below, or with commits that revert them.

    Raises:
        PatchError: The tree is not clean, or later commits changed the same lines; nothing is changed.
    """
    repo = checkout.repo
    with _alone(repo) as said:
        head = repo.head
        ours = find_ours(repo, head, checkout.distribution)
        if not ours:
            return TreeOutcome(checkout, TreeState.NOT_APPLIED, [*said, "no patch is applied, nothing to do"])
        with _without(repo, head, ours) as stack:
            move(repo, stack.top, f"r3 patch revert: {checkout.distribution}")
        if on_top(repo, head, ours):
            said.append(
                f"reverted, {len(ours)} commits taken away; {repo.line('log', '-1', '--format=%h %s')} is on top"
            )
        else:
            said.append(f"reverted by commits on top: others stand on the {len(ours)} of the patches")
        return TreeOutcome(checkout, TreeState.NOT_APPLIED, said, changed=True)


@dataclass(frozen=True)
class Near:
    """The series that fits a tree best, and the other ones.

    missing: why released files were not to be had, so that context alone decided; empty where they were.
    """

    checkout: Checkout
    series: Series
    patches: tuple[Patch, ...]
    fit: Fit
    missing: str

    @property
    def idle(self) -> list[Patch]:
        """The patches that change nothing, since their lines are there already."""
        return [patch for patch, step in self.fit.steps if not step]

    def describe(self) -> str:
        """Return which series is the nearest, and how near."""
        base = "" if not self.missing else f" (by context alone; no released files: {self.missing})"
        return f"the nearest series is that for {self.series.version}: {self.fit}{base}"

    def refusal(self) -> str:
        """Return what does not fit and what to do."""
        pins = ", ".join(series.version for series in self.checkout.pins)
        return (
            f"{self.checkout}: {self.describe()} (there are series for {pins}); nothing changed. These do not:\n"
            f"{show(self.fit.conflicts)}\n{self._way_out()}"
        )

    def _way_out(self) -> str:
        """Return what to do. A series is made of a release; a tree between two releases has none of its own."""
        name, version = self.checkout.distribution, self.checkout.version
        for pin in self.checkout.pins:
            if pin.version == version:
                commit = f", which is {pin.source}" if pin.source else ""
                return f"Check out a commit where these lines are as {version} has them{commit}"
        nearer = "Check out a version that is nearer"
        if is_release(version):
            return f"{nearer}, or, of the release, make a series: `r3 patch rebase {name} {version}`"
        return f"{nearer}; {version or 'this'} is no release, of which `r3 patch rebase` could make a series"


def nearest(checkout: Checkout, commit: str) -> Near:
    """Return the series of which the fewest hunks do not fit a commit; of those, the one of the nearest version."""
    found = []
    for series in checkout.pins:
        patches = read_patches(series)
        files = files_of(checkout, commit, paths_of(patches))
        base, _ = base_of(series, patches, checkout.repo, download=False)
        fitted = fit(patches, files, base)
        rank = (fitted.hunks - fitted.fitting, far(checkout.version, series.version))
        found.append((rank, series, patches, files))
    _, series, patches, files = min(found, key=lambda each: each[0])
    base, missing = base_of(series, patches, checkout.repo)
    return Near(checkout, series, patches, fit(patches, files, base), missing)


def files_of(checkout: Checkout, commit: str, paths: Sequence[str]) -> Contents:
    """Return the bytes of files of a commit by upstream path."""
    found = read_tree(checkout.repo, commit, [checkout.inside + path for path in paths])
    return {path.removeprefix(checkout.inside): data for path, data in found.items()}


@contextmanager
def _alone(repo: Repo) -> Iterator[list[str]]:
    """Hold the repository, put right what a stopped run left, and refuse a tree that is not clean."""
    with exclusive(repo.folder):
        said = ["a run was stopped on the way: put right"] if mend(repo) else []
        check_quiet(repo)
        yield said


@contextmanager
def _without(repo: Repo, head: str, ours: Sequence[Ours]) -> Iterator[Stack]:
    """Yield a stack of commits whose top does not have ours: the commit below them, or commits that revert them."""
    below = on_top(repo, head, ours)
    with commits_on(repo, below or head) as stack:
        if below is None:
            take_back(stack, ours)
        yield stack


def _version(repo: Repo, package: Path) -> str:
    """Return the version that a package's files or the nearest tag give; empty where none does."""
    for name in _VERSIONS:
        path = package / name
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        parts = dict(_PARTS.findall(text))
        if parts:
            text = (
                f'version = "{parts.get("MAJOR")}.{parts.get("MINOR")}.{parts.get("PATCH")}{parts.get("PRE_RELEASE")}"'
            )
        found = _VERSION.search(text)
        if found and parsed_version(found[1]):
            return found[1]
    tag = re.search(r"\d+\.\d.*", repo.says("describe", "--tags", "--abbrev=0") or "")
    return tag[0] if tag and parsed_version(tag[0]) else ""
