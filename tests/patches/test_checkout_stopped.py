"""Whatever stops a run on a git tree, and wherever: nothing has changed, or the next run puts all right."""

import importlib.util
import shutil
from pathlib import Path

import pytest

from r3_adapter.errors import PatchError
from r3_adapter.patch import checkout
from r3_adapter.patch.checkout import TreeState
from r3_adapter.patch.git import Repo, open_repo
from r3_adapter.patch.moving import was_stopped

SPEC = importlib.util.spec_from_file_location("patched_world", Path(__file__).with_name("patched_world.py"))
made = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(made)
World = made.World

# Audit events of what changes a file, opens one, or starts git.
STEPS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate", "subprocess.Popen"}


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")


def killed(top: Path, world: World, verb: str, number: int) -> bool:
    """Say whether a process that runs the verb was killed before its numbered step on the tree, from the journal on."""
    repo = open_repo(top)

    def is_step(event: str, args: tuple[object, ...]) -> bool:
        if event not in STEPS or not was_stopped(repo) or made.only_reads(event, args):
            return False
        return event == "subprocess.Popen" or str(args[0]).startswith(str(top))

    return made.killed(number, is_step, lambda: run(top, world, verb))


def run(top: Path, world: World, verb: str) -> checkout.TreeOutcome:
    return getattr(checkout, verb)(checkout.open_checkout(top, (), world.root))


def seen(repo: Repo) -> tuple[object, ...]:
    """The branch's files, those in the work tree, what git says, and that nothing of ours is left in its folder."""
    files = {path: found for path, found in made.files_below(repo.top).items() if not path.startswith(".git")}
    ours = sorted(path.name for path in repo.folder.iterdir() if "r3" in path.name)
    return repo.line("rev-parse", "HEAD^{tree}"), files, repo.line("status", "--porcelain"), ours


@pytest.mark.filterwarnings("ignore:.*fork")
@pytest.mark.parametrize("verb", ["apply", "revert"])
def test_a_kill_at_any_step_is_put_right_by_both(world: World, tmp_path: Path, verb: str) -> None:
    tree = made.make_tree(tmp_path / "tree", made.ALPHA_OLD)
    released = seen(tree)
    run(tree.top, world, "apply")
    patched = seen(tree)
    if verb == "apply":
        run(tree.top, world, "revert")
    states, number = set(), 1
    while True:
        stopped = Path(shutil.copytree(tree.top, tmp_path / "stopped", symlinks=True))
        if not killed(stopped, world, verb, number):
            break
        repo = open_repo(stopped)
        states.add(run(stopped, world, "status").state)
        # In turn: each run starts many processes.
        repair, expected = (("apply", patched), ("revert", released))[number % 2]
        run(stopped, world, repair)
        assert seen(repo) == expected, f"killed before step {number}, then {repair}"
        shutil.rmtree(stopped)
        number += 1
    assert number > 20
    assert states == {TreeState.STOPPED}


def test_files_that_were_changed_after_a_stop_are_kept(world: World, tmp_path: Path) -> None:
    tree = made.make_tree(tmp_path / "tree", made.ALPHA_OLD)
    old = tree.head
    run(tree.top, world, "apply")
    new = tree.head
    tree.git("update-ref", "HEAD", old)  # stopped before the last step
    (tree.folder / "r3-patch.journal").write_text(f'{{"old": "{old}", "new": "{new}"}}')
    (tree.top / "alpha/core/a.py").write_text("mine\n")
    with pytest.raises(
        PatchError, match=r"was stopped, and these were changed since: alpha/core/a\.py; check them out"
    ):
        run(tree.top, world, "revert")
    assert (tree.top / "alpha/core/a.py").read_text() == "mine\n"
    (tree.top / "alpha/core/a.py").write_bytes(made.ALPHA_OLD["alpha/core/a.py"])
    assert "a run was stopped on the way: put right" in run(tree.top, world, "revert").said
    assert tree.line("status", "--porcelain") == ""
    (tree.folder / "r3-patch.journal").write_text('{"old": "x", "new": "HEAD"}')
    with pytest.raises(PatchError, match="names no commits; move it away"):
        run(tree.top, world, "apply")
