"""On a git tree the series becomes commits on top, all or nothing, and goes away again; others' commits are kept."""

import importlib.util
import subprocess
from pathlib import Path

import pytest

from r3_adapter import cli
from r3_adapter.errors import PatchError
from r3_adapter.patch import checkout
from r3_adapter.patch.checkout import TreeOutcome, TreeState
from r3_adapter.patch.git import Repo

SPEC = importlib.util.spec_from_file_location("patched_world", Path(__file__).with_name("patched_world.py"))
made = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(made)
World, files_below, commit_files = made.World, made.files_below, made.commit_files

FILE = "alpha/core/a.py"
LONG = b"import os\n\n\n" + made.ALPHA_OLD[FILE] + b"\n\n\ndef g():\n    return os\n"
SOURCE = "https://example.org/alpha 0123456789abcdef0123456789abcdef01234567\n"


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")


@pytest.fixture
def tree(world: World, tmp_path: Path) -> Repo:
    return made.make_tree(tmp_path / "a tree", made.ALPHA_OLD)


def run(verb: str, tree: Repo, world: World) -> TreeOutcome:
    return getattr(checkout, verb)(checkout.open_checkout(tree.top, (), world.root))


def state_of(tree: Repo) -> tuple[object, ...]:
    """All that a user sees: where the branch is, its files, and what git says of them."""
    files = {path: seen for path, seen in files_below(tree.top).items() if not path.startswith(".git")}
    return (
        tree.head,
        tree.says("symbolic-ref", "HEAD"),
        files,
        tree.line("status", "--porcelain"),
        tree.line("ls-files", "-s"),
    )


def source(tree: Repo) -> dict[str, bytes]:
    seen = files_below(tree.top)
    return {
        path: seen[path][1] for path in seen if path.startswith("alpha/") and path in made.ALPHA_OLD | made.ALPHA_NEW
    }


def test_the_series_is_commits_on_top_and_goes_away_again(tree: Repo, world: World) -> None:
    before = state_of(tree)
    assert run("status", tree, world).state is TreeState.NOT_APPLIED
    outcome = run("apply", tree, world)
    assert (outcome.state, outcome.changed) == (TreeState.APPLIED, True)
    assert source(tree) == {path: data for path, data in made.ALPHA_NEW.items() if path.startswith("alpha/")}
    assert (tree.top / "tests/unit/test_a.py").exists()
    assert tree.line("status", "--porcelain") == ""
    assert tree.line("log", "--reverse", "--format=%s").split("\n") == ["as released", "Why", "Why"]
    trailers = tree.line("log", "--reverse", "--format=%(trailers:key=R3-Patch,valueonly,separator=%x2c)").split("\n")[
        1:
    ]
    assert [trailer.split()[:3] for trailer in trailers] == [
        ["alpha", "1.0", "0001-half.patch"],
        ["alpha", "1.0", "0002-whole.patch"],
    ]
    assert run("status", tree, world).state is TreeState.APPLIED
    applied = state_of(tree)
    assert not run("apply", tree, world).changed and state_of(tree) == applied
    assert run("revert", tree, world).changed
    assert state_of(tree) == before
    assert not run("revert", tree, world).changed and state_of(tree) == before


@pytest.mark.parametrize("place", ["detached", "linked", "inside", "subfolder"])
def test_wherever_the_tree_is(tree: Repo, world: World, tmp_path: Path, place: str) -> None:
    if place == "detached":
        tree.git("checkout", "--quiet", "--detach")
    elif place == "linked":
        tree.git("worktree", "add", "--quiet", "-b", "other", str(tmp_path / "linked one"))
        tree = checkout.open_repo(tmp_path / "linked one")
    elif place == "inside":
        tree = made.make_tree(tmp_path / "mono", made.ALPHA_OLD, "third party/alpha/")
        commit_files(tree, {FILE: b"of another package\n"}, "other")
    folder = tree.top / {"inside": "third party/alpha", "subfolder": "alpha/core"}.get(place, "")
    before = state_of(tree)
    assert checkout.apply(checkout.open_checkout(folder, (), world.root)).changed
    below = "third party/alpha/" if place == "inside" else ""
    assert (tree.top / below / FILE).read_bytes() == made.ALPHA_NEW[FILE]
    assert checkout.status(checkout.open_checkout(folder, (), world.root)).state is TreeState.APPLIED
    assert checkout.revert(checkout.open_checkout(folder, (), world.root)).changed
    assert state_of(tree) == before


def test_others_commits_on_the_same_file_are_merged_and_kept(tree: Repo, world: World) -> None:
    mine = b"mine = 1\n\n\n\n\n" + made.ALPHA_OLD[FILE] + b"\n\nend = 1\n"
    commit_files(tree, {FILE: mine}, "below")
    before = state_of(tree)
    run("apply", tree, world)
    merged = mine.replace(b"return 1", b"return 2")
    assert (tree.top / FILE).read_bytes() == merged
    commit_files(tree, {FILE: merged + b"more = 1\n", "mine.py": b"m = 1\n"}, "above")
    assert run("status", tree, world).state is TreeState.APPLIED
    assert not run("apply", tree, world).changed
    run("revert", tree, world)
    assert (tree.top / FILE).read_bytes() == mine + b"more = 1\n"
    assert source(tree) | {FILE: mine} == {**made.ALPHA_OLD, FILE: mine}
    assert (tree.top / "mine.py").exists() and tree.line("status", "--porcelain") == ""
    assert tree.line("log", "-2", "--format=%s").split("\n") == ['Revert "Why"'] * 2
    assert run("status", tree, world).state is TreeState.NOT_APPLIED
    assert run("apply", tree, world).changed
    run("revert", tree, world)
    assert tree.line("log", "-1", "--format=%s") == 'Revert "Why"'
    assert state_of(tree) != before


def test_others_commits_on_the_same_lines_are_conflicts_and_nothing_changes(tree: Repo, world: World) -> None:
    commit_files(tree, {FILE: b"def f():\n    return 7\n"}, "theirs")
    before = state_of(tree)
    with pytest.raises(PatchError) as refused:
        run("apply", tree, world)
    said = str(refused.value)
    assert "the nearest series is that for 1.0: " in said
    assert said.endswith("\nCheck out a commit where these lines are as 1.0 has them")
    (world.root / "alpha/1.0/source").write_text(SOURCE)
    with pytest.raises(PatchError, match=rf"as 1\.0 has them, which is {SOURCE.strip()}$"):
        run("apply", tree, world)
    assert "0001-half.patch:\n    alpha/core/a.py: hunk 1 of 1, @@ -1,2 +1,2 @@: 1 of its 2 old lines are not" in said
    assert "why: Why" in said
    assert state_of(tree) == before


@pytest.mark.parametrize(
    ("version", "way_out"),
    [
        ("1.1", ", or, of the release, make a series: `r3 patch rebase alpha 1.1`"),
        ("1.1rc0", "; 1.1rc0 is no release, of which `r3 patch rebase` could make a series"),
        ("1.1+g0abc", "; 1.1+g0abc is no release, of which `r3 patch rebase` could make a series"),
        ("", "; this is no release, of which `r3 patch rebase` could make a series"),
    ],
)
def test_a_series_is_to_be_made_of_releases_only(tree: Repo, world: World, version: str, way_out: str) -> None:
    said = f'__version__ = "{version}"\n'.encode()
    commit_files(tree, {FILE: b"def f():\n    return 7\n", "alpha/core/version.py": said}, "theirs")
    with pytest.raises(PatchError) as refused:
        run("apply", tree, world)
    assert str(refused.value).endswith(f"\nCheck out a version that is nearer{way_out}")


def test_without_released_files_the_context_decides(world: World, tmp_path: Path) -> None:
    tree = made.make_tree(tmp_path / "foreign", {**made.ALPHA_OLD, FILE: LONG})
    outcome = run("apply", tree, world)
    assert "by context alone" in outcome.said[0] and "pip gives no wheel" in outcome.said[0]
    run("revert", tree, world)
    (world.root / "alpha/1.0/source").write_text(SOURCE)
    outcome = run("apply", tree, world)
    assert f"no registry has 1.0, and here is no {SOURCE.strip()}: fetch that commit" in outcome.said[0]
    assert (tree.top / FILE).read_bytes() == LONG.replace(b"return 1", b"return 2")


def test_a_change_on_top_of_the_same_lines_keeps_them(tree: Repo, world: World) -> None:
    run("apply", tree, world)
    commit_files(tree, {"alpha/core/new/deep.py": b"mine = 1\n"}, "above")
    before = state_of(tree)
    found = run("status", tree, world)
    assert found.state is TreeState.EDITED and "alpha/core/new/deep.py" in found.said[1]
    for verb in ("apply", "revert"):
        with pytest.raises(PatchError, match=r"later commits changed the same lines: alpha/core/new/deep\.py"):
            run(verb, tree, world)
        assert state_of(tree) == before


def test_what_is_not_committed_is_refused_and_kept(tree: Repo, world: World) -> None:
    (tree.top / "notes.txt").write_text("untracked\n")
    run("apply", tree, world)
    run("revert", tree, world)
    (tree.top / "alpha/core/new").mkdir()
    (tree.top / "alpha/core/new/deep.py").write_text("untracked, in the way\n")
    before = state_of(tree)
    with pytest.raises(PatchError, match=r"deep\.py: is in the way, and git does not know it"):
        run("apply", tree, world)
    assert state_of(tree) == before
    (tree.top / "alpha/core/new/deep.py").unlink()
    for change in ("setup.py", FILE):
        (tree.top / change).write_text("edited\n")
        before = state_of(tree)
        with pytest.raises(PatchError, match=f"not committed: {change}"):
            run("apply", tree, world)
        assert state_of(tree) == before
        tree.git("checkout", "--quiet", "--", change)


def test_another_series_is_replaced(tree: Repo, world: World, tmp_path: Path) -> None:
    other = made.other_series(world, tmp_path / "other")
    before = state_of(tree)
    run("apply", tree, other)
    assert run("status", tree, world).state is TreeState.OTHER
    run("apply", tree, world)
    assert run("status", tree, world).state is TreeState.APPLIED
    assert tree.line("rev-list", "--count", "HEAD") == "3"
    tree.git("-c", "user.name=Ann", "-c", "user.email=a@b", "revert", "--no-edit", "HEAD")
    assert run("status", tree, world).state is TreeState.OTHER
    run("apply", tree, world)
    assert run("status", tree, world).state is TreeState.APPLIED
    run("revert", tree, world)
    assert state_of(tree)[2] == before[2]


def test_a_check_that_says_no_changes_nothing(tree: Repo, world: World) -> None:
    before = state_of(tree)

    def no(found: checkout.Made) -> list[str]:
        assert found.files[FILE] == made.ALPHA_NEW[FILE]
        assert (tree.top / FILE).read_bytes() == made.ALPHA_OLD[FILE]
        raise PatchError("no")

    with pytest.raises(PatchError, match="no"):
        checkout.apply(checkout.open_checkout(tree.top, (), world.root), no)
    assert state_of(tree) == before


def test_lines_that_are_there_already_are_no_commit(tree: Repo, world: World) -> None:
    commit_files(tree, {FILE: b"def f():\n    return 10\n"}, "theirs, as the first patch")
    assert "0001-half.patch: changes nothing, its lines are there already" in run("apply", tree, world).said
    assert tree.line("rev-list", "--count", "HEAD") == "3"
    assert run("status", tree, world).state is TreeState.APPLIED


def test_a_failure_on_the_way_puts_all_back(tree: Repo, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    before, git = state_of(tree), Repo.git
    for step in ("update-ref", "--refresh", "update-index"):

        def broken(self: Repo, *args: str, step: str = step, **more: object) -> bytes:
            if step in args and not more.get("index"):
                raise PatchError(f"no {step}")
            return git(self, *args, **more)

        monkeypatch.setattr(Repo, "git", broken)
        with pytest.raises(PatchError, match=f"no {step}"):
            run("apply", tree, world)
        monkeypatch.setattr(Repo, "git", git)
        assert state_of(tree) == before
        assert not checkout.was_stopped(tree)


def test_command_line(
    tree: Repo, world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("r3_adapter.patch.series.patches_root", lambda: world.root)

    def r3(verb: str, *args: str) -> tuple[int, str, str]:
        code = cli.main(["patch", verb, *args, "--source", str(tree.top)])
        return (code, *capsys.readouterr())

    assert r3("verify") == (
        1,
        f"alpha 1.0 in {tree.top}: not applied\n    the nearest series is that for 1.0: 5 of 5 hunks fit\n",
        "",
    )
    code, out, err = r3("apply", "--skip-tests")
    assert (code, err) == (0, "")
    assert out.startswith(f"alpha 1.0 in {tree.top}: applied\n    the nearest series is that for 1.0: ")
    assert r3("verify", "alpha")[0] == 0
    assert r3("verify", "beta") == (2, "", f"r3: {tree.top}: holds alpha; not beta\n")
    assert r3("status", "--site", ".")[0] == 2
    assert r3("revert")[0] == 0
    commit_files(tree, {FILE: b"def f():\n    return 7\n"}, "theirs")
    code, out, err = r3("apply")
    assert (code, out) == (2, "") and err.count("\n") > 3
    assert cli.main(["patch", "apply", "--python", "python3"]) == 2
    assert cli.main(["patch", "apply", "--skip-tests"]) == 2


def test_what_is_no_source_tree_is_refused(tree: Repo, world: World, tmp_path: Path) -> None:
    empty = made.init_repo(tmp_path / "empty")
    with pytest.raises(PatchError, match=r"no source of alpha or beta: has no alpha/core/__init__\.py or python/beta/"):
        run("status", empty, world)
    with pytest.raises(PatchError, match="gamma: no such distribution, only alpha, beta"):
        checkout.open_checkout(tree.top, ["gamma"], world.root)
    commit_files(tree, {"python/beta/__init__.py": b""}, "both")
    with pytest.raises(PatchError, match="holds alpha, beta; name one of them"):
        run("status", tree, world)
    assert checkout.open_checkout(tree.top, ["beta"], world.root).distribution == "beta"
    bare = tmp_path / "bare"
    subprocess.run(["git", "clone", "--quiet", "--bare", str(tree.top), str(bare)], check=True)
    with pytest.raises(PatchError, match="a bare repository"):
        checkout.open_checkout(bare, (), world.root)


@pytest.mark.parametrize(
    ("path", "text", "version"),
    [
        ("alpha/core/version.py", '__version__ = "0.5.15.post1"\n', "0.5.15.post1"),
        ("alpha/core/_version.py", "__version__ = version = '0.5.20'\n", "0.5.20"),
        ("alpha/core/package_info.py", "MAJOR = 0\nMINOR = 16\nPATCH = 2\nPRE_RELEASE = 'rc0'\n", "0.16.2rc0"),
    ],
)
def test_the_version_is_what_the_tree_says(tree: Repo, world: World, path: str, text: str, version: str) -> None:
    (tree.top / "alpha/core/version.py").unlink()
    (tree.top / path).write_text(text)
    assert checkout.open_checkout(tree.top, (), world.root).version == version
    (tree.top / path).write_text("from elsewhere import __version__\n")
    assert checkout.open_checkout(tree.top, (), world.root).version == ""
    tree.git("tag", "core_v0.18.1")
    assert checkout.open_checkout(tree.top, (), world.root).version == "0.18.1"
