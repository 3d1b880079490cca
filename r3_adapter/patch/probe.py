"""Runs in the interpreter that an engine is installed for, from a folder of its own: imports modules, runs tests.

It needs nothing but Python, so that it can say what else is missing: `probe.py QUESTION ANSWER`, both of JSON.
"""

import importlib
import json
import sys
import traceback
from pathlib import Path
from typing import Any

_PYTEST = ("-q", "-W", "ignore", "-p", "no:cacheprovider", "--noconftest", "--import-mode=importlib", "-c", "/dev/null")


class _Seen:
    """Notes what became of each test."""

    def __init__(self) -> None:
        self.passed: list[str] = []
        self.skipped: dict[str, str] = {}
        self.failed: dict[str, str] = {}

    def pytest_collectreport(self, report: Any) -> None:
        if report.outcome != "passed":
            where = self.skipped if report.outcome == "skipped" else self.failed
            where[report.nodeid] = _last(str(report.longreprtext))

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.outcome == "skipped":
            self.skipped[report.nodeid] = _last(str(report.longreprtext))
        elif report.outcome == "failed":
            self.failed[report.nodeid] = _last(str(report.longreprtext))
        elif report.when == "call":
            self.passed.append(report.nodeid)


def main(asked: str, answered: str) -> None:
    """Answer a question: which of its modules can be imported, and what its tests say."""
    question = json.loads(Path(asked).read_text(encoding="utf-8"))
    answer: dict[str, Any] = {"help": _help(question["distribution"]), "imports": {}, "tests": None}
    for module in question["modules"]:
        answer["imports"][module] = _import(module)
    if question["tests"] and not any(answer["imports"].values()):
        answer["tests"] = _test(question["tests"])
    Path(answered).write_text(json.dumps(answer), encoding="utf-8")


def _help(distribution: str) -> str:
    """Let the engine be imported without a GPU; return why that cannot be done."""
    wanted = {
        "megatron-core": ("r3_adapter.megatron.cpu", "install"),
        "sglang": ("r3_adapter.sglang.cpu", "enable_cpu"),
    }
    if distribution not in wanted:
        return ""
    module, function = wanted[distribution]
    try:
        import torch

        if not torch.cuda.is_available():
            getattr(importlib.import_module(module), function)()
    except Exception as error:  # whatever a package raises that does not fit this machine
        return f"{type(error).__name__}: {error}"
    return ""


def _import(module: str) -> str:
    """Import a module; return what it raises."""
    try:
        importlib.import_module(module)
    except BaseException as error:  # a module may also exit
        traceback.print_exc()
        return f"{type(error).__name__}: {error}".partition("\n")[0]
    return ""


def _test(paths: list[str]) -> Any:
    try:
        import pytest
    except ImportError:
        return None
    seen = _Seen()
    code = pytest.main([*_PYTEST, *paths], plugins=[seen])
    if code not in (0, 1, 2, 5):
        seen.failed["pytest"] = f"exit code {int(code)}"
    return {"passed": seen.passed, "skipped": seen.skipped, "failed": seen.failed}


def _last(text: str) -> str:
    """Return the line of a report that says what went wrong."""
    lines = [line for line in text.strip().splitlines() if line.strip()]
    errors = [line[1:].strip() for line in lines if line.startswith("E ")]
    return (errors or lines or ["no reason given"])[0 if errors else -1][:300]


if __name__ == "__main__":
    main(*sys.argv[1:])
