"""A made-up site with two installed packages, and patch series for them, that stand for the engines."""

import csv
import os
import shutil
import signal
import sys
from base64 import urlsafe_b64encode
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from r3_adapter.patch import packages
from r3_adapter.patch.git import Repo, init_repo
from r3_adapter.patch.packages import State
from r3_adapter.patch.series import Series, load_series

DiffTrees = Callable[[Mapping[str, bytes], Mapping[str, bytes]], bytes]
Snapshot = dict[str, tuple[int, bytes]]

TRAILERS = "Origin: vendor\nForwarded: no\nApplied-Upstream: no\nLast-Update: 2026-01-01\n"
# Site paths. `alpha` changes three files, makes one in a new folder and removes one; `beta` changes one.
ALPHA_OLD = {
    "alpha/core/a.py": b"def f():\n    return 1\n",
    "alpha/core/dos.py": b"x = 1\r\ny = 2\r\n",
    "alpha/core/no_end.py": b"z = 1",
    "alpha/core/gone.py": b"pass\n",
    "alpha/core/still.py": b"pass\n",
}
ALPHA_NEW = {
    "alpha/core/a.py": b"def f():\n    return 2\n",
    "alpha/core/dos.py": b"x = 1\r\ny = 3\r\n",
    "alpha/core/no_end.py": b"z = 1\nw = 2",
    "alpha/core/new/deep.py": b"pass\n",
    "alpha/core/still.py": b"pass\n",
}
BETA_OLD, BETA_NEW = {"beta/b.py": b"b = 1\n"}, {"beta/b.py": b"b = 2\n"}


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def files_below(folder: Path) -> Snapshot:
    """Modes and bytes of everything, folders too."""
    return {
        str(path.relative_to(folder)): (path.lstat().st_mode, b"" if path.is_dir() else path.read_bytes())
        for path in sorted(folder.rglob("*"))
    }


@dataclass(frozen=True)
class World:
    site: Path
    root: Path
    diff_trees: DiffTrees

    def install(self, name: str, version: str, files: Mapping[str, bytes]) -> None:
        info = self.site / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        rows = []
        for path, data in files.items():
            (self.site / path).parent.mkdir(parents=True, exist_ok=True)
            (self.site / path).write_bytes(data)
            rows.append(f"{path},sha256={urlsafe_b64encode(sha256(data).digest()).rstrip(b'=').decode()},{len(data)}\n")
        (info / "RECORD").write_text("".join(rows))

    def pip_uninstall(self, name: str) -> None:
        """Remove what the RECORD lists, as pip does, and the metadata; not what it does not know."""
        (info,) = self.site.glob(f"{name}-*.dist-info")
        for path, *_ in csv.reader((info / "RECORD").read_text().splitlines()):
            (self.site / path).unlink(missing_ok=True)
        shutil.rmtree(info)

    def uninstall(self, name: str) -> None:
        shutil.rmtree(self.site / name)
        shutil.rmtree(next(self.site.glob(f"{name}-*.dist-info")))

    def add_patch(self, folder: str, name: str, old: Mapping[str, bytes], new: Mapping[str, bytes]) -> None:
        target = self.root / folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(f"Why\n\n{TRAILERS}\n".encode() + self.diff_trees(old, new))
        with (target.parent / "series").open("a") as listing:
            listing.write(f"{name}  # why\n")

    def pins(self) -> dict[str, tuple[Series, ...]]:
        return load_series(self.root)

    def states(self) -> list[State]:
        return [found.state for found in packages.status(site=self.site, root=self.root)]

    def apply(self, *names: str) -> list[packages.Outcome]:
        return packages.apply(names, site=self.site, root=self.root)

    def revert(self, *names: str) -> list[packages.Outcome]:
        return packages.revert(names, site=self.site, root=self.root)


def make_world(folder: Path, diff_trees: DiffTrees) -> World:
    """Two installed, locked, unpatched distributions; alpha has two patches and a test, beta a prefix upstream."""
    world = World(folder / "site", folder / "patches", diff_trees)
    world.site.mkdir()
    world.root.mkdir()
    world.install("alpha", "1.0", ALPHA_OLD)
    world.install("beta", "2.0", BETA_OLD)
    os.chmod(world.site / "alpha/core/a.py", 0o640)
    (world.root / "upstream.lock.toml").write_text(
        '[alpha]\nprefix = ""\npackage = "alpha/core"\n[beta]\nprefix = "python/"\npackage = "beta"\n'
    )
    test = {"tests/unit/test_a.py": b"def test_a(): pass\n"}
    half = {**ALPHA_OLD, "alpha/core/a.py": b"def f():\n    return 10\n"}
    world.add_patch("alpha/1.0", "0001-half.patch", ALPHA_OLD, half)
    world.add_patch("alpha/1.0", "0002-whole.patch", half, {**ALPHA_NEW, **test})
    upstream = [{f"python/{path}": data for path, data in files.items()} for files in (BETA_OLD, BETA_NEW)]
    world.add_patch("beta/2.0", "0001-beta.patch", *upstream)
    packages.lock("alpha", "1.0", site=world.site, root=world.root)
    packages.lock("Beta", "2.0", site=world.site, root=world.root)
    return world


def make_tree(folder: Path, files: Mapping[str, bytes], inside: str = "") -> Repo:
    """Return a git tree of alpha's source, with what makes it known as that, and a file of nobody's interest."""
    repo = init_repo(folder)
    more = {"alpha/core/__init__.py": b"", "alpha/core/version.py": b'__version__ = "1.0"\n', "setup.py": b"pass\n"}
    commit_files(repo, {inside + path: data for path, data in {**files, **more}.items()}, "as released")
    return repo


def commit_files(repo: Repo, files: Mapping[str, bytes], message: str) -> None:
    """Commit as a user does, on what is checked out."""
    for path, data in files.items():
        (repo.top / path).parent.mkdir(parents=True, exist_ok=True)
        (repo.top / path).write_bytes(data)
    repo.git("add", "--all")
    repo.git("-c", "user.name=Ann", "-c", "user.email=ann@home.example", "commit", "--quiet", "-m", message)


def other_series(world: World, root: Path) -> World:
    """Return the same site with another series for alpha, which also adds, removes and changes other files."""
    new = {**ALPHA_OLD, "alpha/core/a.py": b"def f():\n    return 3\n", "alpha/core/still.py": b"moved = 1\n"}
    new |= {"alpha/core/new/deep.py": b"other = 1\n", "alpha/core/new/older.py": b"other = 2\n"}
    del new["alpha/core/dos.py"]
    root.mkdir(exist_ok=True)
    other = World(world.site, root, world.diff_trees)
    if not (root / "alpha").exists():
        released = World(root / "released", root, world.diff_trees)
        released.site.mkdir()
        released.install("alpha", "1.0", ALPHA_OLD)
        (root / "upstream.lock.toml").write_text('[alpha]\nprefix = ""\npackage = "alpha/core"\n')
        other.add_patch("alpha/1.0", "0001-other.patch", ALPHA_OLD, new)
        packages.lock("alpha", "1.0", site=released.site, root=root)
    return other


def only_reads(event: str, args: tuple[object, ...]) -> bool:
    """Tell whether an audit event is that of a file which is opened to be read."""
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT
    return event == "open" and isinstance(args[2], int) and not args[2] & writing


def killed(number: int, is_step: Callable[[str, tuple[object, ...]], bool], call: Callable[[], object]) -> bool:
    """Say whether a process that makes the call was ended by SIGKILL before its numbered step; else it had fewer.

    is_step: tells of an audit event and its arguments whether it counts.
    """
    left = number

    def hook(event: str, args: tuple[object, ...]) -> None:
        nonlocal left
        if is_step(event, args):
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if not child:
        try:
            sys.addaudithook(hook)
            call()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or status == 0
    return os.WIFSIGNALED(status)
