"""What can be said of the Dockerfile without a build: its versions are pins, what it copies and installs is there."""

import re
import tomllib
from pathlib import Path

from r3_adapter.patch.series import load_series

REPO = Path(__file__).parents[2]
TEXT = (REPO / "Dockerfile").read_text(encoding="utf-8")
# Of a name that comes twice the last value counts, which is empty where an ARG takes up one from above.
GIVEN = dict(re.findall(r"^ARG (\w+)=(\S+)$", TEXT, re.MULTILINE))
SETUP = (REPO / "launch" / "setup.sh").read_text(encoding="utf-8")


def test_its_engines_are_pins_and_those_of_the_scripts() -> None:
    pins = {name: {each.version for each in found if not each.source} for name, found in load_series().items()}
    assert GIVEN["SGLANG_VERSION"] in pins["sglang"]
    assert GIVEN["MEGATRON_VERSION"] in pins["megatron-core"]
    assert f"local sglang={GIVEN['SGLANG_VERSION']} " in SETUP
    assert f"megatron={GIVEN['MEGATRON_VERSION']}" in SETUP
    assert f"BRIDGE=megatron-bridge=={GIVEN['BRIDGE_VERSION']}" in SETUP


def test_each_version_that_it_names_is_an_argument_in_reach() -> None:
    """A stage has the arguments that it declares itself; one above the first FROM is known in FROM lines alone."""
    head, *stages = re.split(r"^FROM ", TEXT, flags=re.MULTILINE)
    for stage in stages:
        image, _, rest = stage.partition("\n")
        assert set(re.findall(r"\$\{?([A-Z_]+)", image)) <= set(re.findall(r"^ARG (\w+)", head, re.MULTILINE))
        assert set(re.findall(r"\$\{?([A-Z_]+)", rest)) <= set(re.findall(r"^ARG (\w+)", rest, re.MULTILINE))
    assert not re.search(r"==\d", TEXT)


def test_its_extras_are_there_and_what_it_does_not_copy_is_not_wanted() -> None:
    project = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (extras,) = re.findall(r'"r3-adapter\[([\w,]+)\]"', TEXT)
    assert set(extras.split(",")) <= project["optional-dependencies"].keys()
    left_out = (REPO / ".dockerignore").read_text(encoding="utf-8").split()
    assert not {"cpp", "patches", "r3_adapter", "pyproject.toml", "README.md", "LICENSE"} & set(left_out)
