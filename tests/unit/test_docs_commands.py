"""Each command in README and docs parses: its script is there, its flags are known, its extras and pins exist."""

import argparse
import contextlib
import io
import re
import shlex
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from r3_adapter.cli import make_parser

REPO = Path(__file__).resolve().parents[2]
PAGES = [
    *(REPO / name for name in ("README.md", "CONTRIBUTING.md", "patches/README.md", "benchmarks/README.md")),
    *sorted((REPO / "docs").glob("**/*.md")),
]
OTHERS = {"cd", "export", "git", "mkdocs", "torchrun", "unshare", "ray", "docker"}
COMMAND = re.compile(
    rf"(\$ )?((\w+=\S+) )*(r3|python[\d.]*|pip|pytest|(\./|\S+/)?(launch|\.ci)/\S+|{'|'.join(OTHERS)}) "
)


def commands(page: Path) -> Iterator[str]:
    """Yield the command lines of a page's code blocks."""
    fence, line = None, ""
    for text in page.read_text(encoding="utf-8").splitlines():
        if mark := re.match(r"\s*```(\w*)", text):
            fence = None if fence is not None else mark[1]
            continue
        indented = fence is None and text.startswith("    ")
        if not indented and fence not in {"sh", "bash"}:
            continue
        usage = "[FLAGS]" in text  # as the reference writes it
        if line or (COMMAND.match(f"{text.strip()} ") and not usage):
            line += text.strip()
            if line.endswith("\\"):
                line = line[:-1]
                continue
            yield line.removeprefix("$ ")
            line = ""


FOUND = [(page, command) for page in PAGES for command in commands(page)]


def words(command: str) -> list[str]:
    """Return a command's words, without assignments before it and what follows a pipe."""
    found = shlex.split(re.split(r" (?:2>&1 )?\| ", command)[0])
    while found and re.fullmatch(r"\w+=.*", found[0], re.DOTALL):
        del found[0]
    return found


@cache
def sources() -> str:
    paths = [
        path
        for folder in ("launch", "r3_adapter", "benchmarks", "docs/site")
        for path in (REPO / folder).glob("**/*.py")
    ]
    patches = (REPO / "patches/sglang/0.5.20").glob("*.patch")
    return "".join(path.read_text(encoding="utf-8") for path in [*paths, *patches])


def check(command: str) -> None:
    for part in re.split(r" && |; ", re.sub(r"\s+# .*", "", command)):
        found = words(part)
        if not found or found[0] in OTHERS:
            continue
        name, given = found[0], found[1:]
        if name == "r3":
            check_r3(given)
        elif name == "pip":
            check_pip(given)
        elif name == "pytest":
            assert all((REPO / each).exists() for each in given if each.startswith("tests")), command
        elif name.startswith("python"):
            check_python(given)
        else:
            assert (REPO / name).stat().st_mode & 0o100, f"{name} is no script that can be run"
            check_flags(given)


def check_r3(given: list[str]) -> None:
    if "..." in given:
        check_flags(given)
        return
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            make_parser().parse_args(given)
        except SystemExit as end:
            assert end.code == 0, said.getvalue()


def check_pip(given: list[str]) -> None:
    project = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for each in given:
        for extra in re.findall(r"\[([\w,]+)\]", each):
            assert set(extra.split(",")) <= project["optional-dependencies"].keys(), extra
        engine, _, version = each.partition("==")
        if engine in {"sglang", "megatron-core"} and version:
            assert (REPO / "patches" / engine / version).is_dir(), each
        if "/" in each:
            assert (REPO / each).exists(), each


def check_python(given: list[str]) -> None:
    if given[0] == "-m":
        module = given[1]
        if module.startswith("r3_adapter"):
            path = REPO / module.replace(".", "/")
            assert path.is_dir() or path.with_suffix(".py").is_file(), module
    else:
        assert (REPO / given[0]).is_file(), given[0]
    check_flags(given[1:])


def check_flags(given: list[str]) -> None:
    for each in given:
        if each.startswith("--"):
            flag = each.partition("=")[0]
            assert flag in known_flags() or flag in ENGINES, f"{flag}: no command of the project has it"


@cache
def known_flags() -> set[str]:
    return set(re.findall(r"--[a-z][a-z0-9-]+", sources())) | set(options(make_parser()))


def options(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from options(below)


ENGINES = {"--load", "--tensorboard-dir"}
"""Megatron's own flags, which the project hands on."""


def test_there_are_commands_to_check() -> None:
    assert len(FOUND) > 80


@pytest.mark.parametrize(("page", "command"), FOUND, ids=[f"{page.name}: {command[:60]}" for page, command in FOUND])
def test_a_command_parses(page: Path, command: str) -> None:
    check(command)


@pytest.mark.parametrize(
    "command",
    [
        "r3 prove --tqp 2",
        "./launch/no_such.sh",
        "./launch/grpo.sh --r4",
        "pip install '.[gpus]'",
        "pip install sglang==0.5.19",
    ],
)
def test_a_command_that_is_wrong_is_seen(command: str) -> None:
    with pytest.raises((AssertionError, FileNotFoundError)):
        check(command)
