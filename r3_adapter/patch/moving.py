"""Move what is checked out to a commit: files, index and branch, all or nothing.

New bytes are renamed over the old ones, and the branch moves last. A run that was stopped in between leaves a journal
in git's folder, by which the next one puts files and index back to what the branch says.
"""

import json
import re
from pathlib import Path

from r3_adapter.errors import PatchError
from r3_adapter.patch.git import Repo, put_in_index, read_tree
from r3_adapter.patch.installed import read_files
from r3_adapter.patch.transaction import Change, commit, is_begun, journal

_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


def move(repo: Repo, new: str, why: str) -> None:
    """Move the branch, or a detached HEAD, to a commit whose files differ in what patches touch.

    why: for git's log of where the branch was.

    Raises:
        PatchError: A file is not as the commit that is checked out has it, or cannot be written; nothing is changed.
    """
    old = repo.head
    paths = _changed(repo, old, new)
    before, after = read_tree(repo, old, paths), read_tree(repo, new, paths)
    found = read_files(repo.top, paths)
    for path in paths:
        _check_inside(repo.top, path)
        if found[path] != before[path]:
            what = "is in the way, and git does not know it" if before[path] is None else "is not as committed"
            raise PatchError(f"{repo.top / path}: {what} (or a filter or line ends are configured for it)")
    changes = [Change(repo.top / path, before[path], after[path]) for path in paths]
    with journal(_journal(repo), json.dumps({"old": old, "new": new}).encode(), changes):
        commit(changes)
        indexed = False
        try:
            put_in_index(repo, after, new)
            indexed = True
            repo.git("update-index", "-q", "--refresh")
            repo.git("update-ref", "-m", why, "HEAD", new, old)
        except BaseException:
            commit([Change(change.path, change.new, change.old) for change in changes])
            if indexed:
                put_in_index(repo, before, old)
                repo.git("update-index", "-q", "--refresh")
            raise


def was_stopped(repo: Repo) -> bool:
    """Say whether a run was stopped while it moved."""
    return is_begun(_journal(repo))


def mend(repo: Repo) -> bool:
    """Put files and index to what HEAD says, where a run was stopped; say whether one was.

    Raises:
        PatchError: A file is neither as before the run nor as after it.
    """
    if not was_stopped(repo):
        return False
    path = _journal(repo)
    if path.exists():
        old, new = _read(path)
        paths = _changed(repo, old, new)
        head = repo.head
        before, after, wanted = (read_tree(repo, each, paths) for each in (old, new, head))
        found = read_files(repo.top, paths)
        foreign = [name for name in paths if found[name] not in (before[name], after[name], wanted[name])]
        if foreign:
            raise PatchError(
                f"{repo.top}: a run of `r3 patch` was stopped, and these were changed since: {', '.join(foreign)}; "
                f"check them out, or remove {path}"
            )
        commit([Change(repo.top / name, found[name], wanted[name]) for name in paths])
        put_in_index(repo, wanted, head)
        repo.git("update-index", "-q", "--refresh")
    path.unlink(missing_ok=True)
    path.with_name(f".{path.name}.r3-new").unlink(missing_ok=True)
    return True


def _journal(repo: Repo) -> Path:
    return repo.folder / "r3-patch.journal"


def _read(path: Path) -> tuple[str, str]:
    try:
        table = json.loads(path.read_bytes())
        old, new = str(table["old"]), str(table["new"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PatchError(f"{path}: not what `r3 patch` wrote ({type(error).__name__}); move it away") from error
    if not (_COMMIT.fullmatch(old) and _COMMIT.fullmatch(new)):
        raise PatchError(f"{path}: names no commits; move it away")
    return old, new


def _changed(repo: Repo, old: str, new: str) -> list[str]:
    said = repo.git("diff-tree", "-r", "-z", "--no-renames", "--name-only", old, new)
    return [path for path in said.decode("utf-8", "surrogateescape").split("\0") if path]


def _check_inside(top: Path, path: str) -> None:
    """Refuse to write through a linked folder."""
    folder = (top / path).parent.resolve()
    if not folder.is_relative_to(top.resolve()):
        raise PatchError(f"{top / path}: its folder is really {folder}, outside of {top}")
