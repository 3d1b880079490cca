"""`r3 --version`: which release of this package it is, and which engines it finds."""

import argparse
import platform
from importlib.metadata import version
from typing import Any


class Version(argparse.Action):
    """Prints the versions and ends with exit code 0."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        """Print them; the engines are looked at, not imported."""
        print(f"r3-adapter {version('r3-adapter')}, Python {platform.python_version()}\n{engines()}")
        parser.exit()


def engines() -> str:
    """Say in one line which engines are installed, and how each stands to its patches."""
    from r3_adapter.errors import PatchError
    from r3_adapter.patch import packages

    try:
        found = packages.status()
    except PatchError as error:
        return f"engines: {error}"
    return ", ".join(
        f"{each.distribution} {each.installed} (patches: {each.state})"
        if each.installed
        else f"{each.distribution} not installed"
        for each in found
    )
