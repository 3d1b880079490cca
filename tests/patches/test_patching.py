"""Series are applied to installed packages as a whole or not at all; made-up packages stand for the engines."""

import os
import py_compile
import shutil
import subprocess
import sys
import threading
from base64 import urlsafe_b64encode
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import pytest

from r3_adapter import cli, patching, series, transaction
from r3_adapter.errors import PatchError
from r3_adapter.patching import State
from r3_adapter.series import Series, load_series, read_patches, write_upstream_tests

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
        return [found.state for found in patching.status(site=self.site, root=self.root)]

    def apply(self, *names: str) -> list[patching.Outcome]:
        return patching.apply(names, site=self.site, root=self.root)

    def revert(self, *names: str) -> list[patching.Outcome]:
        return patching.revert(names, site=self.site, root=self.root)


@pytest.fixture
def world(tmp_path: Path, diff_trees: DiffTrees) -> World:
    """Two installed, locked, unpatched distributions; alpha has two patches and a test, beta a prefix upstream."""
    world = World(tmp_path / "site", tmp_path / "patches", diff_trees)
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
    patching.lock("alpha", "1.0", site=world.site, root=world.root)
    patching.lock("Beta", "2.0", site=world.site, root=world.root)
    return world


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
    assert after.keys() - before.keys() == {"alpha/core/new", "alpha/core/new/deep.py"}
    assert before.keys() - after.keys() == {"alpha/core/gone.py"}
    assert after["alpha/core/a.py"][0] == before["alpha/core/a.py"][0]  # mode 0o640
    world.revert()
    assert files_below(world.site) == before


def test_second_time_does_nothing_and_needs_no_write_access(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for move in (world.apply, world.revert):
        move()
        times = {path: path.stat().st_mtime_ns for path in world.site.rglob("*")}
        with monkeypatch.context() as context:
            context.delattr(patching, "exclusive")
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


def half_patched(world: World) -> None:
    (world.site / "alpha/core/a.py").write_bytes(ALPHA_NEW["alpha/core/a.py"])


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


HASH = sha256(b"b = 1\n\n").hexdigest()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (drop_package, r"^beta: not installed \(patches are for 2\.0\)$"),
        (other_version, r"beta 3\.0: version not pinned: installed 3\.0 != 2\.0"),
        (
            edit_file,
            rf"beta 2\.0: edited: (?s:.*)beta/b\.py: sha256 {HASH} != [0-9a-f]{{64}} \(released\), != [0-9a-f]{{64}}",
        ),
        (remove_file, r"beta/b\.py: sha256 absent != [0-9a-f]{64}"),
        (
            half_patched,
            r"mixed: .*\n  patched: alpha/core/a\.py\n  not patched: alpha/core/dos\.py, alpha/core/gone\.py",
        ),
        (occupy_new_file, r"alpha/core/new/deep\.py: sha256 [0-9a-f]{64} != absent \(released\)"),
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


@pytest.mark.parametrize("spoil", [edit_file, half_patched, change_patch])
def test_revert_refuses_likewise(world: World, spoil: Callable[[World], None]) -> None:
    world.apply()
    if spoil is half_patched:
        (world.site / "beta/b.py").write_bytes(b"edited\n")
    else:
        spoil(world)
    before = files_below(world.site)
    with pytest.raises(PatchError, match=r"beta"):
        world.revert()
    assert files_below(world.site) == before


def test_unknown_names_and_empty_sites_are_errors(world: World, tmp_path: Path) -> None:
    with pytest.raises(PatchError, match=r"gamma: no such distribution .* only alpha, beta"):
        world.apply("gamma")
    with pytest.raises(PatchError, match="not a folder"):
        patching.apply(site=tmp_path / "nowhere", root=world.root)
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
    patching.lock("beta", "3.0", site=world.site, root=world.root)
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


def test_lock_refuses_what_is_not_as_released(world: World) -> None:
    lock_file = (world.root / "upstream.lock.toml").read_bytes()

    def refused(message: str, version: str = "1.0") -> None:
        with pytest.raises(PatchError, match=message):
            patching.lock("alpha", version, site=world.site, root=world.root)
        assert (world.root / "upstream.lock.toml").read_bytes() == lock_file

    refused(r"installed version \(1\.0\) != version to lock \(1\.1\)", "1.1")
    world.apply()
    refused(r"alpha/core/a\.py: not as released")
    world.revert()
    occupy_new_file(world)
    refused(r"alpha/core/new/deep\.py: not as released")
    shutil.rmtree(world.site / "alpha/core/new")
    patching.lock("alpha", "1.0", site=world.site, root=world.root)
    assert (world.root / "upstream.lock.toml").read_bytes() == lock_file


def test_lock_refuses_a_series_out_of_order(world: World) -> None:
    def refused(message: str) -> None:
        with pytest.raises(PatchError, match=message):
            patching.lock("beta", "2.0", site=world.site, root=world.root)

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
    (world.root / "beta/2.0/series").unlink()
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
        HEAD + f'"p/../x" = {{ before = "absent", after = "{HASH}" }}',
        HEAD + f'"q/x" = {{ before = "absent", after = "{HASH}" }}',
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
    assert [patch.changed for patch in read_patches(alpha)] == [2, 10]
    (written,) = write_upstream_tests(alpha, tmp_path / "out")
    assert written == tmp_path / "out/tests/unit/test_a.py"
    assert written.read_bytes() == b"def test_a(): pass\n"


def test_series_are_found_beside_a_checkout_and_inside_a_wheel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(series, "__file__", str(tmp_path / "r3_adapter/series.py"))
    assert series.patches_root() == tmp_path / "patches"
    (tmp_path / "r3_adapter/patches").mkdir(parents=True)
    assert series.patches_root() == tmp_path / "r3_adapter/patches"


def test_command_line(world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(patching, "patches_root", lambda: world.root)

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
    assert f"beta/b.py: sha256 {HASH}" in out
    code, out, err = r3("revert")
    assert (code, out) == (2, "")
    assert err.startswith("r3: beta 2.0: edited")
    world.uninstall("beta")
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
