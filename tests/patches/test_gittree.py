"""A release becomes a git tree; the series becomes commits on it; nothing that a repository configures is run."""

import os
import subprocess
from pathlib import Path

import pytest

from r3_adapter.errors import PatchError
from r3_adapter.patch.git import (
    IDENTITY,
    Repo,
    check_quiet,
    commits_on,
    first_commit,
    identity,
    init_repo,
    open_repo,
    read_tree,
)
from r3_adapter.patch.gittree import commit_steps, plant
from r3_adapter.patch.installed import State
from r3_adapter.patch.packages import status
from r3_adapter.patch.release import base_of, release_files
from r3_adapter.patch.series import digest, patches_root, read_lock, read_patches
from r3_adapter.patch.threeway import fit, paths_of


def a_repo(folder: Path) -> Repo:
    repo = init_repo(folder)
    (folder / "a.py").write_text("a = 1\n")
    repo.git("add", "a.py")
    repo.git("update-ref", "HEAD", first_commit(repo, "first\n"))
    return repo


def commit(repo: Repo, files: dict[str, bytes], message: str) -> str:
    with commits_on(repo, repo.head) as stack:
        return stack.commit(files, message)


@pytest.mark.megatron
def test_the_series_is_commits_on_the_release(tmp_path: Path) -> None:
    (found,) = status(["megatron-core"])
    if found.series is None or found.state not in (State.APPLIED, State.NOT_APPLIED):
        pytest.skip(f"megatron-core is {found.state}")
    series, patches = found.series, read_patches(found.series)
    table = read_lock(patches_root())[series.distribution]
    files = release_files(series.distribution, series.version, table["prefix"], table["package"])
    repo = plant(tmp_path / "a tree", files, "as released\n")
    before = read_tree(repo, repo.head, [series.prefix + path for path in series.files])
    assert {path: digest(before[series.prefix + path]) for path in series.files} == {
        path: pin.before for path, pin in series.files.items()
    }
    base, missing = base_of(series, patches, repo)
    assert missing == ""
    found = fit(patches, read_tree(repo, repo.head, paths_of(patches)), base)
    assert found.conflicts == []
    head = repo.head
    with commits_on(repo, head) as stack:
        commit_steps(stack, series, found)
        repo.git("read-tree", "-m", "-u", head, stack.top)
        repo.git("update-ref", "HEAD", stack.top, head)
    check_quiet(repo)
    after = read_tree(repo, repo.head, [series.prefix + path for path in series.files])
    assert {path: digest(after[series.prefix + path]) for path in series.files} == {
        path: pin.after for path, pin in series.files.items()
    }
    subjects = repo.line("log", "--reverse", "--format=%s").split("\n")
    assert [subject[:12] for subject in subjects[1:]] == [
        patch.header.partition("Subject: [PATCH] ")[2][:12] for patch in patches
    ]
    # git takes the patches as they are, too.
    repo.git("reset", "--hard", "--quiet", f"HEAD~{len(patches)}")
    top = repo.head
    files = [str(path) for path in sorted(series.folder.glob("*.patch"))]
    if len(files) == len(patches):
        repo.git("-c", "user.name=x", "-c", "user.email=x@y", "am", "-3", "--quiet", *files)
        assert repo.line("rev-list", "--count", f"{top}..HEAD") == str(len(patches))


def test_nothing_that_a_repository_configures_is_run(tmp_path: Path) -> None:
    repo, trap = a_repo(tmp_path / "a repo"), tmp_path / "sprung"
    repo.git("update-ref", "HEAD", commit(repo, {".gitattributes": b"* filter=x=y merge=x diff=x\n"}, "second\n"))
    repo.git("reset", "--hard", "--quiet")
    spring = f"touch '{trap}'; cat"
    for key in ("core.fsmonitor", "filter.x=y.clean", "filter.x=y.smudge", "merge.x.driver", "diff.x.textconv"):
        repo.git("config", key, spring)
    for key, value in (("filter.x=y.required", "true"), ("alias.status", "!false"), ("commit.gpgSign", "true")):
        repo.git("config", key, value)
    hook = repo.folder / "hooks/reference-transaction"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text(f"#!/bin/sh\n{spring}\n")
    hook.chmod(0o755)
    repo = open_repo(repo.top)
    os.utime(repo.top / "a.py", (1, 1))
    check_quiet(repo)
    repo.git("update-ref", "HEAD", commit(repo, {"b.py": b"b = 1\n"}, "third\n"))
    repo.git("read-tree", "-m", "-u", "HEAD~1", "HEAD")
    assert not trap.exists()
    # The trap does work.
    os.utime(repo.top / "a.py", (2, 2))
    subprocess.run(["git", "diff", "--quiet"], cwd=repo.top, env={**os.environ, "GIT_CONFIG_COUNT": "0"}, check=False)
    assert trap.exists()


def test_git_variables_do_not_lead_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = a_repo(tmp_path / "one"), a_repo(tmp_path / "other")
    monkeypatch.setenv("GIT_DIR", str(other.folder))
    monkeypatch.setenv("GIT_WORK_TREE", str(other.top))
    assert open_repo(one.top).folder == one.folder
    monkeypatch.delenv("GIT_DIR")
    monkeypatch.delenv("GIT_WORK_TREE")
    one.git("config", "core.worktree", str(other.top))
    with pytest.raises(PatchError, match="has its work tree elsewhere"):
        open_repo(one.top)


def test_the_identity_is_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repo = a_repo(tmp_path / "one")
    for name in ("GIT_COMMITTER_NAME", "GIT_COMMITTER_EMAIL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "none"))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    assert identity(repo) == IDENTITY
    (tmp_path / ".gitconfig").write_text("[user]\nname = Ann O'Nym\nemail = ann@home.example\n")
    assert identity(repo) == ("Ann O'Nym", "ann@home.example")
    repo.git("config", "user.email", "ann@work.example")
    assert identity(repo) == ("Ann O'Nym", "ann@work.example")
    monkeypatch.setenv("GIT_COMMITTER_NAME", "Bo")
    made = commit(repo, {"b.py": b"b = 1\n"}, "x\n")
    assert repo.line("log", "-1", "--format=%an <%ae> %cn <%ce>", made) == "Bo <ann@work.example> Bo <ann@work.example>"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("MERGE_HEAD", "in the middle of a merge"),
        ("rebase-merge", "in the middle of a rebase"),
        ("rebase-apply", "a rebase or `git am`"),
        ("CHERRY_PICK_HEAD", "a cherry-pick"),
        ("index.lock", "another git works here"),
    ],
)
def test_a_tree_in_the_middle_of_something_is_refused(tmp_path: Path, name: str, said: str) -> None:
    repo = a_repo(tmp_path / "one")
    check_quiet(repo)
    (repo.folder / name).write_text("")
    with pytest.raises(PatchError, match=said):
        check_quiet(repo)


def test_no_tree_no_commit_and_what_is_not_committed_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PatchError, match="not in a git repository"):
        open_repo(tmp_path)
    with pytest.raises(PatchError, match="has no commit yet"):
        _ = init_repo(tmp_path / "empty").head
    repo = a_repo(tmp_path / "one")
    with pytest.raises(PatchError, match="a bare repository, or a folder of git's own"):
        open_repo(repo.folder)
    (repo.top / "a.py").write_text("a = 2\n")
    with pytest.raises(PatchError, match=r"not committed: a\.py; commit them first"):
        check_quiet(repo)
