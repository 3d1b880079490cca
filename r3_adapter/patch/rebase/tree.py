"""The tree of a rebase: a release as one commit, and a series as commits on top of it, that a maintainer may mend."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from r3_adapter.errors import PatchError
from r3_adapter.patch.git import Repo, check_quiet, commits_on, identity, open_repo, read_tree
from r3_adapter.patch.gittree import TRAILER, commit_steps, plant
from r3_adapter.patch.patchfile import Patch
from r3_adapter.patch.series import Contents, Series, is_release, read_patches
from r3_adapter.patch.threeway import Fit, fit
from r3_adapter.patch.wheels import checked_version

RELEASED = "r3-released"
"""The tag of the commit that is the release."""


def commit_files(folder: Path, series: Series, version: str) -> tuple[str, Contents, str]:
    """Return what a git tree's HEAD has of a distribution, as a version that no registry has.

    series: any of the distribution.

    Returns:
        The version, its source files by upstream path, and the repository and commit that they are of.

    Raises:
        PatchError: The version is one that a registry may have; the tree is not clean, of no repository that others
            can reach, or has no such package.
    """
    version, repo = checked_version(version), open_repo(folder)
    if is_release(version):
        raise PatchError(f"{version}: is for a release; give a commit one that no registry has, as {version}.dev0")
    check_quiet(repo)
    address = repo.says("remote", "get-url", "origin") or ""
    if not address.startswith("https://"):
        raise PatchError(
            f"{folder}: its remote `origin` is {address or 'not there'}, not https://: others cannot fetch it"
        )
    files = package_files(repo, repo.head, series)
    if not files:
        raise PatchError(f"{folder}: no {series.distribution}: {series.prefix}{series.package} has no Python files")
    return version, files, f"{address} {repo.head}"


def package_files(repo: Repo, commit: str, series: Series) -> Contents:
    """Return the source files that a commit has of a distribution, by upstream path."""
    said = repo.git("ls-tree", "-r", "-z", "--name-only", commit, "--", f"{series.prefix}{series.package}/")
    paths = said.decode("utf-8", "surrogateescape").split("\0")
    return read_tree(repo, commit, [path for path in paths if path.endswith((".py", ".pyi"))])


def plant_release(folder: Path, series: Series, version: str, files: Contents, source: str = "") -> Repo:
    """Make the tree of a release at a folder that is empty or not there yet; return it.

    files: the release's source files, by upstream path.
    source: the repository and commit of a version that no registry has.
    """
    repo = plant(folder, files, f"{_title(series.distribution, version)}\n\n{source}".rstrip() + "\n")
    repo.git("tag", RELEASED, "HEAD")
    return repo


def open_tree(folder: Path, distribution: str, version: str) -> Repo:
    """Return the tree that an earlier run left at a folder.

    Raises:
        PatchError: It is none, is of another release, has changes that are not committed, or a merge under way.
    """
    repo = open_repo(folder)
    found = repo.says("log", "-1", "--format=%s", f"refs/tags/{RELEASED}")
    if found is None or repo.top != folder.resolve():
        raise PatchError(f"{folder}: not a tree that `r3 patch rebase` made: no tag {RELEASED}")
    if found != _title(distribution, version):
        raise PatchError(f"{folder}: {found!r} != {_title(distribution, version)!r}")
    check_quiet(repo)
    return repo


def source_of(repo: Repo) -> str:
    """Return the repository and commit that the release of a tree is of; empty for one that a registry has."""
    return repo.line("log", "-1", "--format=%b", RELEASED).strip()


def released_files(repo: Repo) -> Contents:
    """Return all files of the release that a tree is of."""
    paths = repo.git("ls-tree", "-r", "-z", "--name-only", RELEASED).decode("utf-8", "surrogateescape")
    return read_tree(repo, RELEASED, [path for path in paths.split("\0") if path])


def commit_series(repo: Repo, series: Series, found: Fit) -> None:
    """Commit each patch of a series that fits without a conflict."""
    with commits_on(repo, repo.head) as stack:
        commit_steps(stack, series, found)
        _move_to(repo, stack.top)


def leave_to_mend(repo: Repo, series: Series, found: Fit, base: Contents) -> bool:
    """Commit the patches in front of the first conflict, and have git pick the others; return whether it could.

    If not, git has stopped at a patch with conflict markers, and the others wait in `git cherry-pick --continue`. Git
    also follows files that upstream has moved, which a patch's text does not.

    base: the released files that the series was made on, by upstream path.
    """
    stuck = {conflict.patch for conflict in found.conflicts}
    first = next(at for at, (patch, _) in enumerate(found.steps) if patch.name in stuck)
    commit_series(repo, series, replace(found, steps=found.steps[:first]))
    picked = _made_on_its_release(repo, series, base)
    return repo.says(*_who(repo), "-c", "merge.conflictStyle=diff3", "cherry-pick", *picked[first:]) is not None


def commits(repo: Repo) -> list[str]:
    """Return the commits on top of the release, the first one first.

    Raises:
        PatchError: There is none, or one is a merge.
    """
    if repo.says("merge-base", "--is-ancestor", RELEASED, "HEAD") is None:
        raise PatchError(f"{repo.top}: HEAD is not on top of {RELEASED}")
    found = repo.git("rev-list", "--reverse", "--parents", f"{RELEASED}..HEAD").decode().splitlines()
    lines = [line.split() for line in found]
    if merges := [line[0] for line in lines if len(line) != len(("itself", "parent"))]:
        raise PatchError(f"{repo.top}: {merges[0][:12]} is a merge; a series is commits one after the other")
    if not lines:
        raise PatchError(f"{repo.top}: no commits on top of {RELEASED}")
    return [line[0] for line in lines]


def changed_files(repo: Repo) -> Contents:
    """Return the bytes of the files that the commits on top of the release change; None for one that they remove."""
    said = repo.git("diff", "--name-only", "-z", "--no-renames", "--no-ext-diff", RELEASED, "HEAD")
    return read_tree(repo, "HEAD", [path for path in said.decode("utf-8", "surrogateescape").split("\0") if path])


def patch_of(repo: Repo, path: str, line: int) -> str:
    """Return the patch, or the subject of the commit, that a line is of; nothing for upstream's."""
    span = (f"-L{line},{line}", f"{RELEASED}..HEAD", "--", path)
    commit = (repo.says("blame", "--porcelain", *span) or "").partition(" ")[0]
    if not commit or repo.says("merge-base", "--is-ancestor", commit, RELEASED) is not None:
        return ""
    return origin_of(repo, commit) or repo.line("log", "-1", "--format=%s", commit)


def origin_of(repo: Repo, commit: str) -> str:
    """Return the name of the patch that a commit was made from; nothing for a maintainer's own."""
    said = repo.line("log", "-1", f"--format=%(trailers:key={TRAILER},valueonly)", commit).split()
    return said[2] if len(said) > len(("distribution", "version")) else ""


def without_trailer(text: str) -> str:
    """Return a patch or a message without the line that names its origin."""
    return "".join(line for line in text.splitlines(keepends=True) if not line.startswith(f"{TRAILER}: "))


def as_patched(patches: Sequence[Patch], base: Contents) -> Contents:
    """Return what a series makes of the files that it was made on: those that it touches or adds."""
    result: Contents = {}
    for _, step in _exact(patches, base).steps:
        result |= step
    return result


def _made_on_its_release(repo: Repo, series: Series, base: Contents) -> list[str]:
    """Commit the series, away from HEAD, on the files that it was made on; return the commits."""
    patches, made = read_patches(series), []
    wanted = {diff.path for patch in patches for diff in patch.diffs}
    # Without the new release's files: git looks among those that only the release has for what was moved.
    root = repo.line(*_who(repo), "commit-tree", "-m", "nothing", repo.line("mktree"))
    with commits_on(repo, root) as stack:
        stack.commit({path: base[path] for path in wanted if base.get(path) is not None}, "released\n")
        for step in _exact(patches, base).steps:
            commit_steps(stack, series, Fit([step]))
            made.append(stack.top)
    return made


def _exact(patches: Sequence[Patch], base: Contents) -> Fit:
    paths = {diff.path for patch in patches for diff in patch.diffs}
    files = {path: base.get(path) for path in paths}
    return fit(patches, files, files)


def _who(repo: Repo) -> tuple[str, ...]:
    name, mail = identity(repo)
    return ("-c", f"user.name={name}", "-c", f"user.email={mail}")


def _move_to(repo: Repo, commit: str) -> None:
    head = repo.head
    repo.git("read-tree", "-m", "-u", head, commit)
    repo.git("update-ref", "-m", "r3 patch rebase", "HEAD", commit, head)


def _title(distribution: str, version: str) -> str:
    return f"{distribution} {version} as released"
