"""Which commits of a git tree the patches were made into, and how they are taken back."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from r3_adapter.errors import PatchError
from r3_adapter.patch.git import Repo, Stack, merge_file, read_tree
from r3_adapter.patch.gittree import TRAILER
from r3_adapter.patch.patchfile import Patch
from r3_adapter.patch.series import Series

_PATCH = re.compile(rf"^{TRAILER}: (\S+) (\S+) (\S+) ([0-9a-f]{{16}})$", re.MULTILINE)
_REVERTS = re.compile(r"^This reverts commit ([0-9a-f]{40})", re.MULTILINE)


@dataclass(frozen=True)
class Ours:
    """A commit that patches were made into; mostly one.

    patches: version, file name and hash of each.
    """

    commit: str
    parents: tuple[str, ...]
    subject: str
    patches: tuple[tuple[str, str, str], ...]


def find_ours(repo: Repo, head: str, distribution: str) -> list[Ours]:
    """Return the commits below a head that patches were made into and that no other commit takes back, oldest first."""
    form = "--format=%H%x00%P%x00%s%x00%B%x01"
    wanted = [f"--grep=^{TRAILER}: {distribution} ", "--grep=^This reverts commit "]
    said = repo.git("log", "--topo-order", "--reverse", "--extended-regexp", form, *wanted, head)
    there: dict[str, Ours] = {}
    undone: dict[str, Ours] = {}
    for entry in said.decode("utf-8", "replace").split("\1\n"):
        if "\0" not in entry:
            continue
        commit, parents, subject, message = entry.split("\0", 3)
        made = tuple(found[1:] for found in _PATCH.findall(message) if found[0] == distribution)
        taken = _REVERTS.findall(message)
        if made and not taken:
            there[commit] = Ours(commit, tuple(parents.split()), subject, made)
        for other in taken:
            if other in there:
                undone[commit] = there.pop(other)
            elif other in undone:
                there[undone[other].commit] = undone.pop(other)
    return list(there.values())


def is_of(ours: Sequence[Ours], series: Series, patches: Sequence[Patch], idle: Sequence[Patch] = ()) -> bool:
    """Say whether commits are exactly a series as it is today, but for patches that change nothing in this tree."""
    want = [(series.version, patch.name, patch.sha256[:16]) for patch in patches if patch not in idle]
    return [made for each in ours for made in each.patches] == want


def on_top(repo: Repo, head: str, ours: Sequence[Ours]) -> str | None:
    """Return the commit below ours if nothing else stands on top of them or in between; None otherwise."""
    at = head
    for each in reversed(ours):
        if each.commit != at or len(each.parents) != 1:
            return None
        at = each.parents[0]
    return at


def take_back(stack: Stack, ours: Sequence[Ours]) -> None:
    """Add commits that revert ours, the last one first, and keep what others changed since.

    Raises:
        PatchError: Others changed the same lines since, or ours is a merge.
    """
    repo = stack.repo
    for each in reversed(ours):
        if len(each.parents) != 1:
            raise PatchError(f"{repo.top}: {each.commit[:12]} ({each.subject}): a merge; it cannot be taken back")
        said = repo.git("diff-tree", "-r", "-z", "--no-renames", "--name-only", each.parents[0], each.commit)
        paths = [path for path in said.decode("utf-8", "surrogateescape").split("\0") if path]
        now, made, before = (read_tree(repo, commit, paths) for commit in (stack.top, each.commit, each.parents[0]))
        step = {path: _without(now[path], made[path], before[path]) for path in paths}
        broken = [path for path, (_, fits) in step.items() if not fits]
        if broken:
            raise PatchError(
                f"{repo.top}: {each.commit[:12]} ({each.subject}): later commits changed the same lines: "
                f"{', '.join(broken)}; revert those first"
            )
        files = {path: data for path, (data, _) in step.items() if data != now[path]}
        if files:
            stack.commit(files, f'Revert "{each.subject}"\n\nThis reverts commit {each.commit}.\n')


def _without(now: bytes | None, made: bytes | None, before: bytes | None) -> tuple[bytes | None, bool]:
    """Return a file without what a commit made of it, and whether that can be told."""
    if now == made:
        return before, True
    if now == before:
        return now, True
    if now is None or made is None or before is None:
        return now, False
    merged = merge_file(now, made, before)
    return (now, False) if merged is None else (merged, True)
