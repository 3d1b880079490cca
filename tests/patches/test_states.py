"""From any state that an installation can be in, its own files and nobody else's are brought to the right one."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from r3_adapter.errors import PatchError
from r3_adapter.patch import packages, transaction
from r3_adapter.patch.packages import State, Status

SPEC = importlib.util.spec_from_file_location("patched_world", Path(__file__).with_name("patched_world.py"))
made = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(made)
World, files_below, other_series = made.World, made.files_below, made.other_series
ALPHA_OLD, ALPHA_NEW = made.ALPHA_OLD, made.ALPHA_NEW
ADDED = "alpha/core/new/deep.py"


def alpha(world: World) -> Status:
    return packages.status(["alpha"], site=world.site, root=world.root)[0]


def package_bytes(world: World) -> dict[str, bytes]:
    below = world.site / "alpha"
    return {str(path.relative_to(world.site)): path.read_bytes() for path in below.rglob("*") if path.is_file()}


def reinstall(world: World, version: str = "1.0") -> None:
    world.pip_uninstall("alpha")
    world.install("alpha", version, ALPHA_OLD)
    (world.site / "alpha/core/a.py").chmod(0o640)


@pytest.mark.parametrize("keep_record", [True, False])
@pytest.mark.parametrize("move", ["apply", "revert"])
def test_a_file_that_a_reinstallation_left_is_ours(world: World, move: str, keep_record: bool) -> None:
    world.apply("alpha")
    reinstall(world)
    if not keep_record:
        (world.site / "r3-patch-alpha.json").unlink()
    assert (alpha(world).state, alpha(world).leftovers) == (State.LEFTOVER, [ADDED])
    assert packages.explain(alpha(world)) == (
        f"alpha 1.0: leftover: a patch added {ADDED}, which reinstalling left there;"
        " `r3 patch apply` patches it, `r3 patch revert` removes what was left"
    )
    world.apply("beta")  # is not kept from it
    getattr(world, move)()
    assert package_bytes(world) == (ALPHA_NEW if move == "apply" else ALPHA_OLD)


def test_a_foreign_file_in_its_place_is_never_removed(world: World) -> None:
    world.apply()
    reinstall(world)
    (world.site / ADDED).write_bytes(b"mine\n")
    before = files_below(world.site)
    for move in (world.apply, world.revert):
        with pytest.raises(PatchError, match=rf"series: {ADDED}; move {ADDED} away; then `r3 patch apply`$"):
            move("alpha")
    assert files_below(world.site) == before


@pytest.mark.parametrize("move", ["apply", "revert"])
@pytest.mark.parametrize("after", [lambda world: None, reinstall], ids=["patched", "reinstalled"])
def test_what_an_older_series_did_is_brought_to_this_one(
    world: World, tmp_path: Path, move: str, after: Callable[[World], None]
) -> None:
    released = files_below(world.site)
    other_series(world, tmp_path / "older").apply("alpha")
    after(world)
    assert alpha(world).state is (State.LEFTOVER if after is reinstall else State.OTHER)
    getattr(world, move)("alpha")
    assert package_bytes(world) == (ALPHA_NEW if move == "apply" else ALPHA_OLD)
    if move == "apply":
        world.revert("alpha")
    assert files_below(world.site) == released


def test_a_later_version_has_no_files_of_ours(world: World) -> None:
    world.apply("alpha")
    reinstall(world, "1.1")
    assert alpha(world).state is State.NOT_PINNED
    with pytest.raises(PatchError, match=rf"1\.1 != 1\.0, .* earlier patches left {ADDED}: `r3 patch revert` removes"):
        world.apply("alpha")
    world.revert("alpha")
    assert package_bytes(world) == ALPHA_OLD
    assert not list(world.site.glob("r3-patch-*"))
    with pytest.raises(PatchError, match="version not pinned"):
        world.revert("alpha")


def test_a_file_that_a_later_version_has_itself_is_kept(world: World) -> None:
    world.apply("alpha")
    world.pip_uninstall("alpha")
    shipped = {**ALPHA_OLD, ADDED: ALPHA_NEW[ADDED]}
    world.install("alpha", "1.1", shipped)
    world.revert("alpha")
    assert package_bytes(world) == shipped


def test_what_an_uninstallation_left_is_removed(world: World) -> None:
    world.apply("alpha")
    world.pip_uninstall("alpha")
    assert (alpha(world).state, alpha(world).leftovers) == (State.NOT_INSTALLED, [ADDED])
    world.revert()
    assert not (world.site / "alpha").exists()
    assert not list(world.site.glob("r3-patch-*"))


@pytest.mark.parametrize("version", ["1.0", "1.1.dev3"])
def test_an_editable_install_is_named(world: World, version: str) -> None:
    shutil.rmtree(world.site / "alpha")
    origin = {"url": "file:///src/my%20alpha", "dir_info": {"editable": True}}
    info = world.site / "alpha-1.0.dist-info"
    (info / "direct_url.json").write_text(json.dumps(origin))
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: alpha\nVersion: {version}\n")
    with pytest.raises(PatchError) as caught:
        world.apply("alpha")
    assert str(caught.value) == (
        f"alpha {version}: editable install of file:///src/my%20alpha;"
        " `r3 patch apply --source '/src/my alpha'` patches its git tree"
    )


@pytest.mark.parametrize(("version", "wheel"), [("1.1", ""), ("1.1.dev3+g0abc", " --wheel FILE")])
def test_a_version_without_a_series_says_how_near_the_nearest_is(world: World, version: str, wheel: str) -> None:
    world.uninstall("alpha")
    world.install("alpha", version, {**ALPHA_OLD, "alpha/core/a.py": b"def f():\n    return 7\n"})
    with pytest.raises(PatchError) as caught:
        world.apply("alpha")
    near = f"the nearest series is that for 1.0: 3 of 5 hunks fit; `r3 patch rebase alpha {version}{wheel}` makes one"
    reason = f"version not pinned: installed {version} != 1.0, which the patches are for"
    assert str(caught.value) == f"alpha {version}: {reason}; {near}"
    (found,) = packages.status(["alpha"], site=world.site, root=world.root)
    assert packages.advice(found) == near


def test_metadata_without_a_version_is_named_and_does_not_block(world: World) -> None:
    (world.site / "alpha-1.0.dist-info/METADATA").unlink()
    assert world.states() == [State.UNREADABLE, State.NOT_APPLIED]
    with pytest.raises(PatchError, match=r"alpha: its metadata .* gives no version"):
        world.apply("alpha")


@pytest.mark.parametrize("text", ["", "[]", '{"version": "1.0", "files": {"alpha/core/../../x": {}}}', "[" * 10**5])
def test_a_damaged_record_is_refused(world: World, text: str) -> None:
    (world.site / "r3-patch-alpha.json").write_text(text)
    before = files_below(world.site)
    with pytest.raises(PatchError, match=r"r3-patch-alpha\.json: .*; move it away"):
        world.apply("alpha")
    assert files_below(world.site) == before


def test_a_linked_site_is_the_same_site(world: World, tmp_path: Path) -> None:
    released = files_below(world.site)
    (tmp_path / "link").symlink_to(world.site)
    linked = World(tmp_path / "link", world.root, world.diff_trees)
    linked.apply()
    assert world.states() == [State.APPLIED, State.APPLIED]
    linked.revert()
    assert files_below(world.site) == released


def test_a_link_to_nothing_is_not_replaced(world: World) -> None:
    (world.site / ADDED).parent.mkdir()
    (world.site / ADDED).symlink_to("elsewhere")
    with pytest.raises(PatchError, match=f"{ADDED}: a link to a file that does not exist"):
        world.apply("alpha")
    assert (world.site / ADDED).is_symlink()


def test_what_is_added_can_be_read_by_those_who_read_the_rest(world: World) -> None:
    before = files_below(world.site)
    umask = os.umask(0o077)
    try:
        world.apply()
        modes = {path: mode for path, (mode, _) in files_below(world.site).items()}
        world.revert()
    finally:
        os.umask(umask)
    assert modes[ADDED] == modes["r3-patch-alpha.json"] == modes["alpha/core/still.py"] == 0o100644
    assert modes["alpha/core/new"] == modes["alpha/core"] == 0o40755
    assert files_below(world.site) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to others")
def test_owners_are_kept(world: World) -> None:
    for path in (world.site, *world.site.rglob("*")):
        os.chown(path, 1234, 1235)
    world.apply()
    assert {(path.stat().st_uid, path.stat().st_gid) for path in world.site.rglob("*")} == {(1234, 1235)}
    world.revert()
    assert {(path.stat().st_uid, path.stat().st_gid) for path in world.site.rglob("*")} == {(1234, 1235)}


def as_nobody(world: World, move: str) -> str:
    """Make a move as a user that may not do everything; return the refusal."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.setgid(65534)
        os.setuid(65534)
        try:
            getattr(world, move)("alpha")
        except PatchError as error:
            os.write(write, str(error).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(write)
    with os.fdopen(read) as said:
        return said.read()


@pytest.mark.filterwarnings("ignore:.*fork")
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_a_site_that_may_not_be_written(world: World) -> None:
    for folder in (world.site, *world.site.parents):
        if tempfile.gettempdir() not in map(str, folder.parents):
            break
        folder.chmod(0o755)
    (world.site / "alpha/core/a.py").chmod(0o644)
    before = files_below(world.site)
    assert "cannot be written and locked: Permission denied" in as_nobody(world, "apply")
    for folder in (world.site, *world.site.rglob("*")):
        folder.chmod(0o777)
    opened = files_below(world.site)
    assert "only its owner 0:0 or root can patch it" in as_nobody(world, "apply")
    assert files_below(world.site) == opened
    assert before.keys() == opened.keys()
    world.apply("alpha")
    for folder in (world.site, *world.site.rglob("*")):
        folder.chmod(0o755)
    assert as_nobody(world, "apply") == ""


def test_who_is_waited_for_is_said_and_not_for_ever(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = (
        "import sys, pathlib, r3_adapter.patch.transaction as t\n"
        "with t.exclusive(pathlib.Path(sys.argv[1])): print(flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(world.site)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        holder.stdout.readline()
        monkeypatch.setattr(transaction, "WAIT_S", 0.2)
        with pytest.raises(PatchError, match=rf"process {holder.pid} on .* still has it after 0 s; nothing changed"):
            world.apply()
        said = capsys.readouterr().err
        assert said.startswith(f"r3: waiting up to 0 s for process {holder.pid} on ")
        assert said.count("\n") == 1
    finally:
        holder.communicate()
    world.apply()
    assert world.states() == [State.APPLIED, State.APPLIED]
    assert capsys.readouterr().err == ""
