"""Git trees: read them, and add commits to them, whatever the repository or its user have configured.

Git is run with plumbing commands alone and a clean environment: no hooks, filters, merge drivers, file monitors or
signatures of the repository run, no network is used, and of the user's configuration only the identity counts.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from shutil import which

from r3_adapter.errors import PatchError
from r3_adapter.patch.series import Contents

IDENTITY = ("r3 patch", "r3-patch@localhost")
"""Who commits where the user has not told git a name and an address."""

NEW_FILE = ("100644", "")
_OLDEST = (2, 32)  # takes its configuration from GIT_CONFIG_COUNT and GIT_CONFIG_GLOBAL
_PLAIN = {
    "advice.detachedHead": "false",
    "commit.gpgSign": "false",
    "core.attributesFile": os.devnull,
    "core.autocrlf": "false",
    "core.fsmonitor": "false",
    "core.hooksPath": os.devnull,
    "core.quotePath": "false",
    "core.safecrlf": "false",
    "core.sshCommand": "false",
    "gc.auto": "0",
    "i18n.commitEncoding": "utf-8",
    "i18n.logOutputEncoding": "utf-8",
    "log.showSignature": "false",
    "maintenance.auto": "false",
    "protocol.allow": "never",
    "submodule.recurse": "false",
}
_ENVIRONMENT = {
    "GIT_ATTR_NOSYSTEM": "1",
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_LITERAL_PATHSPECS": "1",
    "GIT_NO_LAZY_FETCH": "1",
    "GIT_NO_REPLACE_OBJECTS": "1",
    "GIT_OPTIONAL_LOCKS": "0",
    "GIT_TERMINAL_PROMPT": "0",
    "LC_ALL": "C",
}
# What a repository may name commands for; `.gitattributes` then chooses the files.
_COMMANDS = r"^(filter|merge|diff)\..*\.(clean|smudge|process|required|driver|textconv|command)$"
_BUSY = {
    "MERGE_HEAD": "a merge",
    "rebase-merge": "a rebase",
    "rebase-apply": "a rebase or `git am`",
    "CHERRY_PICK_HEAD": "a cherry-pick",
    "REVERT_HEAD": "a revert",
    "BISECT_LOG": "a bisection",
}


Author = tuple[str, str, str]
"""Name, address, and the date as mail has it; each may be empty."""
NOBODY: Author = ("", "", "")


@dataclass(frozen=True)
class Repo:
    """A git repository with a work tree.

    top: the work tree's folder.
    folder: git's own, of this work tree.
    env: what git runs with.
    """

    top: Path
    folder: Path
    env: Mapping[str, str]

    def git(self, *args: str, data: bytes = b"", index: Path | None = None) -> bytes:
        """Run git in the work tree; return what it prints.

        data: what it reads. index: a file to be used in place of the repository's index.

        Raises:
            PatchError: It failed; with what it said.
        """
        env = {**self.env, **({"GIT_INDEX_FILE": str(index)} if index else {})}
        return _run(self.top, env, *args, data=data)

    def line(self, *args: str) -> str:
        """Run git; return the line that it prints."""
        return self.git(*args).decode("utf-8", "surrogateescape").removesuffix("\n")

    def says(self, *args: str) -> str | None:
        """Run git; return the line that it prints, None where it says no."""
        ran = _call(self.top, self.env, args)
        return ran.stdout.decode("utf-8", "surrogateescape").strip("\n") if ran.returncode == 0 else None

    @property
    def head(self) -> str:
        """The commit that is checked out."""
        found = self.says("rev-parse", "--verify", "--quiet", "HEAD^{commit}")
        if not found:
            raise PatchError(f"{self.top}: has no commit yet")
        return found


def open_repo(folder: Path) -> Repo:
    """Return the repository that a folder is in.

    Raises:
        PatchError: There is no git, or none that is new enough; no repository; or one without a work tree here.
    """
    _check_version()
    if not folder.is_dir():
        raise PatchError(f"{folder}: not a folder")
    folder, env = folder.resolve(), _environment(_PLAIN)
    found = _call(folder, env, ("rev-parse", "--is-bare-repository", "--is-inside-git-dir", "--absolute-git-dir"))
    if found.returncode:
        raise PatchError(f"{folder}: not in a git repository that can be used: {_last(found.stderr)}")
    bare, inside, git_dir = found.stdout.decode("utf-8", "surrogateescape").rstrip("\n").split("\n", 2)
    if "true" in (bare, inside):
        raise PatchError(f"{folder}: a bare repository, or a folder of git's own; patches need a work tree")
    top = Path(_run(folder, env, "rev-parse", "--show-toplevel").decode("utf-8", "surrogateescape").rstrip("\n"))
    if not folder.is_relative_to(top.resolve()):
        raise PatchError(f"{folder}: its repository has its work tree elsewhere, at {top}")
    named = _call(folder, env, ("config", "--includes", "--name-only", "-z", "--get-regexp", _COMMANDS)).stdout
    commands = {key: "false" if key.endswith(".required") else "" for key in named.decode().split("\0") if key}
    return Repo(top, Path(git_dir), _environment({**_PLAIN, **commands}))


def init_repo(folder: Path) -> Repo:
    """Make a repository without a commit; return it."""
    _check_version()
    folder.mkdir(parents=True, exist_ok=True)
    _run(folder, _environment(_PLAIN), "init", "--quiet", "--template=", "--initial-branch=main")
    return open_repo(folder)


def identity(repo: Repo) -> tuple[str, str]:
    """Return the name and the address that the user commits with, or IDENTITY."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    named = []
    for variable, key in (("GIT_COMMITTER_NAME", "user.name"), ("GIT_COMMITTER_EMAIL", "user.email")):
        asked = _call(repo.top, plain, ("config", "--includes", "--get", key))
        named.append(os.environ.get(variable) or asked.stdout.decode(errors="replace").strip())
    name, mail = (re.sub(r"[<>\n\0]", "", each).strip() for each in named)
    return (name, mail) if name and mail else IDENTITY


def check_quiet(repo: Repo) -> None:
    """Refuse a repository in the middle of something, and one with changes that are not committed.

    Raises:
        PatchError: Names what is under way, or the files.
    """
    for name, what in _BUSY.items():
        if (repo.folder / name).exists():
            raise PatchError(f"{repo.top}: in the middle of {what}; finish or abort it first")
    if (repo.folder / "index.lock").exists():
        raise PatchError(
            f"{repo.folder / 'index.lock'}: another git works here, or was stopped; remove it if none does"
        )
    changed = dirty(repo)
    if changed:
        more = f" and {len(changed) - 3} others" if len(changed) > 3 else ""
        raise PatchError(f"{repo.top}: not committed: {', '.join(changed[:3])}{more}; commit them first")


def dirty(repo: Repo) -> list[str]:
    """Return the tracked files whose state is not committed."""
    said = repo.git("status", "--porcelain=v1", "-z", "--untracked-files=no", "--ignore-submodules=all", "--no-renames")
    return [entry[3:] for entry in said.decode("utf-8", "surrogateescape").split("\0") if entry]


def read_tree(repo: Repo, commit: str, paths: Iterable[str]) -> Contents:
    """Return the bytes of files of a commit, by path; None for no file.

    Raises:
        PatchError: One is a link, a folder or a submodule.
    """
    contents: Contents = dict.fromkeys(paths)
    found = _entries(repo, commit, contents)
    for path, (mode, _) in found.items():
        if mode not in ("100644", "100755"):
            raise PatchError(f"{repo.top}: {path}: not a plain file in {commit[:12]}")
    blobs = read_blobs(repo, [blob for _, blob in found.values()])
    return contents | {path: blobs[blob] for path, (_, blob) in found.items()}


def read_blobs(repo: Repo, names: Iterable[str]) -> dict[str, bytes]:
    """Return the bytes of blobs by their full or abbreviated names, as far as the repository has them."""
    wanted, blobs, at = list(dict.fromkeys(names)), dict[str, bytes](), 0
    said = repo.git("cat-file", "--batch", data="".join(f"{name}\n" for name in wanted).encode()) if wanted else b""
    for name in wanted:
        start = said.index(b"\n", at) + 1
        head = said[at:start].split()
        at = start
        # Otherwise "NAME missing", or "NAME ambiguous".
        if len(head) == 3:
            at = start + int(head[2]) + 1
            if head[1] == b"blob":
                blobs[name] = said[start : at - 1]
    return blobs


@contextmanager
def commits_on(repo: Repo, commit: str) -> Iterator["Stack"]:
    """Yield a stack of commits that starts at one; nothing of it shows before a branch is moved to its top."""
    with tempfile.TemporaryDirectory(prefix="r3-patch-") as folder:
        stack = Stack(repo, Path(folder) / "index", commit)
        repo.git("read-tree", commit, index=stack.index)
        yield stack


class Stack:
    """Commits that are being made, with an index of their own."""

    def __init__(self, repo: Repo, index: Path, top: str) -> None:
        self.repo, self.index, self.top = repo, index, top
        self._committer = identity(repo)

    def commit(self, files: Mapping[str, bytes | None], message: str, author: Author = NOBODY) -> str:
        """Add a commit that gives files new bytes, None for no file, keeping their modes; return its name."""
        put_in_index(self.repo, files, self.top, self.index)
        tree = self.repo.git("write-tree", index=self.index).decode().strip()
        self.top = _commit_tree(self.repo, tree, message, (self.top,), author, self._committer)
        return self.top


def first_commit(repo: Repo, message: str) -> str:
    """Make a commit without parents of what is in the index; return its name."""
    return _commit_tree(repo, repo.line("write-tree"), message, (), NOBODY, identity(repo))


def put_in_index(repo: Repo, files: Mapping[str, bytes | None], commit: str, index: Path | None = None) -> None:
    """Give files of the index new bytes at once, with the modes that they have in a commit."""
    known, lines = _entries(repo, commit, files), []
    names = _write_blobs(repo, [data for data in files.values() if data is not None])
    for path, data in files.items():
        mode, name = ("0", "0" * 40) if data is None else (known.get(path, NEW_FILE)[0], names[data])
        lines.append(f"{mode} {name}\t{path}\0")
    repo.git("update-index", "-z", "--index-info", data="".join(lines).encode("utf-8", "surrogateescape"), index=index)


def merge_file(ours: bytes, base: bytes, theirs: bytes) -> bytes | None:
    """Merge two changes of a file's bytes; None where they are of the same lines."""
    if base in (ours, theirs):
        return theirs if ours == base else ours
    with tempfile.TemporaryDirectory(prefix="r3-patch-") as folder:
        for name, data in (("ours", ours), ("base", base), ("theirs", theirs)):
            Path(folder, name).write_bytes(data)
        ran = _call(Path(folder), _environment(_PLAIN), ("merge-file", "-p", "-q", "ours", "base", "theirs"))
    if ran.returncode < 0 or ran.returncode > 127:
        raise PatchError(f"git merge-file: {_last(ran.stderr)}")
    return None if ran.returncode else ran.stdout


def _write_blobs(repo: Repo, contents: Iterable[bytes]) -> dict[bytes, str]:
    """Put bytes into the repository; return the name of each."""
    wanted = list(dict.fromkeys(contents))
    with tempfile.TemporaryDirectory(prefix="r3-patch-") as folder:
        paths = [Path(folder, str(number)) for number in range(len(wanted))]
        for path, data in zip(paths, wanted, strict=True):
            path.write_bytes(data)
        asked = "".join(f"{path}\n" for path in paths).encode("utf-8", "surrogateescape")
        names = repo.git("hash-object", "-w", "--no-filters", "--stdin-paths", data=asked) if wanted else b""
    return dict(zip(wanted, names.decode().split(), strict=True))


def _commit_tree(
    repo: Repo, tree: str, message: str, parents: Sequence[str], author: Author, committer: tuple[str, str]
) -> str:
    """Make a commit that no branch has yet; its author is the committer as far as it is not given."""
    (name, mail), (author_name, author_mail, date) = committer, author
    who = {
        "GIT_AUTHOR_NAME": author_name or name,
        "GIT_AUTHOR_EMAIL": author_mail or mail,
        "GIT_COMMITTER_NAME": name,
        "GIT_COMMITTER_EMAIL": mail,
        **({"GIT_AUTHOR_DATE": date} if date else {}),
    }
    named = [option for parent in parents for option in ("-p", parent)]
    made = _run(repo.top, {**repo.env, **who}, "commit-tree", tree, *named, "-F", "-", data=message.encode())
    return made.decode().strip()


def _entries(repo: Repo, commit: str, paths: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Return mode and object of each path that a commit has."""
    wanted = list(paths)
    said = repo.git("ls-tree", "-z", commit, "--", *wanted).decode("utf-8", "surrogateescape") if wanted else ""
    heads = [entry.partition("\t") for entry in said.split("\0") if entry]
    return {path: (head.split()[0], head.split()[2]) for head, _, path in heads}


def _environment(config: Mapping[str, str]) -> dict[str, str]:
    """Return the environment without what GIT_ variables say, and with a configuration that comes before all others."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")} | _ENVIRONMENT
    pairs = [*config.items(), *(("safe.directory", folder) for folder in _safe_folders())]
    for number, (key, value) in enumerate(pairs):
        env |= {f"GIT_CONFIG_KEY_{number}": key, f"GIT_CONFIG_VALUE_{number}": value}
    return env | {"GIT_CONFIG_COUNT": str(len(pairs))}


@cache
def _safe_folders() -> tuple[str, ...]:
    """Return the repositories of other owners that the user or the system trusts."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    said = [
        _call(Path("/"), env, ("config", scope, "--includes", "-z", "--get-all", "safe.directory")).stdout
        for scope in ("--system", "--global")
    ]
    return tuple(folder for each in said for folder in each.decode("utf-8", "surrogateescape").split("\0") if folder)


@cache
def _check_version() -> None:
    if which("git") is None:
        raise PatchError("git: not found; patching a source checkout needs it")
    said = _call(Path("/"), os.environ, ("--version",)).stdout.decode(errors="replace")
    found = re.search(r"(\d+)\.(\d+)", said)
    if found is None or tuple(map(int, found.groups())) < _OLDEST:
        raise PatchError(f"{said.strip()}: older than {'.'.join(map(str, _OLDEST))}, which is needed")


def _run(folder: Path, env: Mapping[str, str], *args: str, data: bytes = b"") -> bytes:
    ran = _call(folder, env, args, data)
    if ran.returncode:
        raise PatchError(f"{folder}: git {args[0]}: {_last(ran.stderr) or f'exit code {ran.returncode}'}")
    return ran.stdout


def _call(
    folder: Path, env: Mapping[str, str], args: Sequence[str], data: bytes = b""
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["git", *args], cwd=folder, env=env, input=data, capture_output=True, check=False)


def _last(said: bytes) -> str:
    lines = said.decode(errors="replace").strip().splitlines()
    return lines[0] if lines else ""
