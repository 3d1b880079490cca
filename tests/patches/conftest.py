"""Make patches the way that their authors do: with git."""

import importlib.util
import os
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

SPEC = importlib.util.spec_from_file_location("patched_world", Path(__file__).with_name("patched_world.py"))
made = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(made)

DiffTrees = Callable[[Mapping[str, bytes], Mapping[str, bytes]], bytes]


@pytest.fixture(scope="session")
def diff_trees(tmp_path_factory: pytest.TempPathFactory) -> DiffTrees:
    """Return a function that gives git's diff from one tree of files to another."""
    repo = tmp_path_factory.mktemp("diff")
    env = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}

    def git(*args: str) -> bytes:
        command = ["git", "-c", "core.autocrlf=false", "-c", "core.quotePath=false", *args]
        return subprocess.run(command, cwd=repo, env=env, check=True, stdout=subprocess.PIPE).stdout

    def write_tree(files: Mapping[str, bytes]) -> str:
        for path in repo.iterdir():
            if path.name != ".git":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for name, data in files.items():
            target = Path(repo, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
        git("add", "--all", "--force")
        return git("write-tree").decode().strip()

    git("init", "--quiet")
    return lambda old, new: git("diff-tree", "-r", "-p", "--text", write_tree(old), write_tree(new))


@pytest.fixture
def world(tmp_path: Path, diff_trees: DiffTrees) -> made.World:
    """Two installed, locked, unpatched distributions; alpha has two patches and a test, beta a prefix upstream."""
    return made.make_world(tmp_path, diff_trees)
