"""The lock pins what a series is made for; a series or a lock out of order is refused."""

import importlib.util
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest

from r3_adapter.errors import PatchError
from r3_adapter.patch import packages, series
from r3_adapter.patch.series import read_patches, write_upstream_tests

SPEC = importlib.util.spec_from_file_location("patched_world", Path(__file__).with_name("patched_world.py"))
made = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(made)
World, edit = made.World, made.edit


def test_lock_refuses_what_is_not_as_released(world: World) -> None:
    lock_file = (world.root / "upstream.lock.toml").read_bytes()

    def refused(message: str, version: str = "1.0") -> None:
        with pytest.raises(PatchError, match=message):
            packages.lock("alpha", version, site=world.site, root=world.root)
        assert (world.root / "upstream.lock.toml").read_bytes() == lock_file

    refused(r"installed version \(1\.0\) != version to lock \(1\.1\)", "1.1")
    world.apply()
    refused(r"alpha/core/a\.py: not as released")
    world.revert()
    (world.site / "alpha/core/new").mkdir()
    (world.site / "alpha/core/new/deep.py").write_bytes(b"mine\n")
    refused(r"alpha/core/new/deep\.py: not as released")
    shutil.rmtree(world.site / "alpha/core/new")
    packages.lock("alpha", "1.0", site=world.site, root=world.root)
    assert (world.root / "upstream.lock.toml").read_bytes() == lock_file


def test_lock_refuses_a_series_out_of_order(world: World) -> None:
    def refused(message: str) -> None:
        with pytest.raises(PatchError, match=message):
            packages.lock("beta", "2.0", site=world.site, root=world.root)

    def patch(new: Mapping[str, bytes]) -> None:
        shutil.rmtree(world.root / "beta")
        old = {"python/beta/b.py": b"b = 1\n", "test/t.py": b"1\n", "docs/x.md": b"1\n", "python/other.py": b"1\n"}
        world.add_patch("beta/2.0", "0001-x.patch", old, {**old, **new})

    patch({"python/other.py": b"2\n"})
    refused(r"0001-x\.patch: python/other\.py: neither in python/beta/ nor in test/ or tests/")
    patch({"docs/x.md": b"2\n"})
    refused(r"docs/x\.md: neither in")
    patch({"test/t.py": b"2\n", "python/beta/b.py": b"b = 2\n"})
    refused(r"test/t\.py: the file does not exist")
    patch({"test/new.py": b"2\n"})
    refused("leaves as it was: beta")
    patch({"python/beta/b.py": b"b = 2\n"})
    edit(world.root / "beta/2.0/0001-x.patch", "Forwarded", "Forward")
    refused(r"0001-x\.patch: header lacks the trailers Forwarded")
    (world.root / "beta/2.0/0002-y.patch").touch()
    refused(r"lists \['0001-x.patch'\] != the folder's \['0001-x.patch', '0002-y.patch'\]")
    listing = world.root / "beta/2.0/series"
    listing.write_text("0001-x.patch\n0002-y.patch\n0001-x.patch\n")
    refused(r"series: lists 0001-x\.patch 2 times")
    listing.unlink()
    refused("beta 2.0: no file")


HEAD = '[a]\nprefix = ""\npackage = "p"\n[a.versions."1"]\n'


@pytest.mark.parametrize(
    "text",
    [
        "[a",
        "a = 1",
        "[a]\nprefix = ''",
        "[a]\nprefix = ''\npackage = 1",
        HEAD + '"p/x" = { before = "0", after = "absent" }',
        HEAD + '"p/x" = { before = "absent", after = "absent" }',
        HEAD + f'"p/../x" = {{ before = "absent", after = "{"0" * 64}" }}',
        HEAD + f'"q/x" = {{ before = "absent", after = "{"0" * 64}" }}',
    ],
)
def test_a_malformed_lock_is_refused(world: World, text: str) -> None:
    (world.root / "upstream.lock.toml").write_text(text)
    with pytest.raises(PatchError, match=r"upstream\.lock\.toml"):
        world.states()


def test_upstream_tests_are_written_but_not_installed(world: World, tmp_path: Path) -> None:
    world.apply()
    assert not (world.site / "tests").exists()
    (alpha,) = world.pins()["alpha"]
    assert [sum(diff.added + diff.removed for diff in patch.diffs) for patch in read_patches(alpha)] == [2, 10]
    (written,) = write_upstream_tests(alpha, tmp_path / "out")
    assert written == tmp_path / "out/tests/unit/test_a.py"
    assert written.read_bytes() == b"def test_a(): pass\n"


def test_series_are_found_beside_a_checkout_and_inside_a_wheel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(series, "__file__", str(tmp_path / "r3_adapter/patch/series.py"))
    assert series.patches_root() == tmp_path / "patches"
    (tmp_path / "r3_adapter/patches").mkdir(parents=True)
    assert series.patches_root() == tmp_path / "r3_adapter/patches"
