"""What `--help` says: a line for each flag, examples that parse, and the same layout flags in every command."""

import argparse
import re
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from r3_adapter import cli
from r3_adapter.arguments import LAYOUT_FLAGS, add_r3_offline_arguments
from r3_adapter.commands import reference
from r3_adapter.commands.loop import loop_parser
from r3_adapter.parsers import OneCommandParser, commands_of, help_of

PARSERS = dict([*commands_of(cli.make_parser()), *commands_of(loop_parser())])
REPO = Path(__file__).resolve().parents[2]
# They install what they need, or ask for it, when they are started.
SCRIPTS = (
    *("grpo", "quickstart", "pretrain_r3", "qwen3-30b-a3b", "qwen3-235b-a22b", "deepseek-v3"),
    *("slime-qwen3-30b-a3b", "verl-qwen3-30b-a3b", "wheels", "test"),
)
LAYOUTS = ("r3 prove", "r3 plan", "launch/grpo.sh")


@pytest.mark.parametrize("command", PARSERS)
def test_each_flag_has_a_line_and_says_its_default(command: str) -> None:
    parser = PARSERS[command]
    assert parser.description
    for action in parser._actions:
        said = help_of(action)
        assert len(said.split()) >= 2 or said == "the page; default: report.html", f"{action.dest}: {said!r}"
        assert not said.endswith(".") and said == said.strip()
        if action.option_strings and action.nargs != 0 and action.default not in (None, [], {}):
            assert "default: " in said, f"{action.dest}: {said!r}"


@pytest.mark.parametrize("command", PARSERS)
def test_each_command_ends_its_help_with_examples_that_parse(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    parser = PARSERS[command]
    assert isinstance(parser, OneCommandParser) and parser.examples
    for example in parser.examples:
        assert example.startswith(command)
        parser.parse_args(shlex.split(example.removeprefix(command)))
    assert parser.format_help().endswith("".join(f"\n  {example}" for example in parser.examples) + "\n")


@pytest.mark.parametrize("command", PARSERS)
def test_a_usage_has_what_must_be_given_and_no_more(command: str) -> None:
    parser = PARSERS[command]
    usage = " ".join(parser.format_usage().split())
    needed = [each.option_strings[0] for each in parser._actions if each.option_strings and each.required]
    assert re.findall(r"--[\w-]+", usage) == needed
    assert usage.startswith(f"usage: {command} [FLAGS]") and len(usage) < 90


@pytest.mark.parametrize("command", LAYOUTS)
@pytest.mark.parametrize("name", LAYOUT_FLAGS)
def test_a_size_has_megatrons_name_and_a_short_one(command: str, name: str) -> None:
    flag, _ = LAYOUT_FLAGS[name]
    needed = ["--model-config", "config.json"] if command == "r3 plan" else []
    for given in (flag, f"--{name}"):
        found = PARSERS[command].parse_args([*needed, given, "6"])
        assert getattr(found, flag.removeprefix("--").replace("-", "_")) == 6


def test_every_command_with_a_size_defines_it_alike() -> None:
    """A flag with one of these names means this size, and no command has a size under the short name alone."""
    names = {f"--{name}": flag for name, (flag, _) in LAYOUT_FLAGS.items()}
    found = 0
    for command, parser in PARSERS.items():
        for action in parser._actions:
            for short in names.keys() & set(action.option_strings):
                assert action.option_strings == [names[short], short], command
                found += 1
    assert found == len(LAYOUTS) * len(names) + 1  # and --ep of `r3 balance`


def test_short_names_are_megatrons_long_ones_in_its_own_parser() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for flag, _ in LAYOUT_FLAGS.values():
        parser.add_argument(flag, type=int, default=7)
    add_r3_offline_arguments(parser)
    given = parser.parse_args(["--r3-traces", "x", "--tp", "2", "--vpp", "3"])
    assert (given.tensor_model_parallel_size, given.num_virtual_stages_per_pipeline_rank) == (2, 3)
    assert given.expert_model_parallel_size == 7


def test_the_reference_is_what_the_parsers_say() -> None:
    assert reference.PAGE.read_text(encoding="utf-8") == reference.reference(), (
        "run `python -m r3_adapter.commands.reference`"
    )


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_of_a_script_installs_nothing(name: str, tmp_path: Path) -> None:
    shutil.copytree(REPO / "launch", tmp_path / "launch")
    before = sorted(tmp_path.rglob("*"))
    script = tmp_path / "launch" / f"{name}.sh"
    done = subprocess.run(["bash", script, "--help"], capture_output=True, text=True, check=False, cwd="/")
    assert done.returncode == 0 and not done.stderr, done.stderr
    head = script.read_text(encoding="utf-8").splitlines()[1].removeprefix("# ")
    assert done.stdout.startswith(f"{head}\n") and "set -euo" not in done.stdout
    assert sorted(tmp_path.rglob("*")) == before


def test_the_versions_are_said_without_an_engine() -> None:
    code = (
        "import sys; from r3_adapter import cli\n"
        "try: cli.main(['--version'])\n"
        "finally: print({'torch', 'numpy', 'sglang', 'megatron'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, engines, loaded = done.stdout.splitlines()
    assert first == f"r3-adapter {version('r3-adapter')}, Python {sys.version.split()[0]}"
    assert re.fullmatch(r"megatron-core .*, sglang .*", engines)
    assert loaded == "set()"
