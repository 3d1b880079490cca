"""`r3 patch rebase` on a made-up engine: what conflicts and what breaks is named, what is clean is written."""

import importlib.util
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from r3_adapter.cli import main
from r3_adapter.errors import PatchError
from r3_adapter.patch import packages
from r3_adapter.patch.rebase import command
from r3_adapter.patch.rebase.table import rows
from r3_adapter.patch.series import load_series, read_patches
from r3_adapter.patch.wheels import wheel_files

SPEC = importlib.util.spec_from_file_location("made_engine", Path(__file__).with_name("made_engine.py"))
made = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(made)

TRAPS = '[[engine]]\nname = "dp_size"\nsince = "1.1"\nsays = "it counts replicas"\nunless = ["attn_dp_size"]\n'
Rebase = Callable[..., tuple[int, str]]


@pytest.fixture
def root(tmp_path: Path, diff_trees, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = made.make_pins(tmp_path, diff_trees)
    monkeypatch.setattr(command, "patches_root", lambda: root)
    monkeypatch.chdir(tmp_path)
    return root


@pytest.fixture
def rebase(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Rebase:
    """Return a function that runs the command on a release with these files; its exit code, and what it printed."""

    def run(version: str, files: Mapping[str, str], *options: str) -> tuple[int, str]:
        wheel = made.make_wheel(tmp_path / "new", version, files)
        pinned = ("--from-wheel", str(tmp_path / "engine-1.0-py3-none-any.whl"))
        code = main(["patch", "rebase", "engine", version, "--wheel", str(wheel), *pinned, *options])
        return code, capsys.readouterr().out

    return run


def git(tree: Path, *args: str) -> str:
    who = ["-c", "user.name=M", "-c", "user.email=m@example.org", "-c", "core.editor=true"]
    return subprocess.run(["git", *who, *args], cwd=tree, check=True, capture_output=True, text=True).stdout


def test_a_clean_release_is_pinned(rebase: Rebase, root: Path, tmp_path: Path) -> None:
    files = made.edited(made.RELEASED, ("engine/scheduler.py", "^", "import os\n"), ("engine/req.py", "''", "'a'"))
    assert rebase("1.1", files, "--check")[0] == 0
    assert [series.version for series in load_series(root)["engine"]] == ["1.0"]
    code, said = rebase("1.1", files)
    assert code == 0, said
    old, new = load_series(root)["engine"]
    listing = (root / "engine/1.1/series").read_text().split()
    assert listing == ["../shared/0001-capture-Add-a-capturer.patch", "0002-capture-Keep-slots.patch"]
    assert "Subject: [PATCH] capture: Keep slots" in read_patches(new)[1].header
    assert "R3-Patch" not in read_patches(new)[1].header
    assert "`0001-capture-Add-a-capturer.patch` | 1.0, 1.1 |" in (root / "README.md").read_text()
    assert [(row.version, row.state) for row in rows(root / "README.md")] == [("1.1", "pinned")]
    with zipfile.ZipFile(tmp_path / "new/engine-1.1-py3-none-any.whl") as wheel:
        wheel.extractall(tmp_path / "fresh")
    packages.apply(["engine"], site=tmp_path / "fresh", root=root)
    text = (tmp_path / "fresh/engine/scheduler.py").read_text()
    assert text == files["engine/scheduler.py"].replace(*made.HOOKS[0]).replace(*made.HOOKS[1])
    assert old.files.keys() == new.files.keys()


def test_the_same_files_share_all_patches(rebase: Rebase, root: Path) -> None:
    assert rebase("1.0.post1", made.edited(made.RELEASED, ("engine/req.py", "''", "'a'")))[0] == 0
    assert "../1.0/0002-capture-Keep-slots.patch" in (root / "engine/1.0.post1/series").read_text().split()


BREAKS = {
    "renamed field": ("engine/req.py", "input_ids", "prompt_ids"),
    "removed flag": ("engine/envs.py", ".*ENGINE_FAST.*\n", ""),
    "changed signature": ("engine/base.py", "self, loc: int", "self, loc: int, rank: int"),
    "renamed keyword": ("engine/req.py", "limit", "most"),
    "untyped field": ("engine/req.py", "self.salt", "self.pepper"),
    "moved module": ("engine/sizes.py", r"def get_sizes\(\)", "def sizes_of()"),
}
NAMED = {
    "renamed field": 'capture.py:14: "Req" has no attribute "input_ids"',
    "removed flag": 'capture.py:12: "Envs" has no attribute "ENGINE_FAST"',
    "changed signature": 'capture.py:8: Signature of "on_end" incompatible with supertype',
    "renamed keyword": 'capture.py:13: Unexpected keyword argument "limit" for "rows_of"',
    "untyped field": 'capture.py:14: "salt" is defined nowhere in engine 1.1, but was in 1.0',
    "moved module": "capture.py:4: module engine.sizes has no get_sizes",
}


def test_breaks_without_a_conflict_are_named(rebase: Rebase, root: Path) -> None:
    (root / "traps.toml").write_text(TRAPS)
    files = made.edited(made.RELEASED, *BREAKS.values())
    code, said = rebase("1.1", files, "--check")
    assert code == 1
    for what, text in NAMED.items():
        assert f"break: python/engine/{text}" in said, (what, said)
    assert "capture.py:9: reads dp_size; since 1.1 it counts replicas (traps)\n    0001-capture-Add" in said
    assert [series.version for series in load_series(root)["engine"]] == ["1.0"]


def test_breaks_that_are_accepted_are_written_with_the_reason(rebase: Rebase, root: Path) -> None:
    conflict = made.edited(made.RELEASED, ("engine/scheduler.py", "slots = req", "slots = not req"))
    assert rebase("1.1", conflict, "--accept", "a conflict is none")[0] == 1
    assert [series.version for series in load_series(root)["engine"]] == ["1.0"]
    files = made.edited(made.RELEASED, BREAKS["removed flag"])
    code, said = rebase("1.1", files, "--accept", "the flag is | set nowhere")
    assert code == 0 and "break: " in said, said
    assert [series.version for series in load_series(root)["engine"]] == ["1.0", "1.1"]
    (row,) = rows(root / "README.md")
    count = said.count("break: ")
    assert (row.version, row.state) == ("1.1", f"breaks: {count}; accepted: the flag is / set nowhere")


def test_what_upstream_does_itself_is_no_break(rebase: Rebase) -> None:
    """Faults of the release's own, in a file that the series touches too."""
    fault = "\n\ndef new(req: Req):\n    return req.nothing + undefined\n"
    files = made.edited(made.RELEASED, ("engine/scheduler.py", r"\Z", fault))
    code, said = rebase("1.1", files, "--check")
    assert (code, "break" in said) == (0, False), said


def test_a_hook_that_is_called_elsewhere_is_named(rebase: Rebase) -> None:
    moved = made.edited(
        made.RELEASED,
        ("engine/scheduler.py", "        release\\(req\\)\n", ""),
        ("engine/scheduler.py", "        return 1\n", "        release(req)\n        return 1\n"),
    )
    code, said = rebase("1.1", moved, "--check")
    assert code == 0
    assert "scheduler.py:Scheduler.step called it in 1.0, now engine/scheduler.py:Scheduler.forward" in said
    gone = made.edited(made.RELEASED, ("engine/scheduler.py", "        release\\(req\\)\n", ""))
    code, said = rebase("1.1", gone, "--check")
    assert code == 1
    assert "break: python/engine/scheduler.py: release is hooked; engine/scheduler.py:Scheduler.step called it" in said
    rewritten = made.edited(made.RELEASED, ("engine/scheduler.py", "    return last\n", "    return last + 1\n"))
    said = rebase("1.1", rewritten, "--check")[1]
    assert "to read: python/engine/scheduler.py:4: release is hooked, and upstream changed it" in said


def test_a_conflict_is_mended_in_the_tree(rebase: Rebase, root: Path, tmp_path: Path) -> None:
    files = made.edited(made.RELEASED, ("engine/scheduler.py", "slots = req.input_ids", "slots = list(req.input_ids)"))
    code, said = rebase("1.1", files, "--check")
    assert code == 1
    assert "conflicts of 0002-capture-Keep-slots.patch\n    capture: Keep slots: capture: Keep slots because" in said
    assert "python/engine/scheduler.py: hunk 1 of 1" in said
    assert "| engine | 1.1 | conflicts: 1 of " in said
    assert not list(tmp_path.glob("*.tree"))
    tree = tmp_path / "tree"
    code, said = rebase("1.1", files, "--tree", str(tree))
    assert f"then: r3 patch rebase engine 1.1 --from 1.0 --tree {tree}" in said
    assert rebase("1.1", files, "--tree", str(tree))[0] == 2  # cherry-pick under way
    scheduler = files["engine/scheduler.py"].replace("    return last\n", "    capturer.keep(slots)\n    return last\n")
    (tree / "python/engine/scheduler.py").write_text(scheduler.replace(*made.HOOKS[1]))
    git(tree, "add", "--all")
    git(tree, "cherry-pick", "--continue")
    code, said = rebase("1.1", files, "--tree", str(tree))
    assert code == 0, said
    new = load_series(root)["engine"][1]
    assert read_patches(new)[1].name == "0002-capture-Keep-slots.patch"
    assert "Last-Update: 2026-01-05" not in read_patches(new)[1].header


def test_a_shared_patch_that_is_mended_is_mended_for_all(rebase: Rebase, root: Path, tmp_path: Path) -> None:
    files = made.edited(made.RELEASED, ("engine/scheduler.py", "^", "import os\n"))
    assert rebase("1.1", files)[0] == 0
    before = {series.version: series.files for series in load_series(root)["engine"]}
    tree = tmp_path / "tree"
    assert rebase("1.1", files, "--tree", str(tree))[0] == 0
    capture = tree / "python/engine/capture.py"
    capture.write_text(capture.read_text().replace("limit=batch.loc", "limit=batch.loc + 1"))
    git(tree, "commit", "-q", "-a", "--fixup", git(tree, "rev-list", "--reverse", "r3-released..HEAD").split()[0])
    git(tree, "-c", "sequence.editor=true", "rebase", "-q", "-i", "--autosquash", "r3-released")
    assert rebase("1.1", files, "--tree", str(tree))[0] == 0
    after = {series.version: series.files for series in load_series(root)["engine"]}
    for version in ("1.0", "1.1"):
        assert before[version]["engine/capture.py"] != after[version]["engine/capture.py"]
        assert before[version]["engine/scheduler.py"] == after[version]["engine/scheduler.py"]
    packages.apply(["engine"], site=tmp_path / "site", root=root)
    assert "batch.loc + 1" in (tmp_path / "site/engine/capture.py").read_text()


def test_what_is_not_to_be_had_is_refused(rebase: Rebase, tmp_path: Path) -> None:
    wheel = str(made.make_wheel(tmp_path / "new", "1.1", made.RELEASED))
    for words in (
        ["nothing", "1.1"],
        ["engine", "--upload"],
        ["engine", "1.1", "--wheel", wheel, "--from", "0.9"],
        ["engine", "1.2", "--wheel", wheel],
        ["engine", "1.1", "--wheel", wheel, "--from-wheel", wheel],
        ["engine", "1.1", "--wheel", wheel, "--tree", str(tmp_path)],
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stderr", sys.stdout)
            try:
                assert main(["patch", "rebase", *words]) == 2, words
            except SystemExit as error:
                assert error.code == 2, words


@pytest.mark.parametrize("path", ["../x.py", "/x.py", "engine/../../x.py", "engine\\x.py", "engine/.git/x.py"])
def test_a_hostile_wheel_is_refused(tmp_path: Path, path: str) -> None:
    with pytest.raises(PatchError, match="not a plain path"):
        wheel_files(made.make_wheel(tmp_path, "1.1", {**made.RELEASED, path: "x = 1\n"}), "engine")


def test_a_wheel_that_is_not_as_recorded_is_refused(tmp_path: Path) -> None:
    wheel = made.make_wheel(tmp_path, "1.1", made.RELEASED)
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("engine/late.py", "x = 1\n")
    with pytest.raises(PatchError, match=r"engine/late\.py: .* != None in RECORD"):
        wheel_files(wheel, "engine")
    wheel.write_bytes(b"no zip")
    with pytest.raises(PatchError, match="cannot be read as a wheel"):
        wheel_files(wheel, "engine")


@pytest.fixture
def source(tmp_path: Path) -> Callable[[Mapping[str, str]], Path]:
    """Return a function that commits files to a git tree of the engine, as upstream has them."""
    tree = tmp_path / "source"
    tree.mkdir()
    git(tree, "init", "-q")
    git(tree, "remote", "add", "origin", "https://example.org/engine")

    def commit(files: Mapping[str, str]) -> Path:
        for path, text in files.items():
            (tree / "python" / path).parent.mkdir(parents=True, exist_ok=True)
            (tree / "python" / path).write_text(text)
        git(tree, "add", "--all")
        git(tree, "commit", "-q", "-m", "upstream")
        return tree

    return commit


def from_source(tree: Path, version: str, *options: str) -> int:
    return main(["patch", "rebase", "engine", version, "--source", str(tree), *options])


def test_a_commit_that_no_registry_has_is_pinned(
    source: Callable[[Mapping[str, str]], Path], root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wheel = ("--from-wheel", str(tmp_path / "engine-1.0-py3-none-any.whl"))
    tree = source(made.edited(made.RELEASED, ("engine/scheduler.py", "^", "import os\n")))
    assert from_source(tree, "1.1.dev1", *wheel) == 0, capsys.readouterr()
    (new,) = [series for series in load_series(root)["engine"] if series.version == "1.1.dev1"]
    assert new.source == f"https://example.org/engine {git(tree, 'rev-parse', 'HEAD').strip()}"
    # The next commit is nearer to this one than to the release, whose files are there as that tree has them.
    tree = source(
        made.edited(made.RELEASED, ("engine/scheduler.py", "^", "import os\n"), ("engine/req.py", "''", "'a'"))
    )
    assert from_source(tree, "1.1.dev2", "--from", "1.1.dev1") == 0, capsys.readouterr()
    assert "hunks of the series for 1.1.dev1" in capsys.readouterr().out
    assert len({series.source for series in load_series(root)["engine"]}) == 3


def test_a_commit_that_cannot_be_pinned_is_refused(
    source: Callable[[Mapping[str, str]], Path], root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = source(made.RELEASED)

    def refusal(*words: str) -> str:
        assert from_source(tree, *words) == 2
        return capsys.readouterr().err

    assert "1.1: is for a release" in refusal("1.1")
    assert "exclude each other" in refusal("1.1.dev1", "--wheel", str(tmp_path / "engine-1.0-py3-none-any.whl"))
    (tree / "python/engine/req.py").write_text("")
    assert "not committed: python/engine/req.py" in refusal("1.1.dev1")
    git(tree, "checkout", "-q", ".")
    git(tree, "remote", "set-url", "origin", str(tmp_path))
    assert f"its remote `origin` is {tmp_path}, not https://" in refusal("1.1.dev1")
    assert [series.version for series in load_series(root)["engine"]] == ["1.0"]
