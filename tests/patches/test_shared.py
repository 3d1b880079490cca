"""Patches that several versions share lie in one folder, only add files, and belong to each series that lists them."""

import importlib.util
from pathlib import Path

import pytest

from r3_adapter.errors import PatchError
from r3_adapter.patch import packages, series
from r3_adapter.patch.packages import State
from r3_adapter.patch.series import SHARED, read_patches, unlisted, write_upstream_tests

SPEC = importlib.util.spec_from_file_location("patched_world", Path(__file__).with_name("patched_world.py"))
made = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(made)
World = made.World

ADDED = {"alpha/core/new/substance.py": b"def g():\n    return 5\n", "tests/unit/test_g.py": b"def test_g(): pass\n"}
HOOKED = {**made.ALPHA_OLD, "alpha/core/still.py": b"import alpha.core.new.substance\n"}


def write_series(world: World, *lines: str, version: str = "1.0") -> None:
    (world.root / "alpha" / version / "series").write_text("".join(f"{line}\n" for line in lines))


@pytest.fixture
def shared(world: World) -> World:
    """Alpha's series: a hook in a file that the release has, and a shared patch before it."""
    for path in (world.root / "alpha/1.0").iterdir():
        path.unlink()
    world.add_patch(f"alpha/{SHARED}", "0001-substance.patch", {}, ADDED)
    (world.root / "alpha" / SHARED / "series").unlink()
    world.add_patch("alpha/1.0", "0002-hook.patch", made.ALPHA_OLD, HOOKED)
    write_series(world, f"../{SHARED}/0001-substance.patch  # for all", "0002-hook.patch")
    return world


def lock(world: World) -> series.Series:
    return packages.lock("alpha", "1.0", site=world.site, root=world.root)


def test_a_shared_patch_is_applied_verified_and_taken_back(shared: World, tmp_path: Path) -> None:
    before = made.files_below(shared.site)
    assert set(lock(shared).files) == {"alpha/core/new/substance.py", "alpha/core/still.py"}
    shared.apply("alpha")
    assert (shared.site / "alpha/core/new/substance.py").read_bytes() == ADDED["alpha/core/new/substance.py"]
    assert shared.states()[0] is State.APPLIED
    assert [path.name for path in write_upstream_tests(shared.pins()["alpha"][0], tmp_path / "out")] == ["test_g.py"]
    shared.revert("alpha")
    assert made.files_below(shared.site) == before


def test_two_versions_have_the_same_bytes(shared: World) -> None:
    lock(shared)
    shared.apply("alpha")
    shared.uninstall("alpha")
    newer = {**made.ALPHA_OLD, "alpha/core/still.py": b"other = 1\n"}
    shared.install("alpha", "1.1", newer)
    shared.add_patch("alpha/1.1", "0002-hook.patch", newer, HOOKED)
    write_series(shared, f"../{SHARED}/0001-substance.patch", "0002-hook.patch", version="1.1")
    packages.lock("alpha", "1.1", site=shared.site, root=shared.root)
    one, other = shared.pins()["alpha"]
    assert read_patches(one)[0] == read_patches(other)[0]
    assert one.files["alpha/core/new/substance.py"] == other.files["alpha/core/new/substance.py"]
    shared.apply("alpha")
    assert shared.states()[0] is State.APPLIED


def test_a_version_whose_files_are_those_of_another_takes_its_patches(shared: World) -> None:
    lock(shared)
    shared.uninstall("alpha")
    shared.install("alpha", "1.1", made.ALPHA_OLD)
    (shared.root / "alpha/1.1").mkdir()
    write_series(shared, f"../{SHARED}/0001-substance.patch", "../1.0/0002-hook.patch", version="1.1")
    packages.lock("alpha", "1.1", site=shared.site, root=shared.root)
    one, other = shared.pins()["alpha"]
    assert read_patches(one) == read_patches(other)
    assert one.files == other.files
    shared.apply("alpha")
    assert shared.states()[0] is State.APPLIED


def test_a_patch_of_another_version_does_not_apply_to_other_files(shared: World) -> None:
    lock(shared)
    shared.uninstall("alpha")
    shared.install("alpha", "1.1", {**made.ALPHA_OLD, "alpha/core/still.py": b"other = 1\n"})
    (shared.root / "alpha/1.1").mkdir()
    write_series(shared, f"../{SHARED}/0001-substance.patch", "../1.0/0002-hook.patch", version="1.1")
    with pytest.raises(PatchError, match=r"0002-hook\.patch: alpha/core/still\.py"):
        packages.lock("alpha", "1.1", site=shared.site, root=shared.root)


@pytest.mark.parametrize(
    "new",
    [
        {"alpha/core/still.py": b"changed = 1\n"},
        {"alpha/core/still.py": None},
        {"alpha/core/still.py": b"changed = 1\n", "alpha/core/more.py": b"more = 1\n"},
    ],
)
def test_a_shared_patch_that_changes_a_file_is_refused(shared: World, new: dict[str, bytes | None]) -> None:
    merged = {path: data for path, data in {**made.ALPHA_OLD, **new}.items() if data is not None}
    shared.add_patch(f"alpha/{SHARED}", "0003-more.patch", made.ALPHA_OLD, merged)
    write_series(shared, f"../{SHARED}/0001-substance.patch", "0002-hook.patch", f"../{SHARED}/0003-more.patch")
    with pytest.raises(PatchError, match=r"0003-more\.patch: alpha/core/still\.py: a shared patch only adds files"):
        lock(shared)


def test_a_listing_out_of_order_is_refused(shared: World) -> None:
    first, hook = f"../{SHARED}/0001-substance.patch", "0002-hook.patch"

    def refused(message: str, *lines: str) -> None:
        write_series(shared, *lines)
        with pytest.raises(PatchError, match=message):
            lock(shared)

    refused(r"lists 0001-substance\.patch 2 times", first, hook, first)
    refused(r"lists 0002-hook\.patch 2 times", hook, f"../{SHARED}/{hook}")
    refused(r"lists what is not there: .*0009-none\.patch", first, hook, f"../{SHARED}/0009-none.patch")
    refused(r"lists \[\] != the folder's \['0002-hook\.patch'\]", first)
    refused(r"lists what is not there: .*1\.1/0001-x\.patch", hook, "../1.1/0001-x.patch")
    for line in (
        f"../1.0/{hook}",
        f"../{SHARED}/../1.0/{hook}",
        f"{SHARED}/0001-substance.patch",
        "notes.txt",
        "../../x.patch",
    ):
        refused(r"is neither NAME\.patch nor \.\./shared/NAME\.patch", hook, line)


def test_a_shared_patch_that_no_series_lists_is_refused(shared: World) -> None:
    assert unlisted(shared.root / "alpha") == []
    write_series(shared, f"# ../{SHARED}/0001-substance.patch", "0002-hook.patch")
    assert [path.name for path in unlisted(shared.root / "alpha")] == ["0001-substance.patch"]
    with pytest.raises(PatchError, match=r"alpha: no series lists .*shared/0001-substance\.patch"):
        lock(shared)


def test_the_shared_folder_is_no_version(shared: World) -> None:
    lock_file = shared.root / "upstream.lock.toml"
    lock_file.write_text(f'[alpha]\nprefix = ""\npackage = "alpha/core"\n[alpha.versions."{SHARED}"]\n')
    with pytest.raises(PatchError, match=r"alpha shared: the folder of patches that versions share is no version"):
        shared.pins()
