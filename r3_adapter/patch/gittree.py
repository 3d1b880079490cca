"""A git tree of files, and the commits that a patch series becomes on top of a tree."""

from collections.abc import Mapping
from pathlib import Path

from r3_adapter.errors import PatchError
from r3_adapter.patch.git import Repo, Stack, first_commit, init_repo
from r3_adapter.patch.patchfile import Patch
from r3_adapter.patch.series import Series
from r3_adapter.patch.threeway import Fit, author_of, message_of

TRAILER = "R3-Patch"
"""The trailer of a commit that a patch was made into: distribution, version, file name, start of the file's sha256."""


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
