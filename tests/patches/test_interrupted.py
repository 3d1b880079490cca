"""Whatever stops apply or revert, and wherever: both then reach exactly the right bytes."""

import importlib.util
import os
import shutil
from pathlib import Path

import pytest

from r3_adapter.errors import PatchError
from r3_adapter.patch import packages
from r3_adapter.patch.packages import State

SPEC = importlib.util.spec_from_file_location("patched_world", Path(__file__).with_name("patched_world.py"))
made = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(made)
World, files_below = made.World, made.files_below

# Audit events of what changes a file, or opens one.
STEPS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.chown", "os.utime", "os.truncate"}


def killed(world: World, move: str, number: int) -> bool:
    """Say whether a process that makes the move was killed before its numbered step below the site."""

    def is_step(event: str, args: tuple[object, ...]) -> bool:
        below = event in STEPS and isinstance(args[0], str | Path) and str(args[0]).startswith(str(world.site))
        return below and not made.only_reads(event, args)

    return made.killed(number, is_step, lambda: getattr(world, move)("alpha"))


def copied(world: World, folder: Path) -> World:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(world.site, folder)
    return World(folder, world.root, world.diff_trees)


@pytest.mark.filterwarnings("ignore:.*fork")
@pytest.mark.parametrize("move", ["apply", "revert"])
def test_a_kill_at_any_step_is_repaired_by_both(world: World, tmp_path: Path, move: str) -> None:
    released = files_below(world.site)
    world.apply("alpha")
    patched = files_below(world.site)
    if move == "apply":
        world.revert("alpha")
    states, number = set(), 1
    while killed(stopped := copied(world, tmp_path / "stopped"), move, number):
        states.add(stopped.states()[0])
        for repair, expected in (("apply", patched), ("revert", released)):
            repaired = copied(stopped, tmp_path / "repaired")
            getattr(repaired, repair)("alpha")
            assert files_below(repaired.site) == expected, f"killed before step {number}, then {repair}"
        number += 1
    assert number > 40
    assert states == {State.NOT_APPLIED, State.HALF, State.APPLIED}


def test_half_patched_files_without_a_journal_are_repaired(world: World) -> None:
    released = files_below(world.site)
    world.apply()
    patched = files_below(world.site)
    for move, expected in ((world.apply, patched), (world.revert, released)):
        world.apply()
        for path in ("a.py", "gone.py"):
            (world.site / "alpha/core" / path).write_bytes(made.ALPHA_OLD[f"alpha/core/{path}"])
        assert world.states() == [State.HALF, State.APPLIED]
        move()
        assert files_below(world.site) == expected


def test_a_stopped_change_is_repaired_by_another_series(world: World, tmp_path: Path) -> None:
    """What it had made of the files is in its journal, so that the series may be gone."""
    released = files_below(world.site)
    for number in range(1, 1000, 7):
        stopped = copied(world, tmp_path / "stopped")
        if not killed(stopped, "apply", number):
            break
        if stopped.states()[0] is not State.HALF:
            continue
        other = made.other_series(stopped, tmp_path / "other")
        assert other.states()[0] is State.HALF
        again = copied(other, tmp_path / "repaired")
        other.revert("alpha")
        assert files_below(other.site) == released
        again.apply("alpha")
        assert again.states()[0] is State.APPLIED
        again.revert("alpha")
        assert files_below(again.site) == released


def test_status_says_what_happened_and_what_to_run(world: World) -> None:
    (world.site / "alpha/core/a.py").write_bytes(made.ALPHA_NEW["alpha/core/a.py"])
    (found,) = packages.status(["alpha"], site=world.site, root=world.root)
    paths = "alpha/core/dos.py, alpha/core/gone.py, alpha/core/new/deep.py and 1 other"
    assert packages.explain(found) == (
        f"alpha 1.0: half applied: stopped on the way; patched: alpha/core/a.py; not patched: {paths};"
        " `r3 patch apply` completes it, `r3 patch revert` takes it back"
    )


def test_a_journal_that_cannot_be_written_changes_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    before, replace = files_below(world.site), os.replace

    def full(source: Path, target: Path) -> None:
        if target.name.endswith(".journal"):
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(PatchError, match=r"nothing changed: .*No space left"):
        world.apply()
    assert files_below(world.site) == before
