"""A set of files is replaced as one, whatever fails on the way."""

import os
import py_compile
from collections.abc import Callable
from pathlib import Path

import pytest

from r3_adapter.errors import PatchError
from r3_adapter.patch import transaction
from r3_adapter.patch.transaction import Change, commit

Snapshot = dict[str, tuple[int, bytes]]

# Three files change, one appears in a new folder, one goes.
OLD = {"p/a.py": b"a = 1\n", "p/b.py": b"b = 1\n", "p/q/c.py": b"c = 1\n", "p/gone.py": b"pass\n"}
NEW = {"p/a.py": b"a = 2\n", "p/b.py": b"", "p/q/c.py": b"c = 2\n", "p/new/deep/d.py": b"pass\n"}


@pytest.fixture
def site(tmp_path: Path) -> Path:
    site = tmp_path / "site"
    for path, data in OLD.items():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_bytes(data)
    (site / "p/a.py").chmod(0o750)
    return site


def forward(site: Path) -> list[Change]:
    return [Change(site / path, OLD.get(path), NEW.get(path)) for path in sorted(OLD.keys() | NEW.keys())]


def backward(site: Path) -> list[Change]:
    return [Change(change.path, change.new, change.old) for change in forward(site)]


def files_below(folder: Path) -> Snapshot:
    """Modes and bytes of everything, folders too."""
    return {
        str(path.relative_to(folder)): (path.lstat().st_mode, b"" if path.is_dir() else path.read_bytes())
        for path in sorted(folder.rglob("*"))
    }


def bytes_below(folder: Path) -> dict[str, bytes]:
    return {path: data for path, (_, data) in files_below(folder).items() if not (folder / path).is_dir()}


def test_there_and_back(site: Path) -> None:
    before = files_below(site)
    commit(forward(site))
    assert bytes_below(site) == NEW
    assert (site / "p/a.py").stat().st_mode & 0o777 == 0o750
    py_compile.compile(str(site / "p/new/deep/d.py"), doraise=True)
    commit(backward(site))
    assert files_below(site) == before


def fail_at(n: int, what: Callable[..., None]) -> Callable[..., None]:
    """Let the n-th call fail, before it does anything."""
    calls = iter(range(1, 1000))

    def call(*args: object, **kwargs: object) -> None:
        if next(calls) == n:
            raise OSError(28, "No space left on device")
        what(*args, **kwargs)

    return call


@pytest.mark.parametrize("changes", [forward, backward])
@pytest.mark.parametrize(
    ("owner", "name", "times"),
    [(os, "replace", 4), (os, "fsync", 8), (Path, "unlink", 1), (transaction, "drop_bytecode", 1)],
)
def test_a_failure_at_any_point_leaves_all_as_it_was(
    site: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: Callable[[Path], list[Change]],
    owner: object,
    name: str,
    times: int,
) -> None:
    if changes is backward:
        commit(forward(site))
    before = files_below(site)
    for n in range(1, times + 1):
        with monkeypatch.context() as context:
            context.setattr(owner, name, fail_at(n, getattr(owner, name)))
            with pytest.raises(PatchError, match=r"nothing changed: .*No space left"):
                commit(changes(site))
        assert files_below(site) == before
    commit(changes(site))
    assert files_below(site) != before


def test_an_interrupt_is_rolled_back_and_passed_on(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, replace, calls = files_below(site), os.replace, iter(range(100))

    def interrupted(source: Path, target: Path) -> None:
        replace(source, target)
        if next(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        commit(forward(site))
    assert files_below(site) == before


def test_a_failed_rollback_names_the_files_and_keeps_their_bytes(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace, calls = os.replace, iter(range(100))

    def dying(source: Path, target: Path) -> None:
        if next(calls) > 0:
            raise OSError(5, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", dying)
    with pytest.raises(PatchError, match=r"not put back .*p/a\.py \(Input/output error\)"):
        commit(forward(site))
    assert (site / "p/.a.py.r3-old").read_bytes() == OLD["p/a.py"]


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_a_package_cache_is_never_written_through(
    site: Path, tmp_path: Path, link: Callable[[Path, Path], None]
) -> None:
    cache = tmp_path / "cache"
    for path in OLD:
        (cache / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).rename(cache / path)
        link(cache / path, site / path)
    kept = files_below(cache)
    commit(forward(site))
    assert bytes_below(site) == NEW
    assert files_below(cache) == kept
    commit(backward(site))
    assert bytes_below(site) == OLD
    assert files_below(cache) == kept
