"""How a command prints its figures."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r3_adapter.flag_values import STDOUT
from r3_adapter.signals import say

if TYPE_CHECKING:
    from r3_adapter.proof.server import ServerVerdict
    from r3_adapter.proof.verdict import Verdict


def print_json(report: Mapping[str, Any], path: Path | None) -> None:
    text = json.dumps(report, indent=2)
    # First where nothing can be lost: the disk may be full by now.
    print(text, flush=True)
    if path:
        path.write_text(text + "\n", encoding="utf-8")


def print_verdict(verdict: "Verdict | ServerVerdict", path: Path | None) -> int:
    """Print what a self-test found; return the exit code.

    The summary goes to stdout, the sentence to stderr. path: of the JSON; STDOUT prints it in place of the summary.
    """
    from rich.console import Console

    from r3_adapter.proof.summary import summary

    if path == STDOUT:
        print_json(verdict.to_json(), None)
    else:
        Console(width=None if sys.stdout.isatty() else 120).print(summary(verdict))
        sys.stdout.flush()
    say(f"r3 prove: {verdict.sentence}")
    # Last: the disk may be full by now.
    if path not in (None, STDOUT):
        path.write_text(json.dumps(verdict.to_json(), indent=2) + "\n", encoding="utf-8")
    return 0 if verdict.passed else 1
