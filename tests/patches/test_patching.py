"""Series are applied to installed packages as a whole or not at all; made-up packages stand for the engines."""

import importlib.util
import os
import py_compile
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from r3_adapter import cli
from r3_adapter.errors import PatchError
from r3_adapter.patch import packages, transaction
from r3_adapter.patch.packages import State

SPEC = importlib.util.spec_from_file_location("patched_world", Path(__file__).with_name("patched_world.py"))
made = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(made)
World, edit, files_below = made.World, made.edit, made.files_below
ALPHA_NEW, BETA_OLD, BETA_NEW = made.ALPHA_NEW, made.BETA_OLD, made.BETA_NEW


def assert_holds(site: Path, files: Mapping[str, bytes]) -> None:
    assert {path: (site / path).read_bytes() for path in files} == dict(files)


def test_apply_and_revert_are_exact_inverses(world: World) -> None:
    before = files_below(world.site)
    assert world.states() == [State.NOT_APPLIED, State.NOT_APPLIED]
    alpha, beta = world.apply()
    assert (len(alpha.changed), len(beta.changed)) == (5, 1)
    assert_holds(world.site, ALPHA_NEW | BETA_NEW)
    assert world.states() == [State.APPLIED, State.APPLIED]
    after = files_below(world.site)
    records = {"r3-patch-alpha.json", "r3-patch-beta.json"}
    assert after.keys() - before.keys() == {"alpha/core/new", "alpha/core/new/deep.py", *records}
    assert before.keys() - after.keys() == {"alpha/core/gone.py"}
    assert after["alpha/core/a.py"][0] == before["alpha/core/a.py"][0]  # mode 0o640
    world.revert()
    assert files_below(world.site) == before


def test_second_time_does_nothing_and_needs_no_write_access(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for move in (world.apply, world.revert):
        move()
        times = {path: path.stat().st_mtime_ns for path in world.site.rglob("*")}
        with monkeypatch.context() as context:
            context.delattr(packages, "exclusive")
            assert [outcome.changed for outcome in move()] == [(), ()]
        assert {path: path.stat().st_mtime_ns for path in world.site.rglob("*")} == times


def test_only_the_named_distribution_is_patched(world: World) -> None:
    world.apply("BETA")
    assert world.states() == [State.NOT_APPLIED, State.APPLIED]
    assert [bool(outcome.changed) for outcome in world.apply()] == [True, False]


def other_version(world: World) -> None:
    world.uninstall("beta")
    world.install("beta", "3.0", BETA_OLD)


def drop_package(world: World) -> None:
    world.uninstall("beta")


def edit_file(world: World) -> None:
    (world.site / "beta/b.py").write_bytes(b"b = 1\n\n")


def remove_file(world: World) -> None:
    (world.site / "beta/b.py").unlink()


def occupy_new_file(world: World) -> None:
    (world.site / "alpha/core/new").mkdir()
    (world.site / "alpha/core/new/deep.py").write_bytes(b"mine\n")


def change_patch(world: World) -> None:
    edit(world.root / "beta/2.0/0001-beta.patch", "+b = 2", "+b = 3")


def unlocked_patch(world: World) -> None:
    world.add_patch("beta/2.0", "0002-more.patch", {"python/beta/c.py": b"1\n"}, {"python/beta/c.py": b"2\n"})


def two_metadata(world: World) -> None:
    shutil.copytree(world.site / "beta-2.0.dist-info", world.site / "beta-1.9.dist-info")
    edit(world.site / "beta-1.9.dist-info/METADATA", "2.0", "1.9")


def linked_folder(world: World) -> None:
    (world.site / "beta").rename(world.site.parent / "elsewhere")
    (world.site / "beta").symlink_to(world.site.parent / "elsewhere")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (drop_package, r"^beta: not installed \(patches are for 2\.0\)$"),
        (other_version, r"beta 3\.0: version not pinned: installed 3\.0 != 2\.0"),
        (
            edit_file,
            r"^beta 2\.0: edited: neither released nor patched by a known series: beta/b\.py; undo the edit or ",
        ),
        (remove_file, r"^beta 2\.0: edited: neither released nor patched by a known series: beta/b\.py; undo the edit"),
        (
            occupy_new_file,
            r"patched by a known series: alpha/core/new/deep\.py; move alpha/core/new/deep\.py away; then",
        ),
        (change_patch, r"beta 2\.0: beta/b\.py: result [0-9a-f]{64} != [0-9a-f]{64} of the lock"),
        (unlocked_patch, r"0002-more\.patch: python/beta/c\.py: not in upstream\.lock\.toml"),
        (two_metadata, r"several versions: \['1\.9', '2\.0'\]"),
        (linked_folder, r"its folder is really .*elsewhere"),
    ],
)
def test_refusal_changes_nothing(world: World, spoil: Callable[[World], None], message: str) -> None:
    spoil(world)
    before = files_below(world.site)
    with pytest.raises(PatchError, match=message):
        world.apply("alpha", "beta")
    assert files_below(world.site) == before


@pytest.mark.parametrize("spoil", [edit_file, remove_file, change_patch])
def test_revert_refuses_likewise(world: World, spoil: Callable[[World], None]) -> None:
    world.apply()
    spoil(world)
    before = files_below(world.site)
    with pytest.raises(PatchError, match=r"beta"):
        world.revert()
    assert files_below(world.site) == before


def test_unknown_names_and_empty_sites_are_errors(world: World, tmp_path: Path) -> None:
    with pytest.raises(PatchError, match=r"gamma: no such distribution .* only alpha, beta"):
        world.apply("gamma")
    with pytest.raises(PatchError, match="not a folder"):
        packages.apply(site=tmp_path / "nowhere", root=world.root)
    world.uninstall("beta")
    assert [outcome.distribution for outcome in world.apply()] == ["alpha"]
    world.uninstall("alpha")
    with pytest.raises(PatchError, match=r"alpha: not installed .*; beta: not installed"):
        world.apply()


def test_series_is_picked_by_installed_version(world: World) -> None:
    other = {"beta/b.py": b"b = 10\n"}
    world.uninstall("beta")
    world.install("beta", "3.0", other)
    upstream = {"python/beta/b.py": b"b = 10\n"}
    world.add_patch("beta/3.0", "0001-beta.patch", upstream, {"python/beta/b.py": b"b = 30\n"})
    packages.lock("beta", "3.0", site=world.site, root=world.root)
    assert [series.version for series in world.pins()["beta"]] == ["2.0", "3.0"]
    world.apply()
    assert_holds(world.site, {"beta/b.py": b"b = 30\n"})
    world.uninstall("beta")
    world.install("beta", "2.0", BETA_OLD)
    world.apply()
    assert_holds(world.site, BETA_NEW)


def test_stale_bytecode_is_not_used(world: World) -> None:
    source = world.site / "alpha/core/a.py"
    code = "import alpha.core.a as a; print(a.f())"

    def result() -> str:
        env = {**os.environ, "PYTHONPATH": str(world.site), "PYTHONDONTWRITEBYTECODE": "1"}
        return subprocess.run([sys.executable, "-c", code], env=env, check=True, capture_output=True, text=True).stdout

    for move, value in ((world.apply, "2\n"), (world.revert, "1\n")):
        py_compile.compile(str(source), doraise=True)
        py_compile.compile(str(source), doraise=True, optimize=2)
        stat = source.stat()
        move()
        os.utime(source, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as if it all happened within a second
        assert source.stat().st_size == stat.st_size
        assert result() == value
    assert not list(world.site.rglob("*.pyc"))


def test_two_at_once_do_the_work_once(world: World) -> None:
    changed: list[tuple[str, ...]] = []

    def work() -> None:
        changed.extend(outcome.changed for outcome in world.apply("alpha"))

    threads = [threading.Thread(target=work) for _ in range(4)]
    with transaction.exclusive(world.site):
        for thread in threads:
            thread.start()
        threads[0].join(timeout=0.3)
        assert all(thread.is_alive() for thread in threads)
        assert world.states() == [State.NOT_APPLIED, State.NOT_APPLIED]
    for thread in threads:
        thread.join()
    assert sorted(map(len, changed)) == [0, 0, 0, 5]
    assert not list(world.site.rglob(".*"))


def test_command_line(world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(packages, "patches_root", lambda: world.root)

    def r3(*args: str) -> tuple[int, str, str]:
        code = cli.main(["patch", *args, "--site", str(world.site)])
        return (code, *capsys.readouterr())

    assert r3("verify") == (1, "alpha 1.0: not applied\nbeta 2.0: not applied\n", "")
    assert r3("lock", "beta", "2.0") == (0, "beta 2.0: locked 1 files\n", "")
    assert r3("apply") == (0, "alpha 1.0: applied, 5 files changed\nbeta 2.0: applied, 1 files changed\n", "")
    assert r3("apply", "beta") == (0, "beta 2.0: already applied, nothing to do\n", "")
    assert r3("verify") == (0, "alpha 1.0: applied\nbeta 2.0: applied\n", "")
    edit_file(world)
    assert r3("verify", "alpha")[0] == 0
    code, out, _ = r3("verify")
    assert code == 1
    assert "beta 2.0: edited: neither released nor patched by a known series: beta/b.py; undo" in out
    code, out, err = r3("revert")
    assert (code, out) == (2, "alpha 1.0: reverted, 5 files changed\n")  # one's trouble is not the other's
    assert err.startswith("r3: beta 2.0: edited")
    assert err.count("\n") == 1
    assert r3("apply")[:2] == (2, "alpha 1.0: applied, 5 files changed\n")
    world.uninstall("beta")
    (world.site / "r3-patch-beta.json").unlink()
    expected = "alpha: applied (installed: 1.0; pinned: 1.0)\nbeta: not installed (installed: -; pinned: 2.0)\n"
    assert r3("status") == (0, expected, "")
    assert r3("verify")[0] == 0
    assert r3("verify", "beta") == (1, "beta: not installed (patches are for 2.0)\n", "")
    world.uninstall("alpha")
    assert r3("verify")[0] == 1
    assert r3("apply")[0] == 2


def test_the_command_line_loads_no_engine() -> None:
    code = "import sys, r3_adapter.cli; print({'torch', 'numpy', 'sglang', 'megatron'} & {*sys.modules})"
    path = str(Path(cli.__file__).parents[1])
    ran = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, check=True, capture_output=True, text=True
    )
    assert ran.stdout == "set()\n"
