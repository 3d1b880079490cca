"""A git tree of a release, and a patch series as commits on top of any tree of the distribution."""

from collections.abc import Mapping
from pathlib import Path

from r3_adapter.errors import PatchError
from r3_adapter.git import Repo, Stack, commits_on, first_commit, init_repo, open_repo, read_tree
from r3_adapter.patchfile import Patch
from r3_adapter.release import release_files
from r3_adapter.series import Series, patches_root, read_lock, read_patches
from r3_adapter.threeway import Conflict, Fit, author_of, fit, message_of, paths_of

TRAILER = "R3-Patch"
"""The trailer of a commit that a patch was made into: distribution, version, file name, start of the file's sha256."""


def tree_of_release(distribution: str, version: str, folder: Path, *, root: Path | None = None) -> Repo:
    """Make a git tree of a release at a folder, with upstream's paths, in one commit; return it.

    Raises:
        PatchError: The distribution has no series, the version is not to be had, or the folder is not empty.
    """
    tables = read_lock(root or patches_root())
    if distribution not in tables:
        raise PatchError(f"{distribution}: no such distribution, only {', '.join(tables)}")
    prefix, package = tables[distribution]["prefix"], tables[distribution]["package"]
    files = release_files(distribution, version, prefix, package)
    return plant(folder, files, f"{distribution} {version} as released\n")


def plant(folder: Path, files: Mapping[str, bytes | None], message: str) -> Repo:
    """Make a git tree of files at a folder, in one commit; return it.

    files: bytes by the path below the folder.

    Raises:
        PatchError: The folder is not empty.
    """
    if folder.exists() and any(folder.iterdir()):
        raise PatchError(f"{folder}: not empty")
    for path, data in files.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data or b"")
    repo = init_repo(folder)
    repo.git("add", "--all", "--force")
    repo.git("update-ref", "HEAD", first_commit(repo, message))
    return repo


def apply_three_way(
    repo: Repo | Path, series: Series, base: Mapping[str, bytes | None], *, partial: bool = False
) -> list[Conflict]:
    """Commit a series on top of what is checked out in a tree that nobody else works in, patch by patch.

    base: the released bytes of the files that the patches change, by upstream path, as far as they are to be had.
    partial: commit what fits also where there are conflicts; else nothing is committed then.

    Returns:
        The hunks that do not fit.
    """
    repo = open_repo(repo) if isinstance(repo, Path) else repo
    patches, head = read_patches(series), repo.head
    found = fit(patches, read_tree(repo, head, paths_of(patches)), base)
    if not found.conflicts or partial:
        with commits_on(repo, head) as stack:
            commit_steps(stack, series, found)
            repo.git("read-tree", "-m", "-u", head, stack.top)
            repo.git("update-ref", "-m", "r3 patch", "HEAD", stack.top, head)
    return found.conflicts


def commit_steps(stack: Stack, series: Series, found: Fit, inside: str = "") -> list[Patch]:
    """Make a commit of each patch that changes something; return those that are there already.

    inside: the folder of the repository that the distribution's tree is in, with a slash at its end.
    """
    idle = []
    for patch, step in found.steps:
        if step:
            files = {inside + path: data for path, data in step.items()}
            stack.commit(files, f"{message_of(patch)}{trailer(series, patch)}\n", author_of(patch))
        else:
            idle.append(patch)
    return idle


def trailer(series: Series, patch: Patch) -> str:
    """Return the line by which a commit is known to be ours."""
    return f"{TRAILER}: {series.distribution} {series.version} {patch.name} {patch.sha256[:16]}"
