"""What launch/pins.sh found of each pin: a line a pin in patches/results.jsonl, and a cell in the table of versions."""

import hashlib
import json
import sys
from collections.abc import Mapping
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from r3_adapter.errors import PatchError
from r3_adapter.patch.series import Series, load_series

RESULTS = "results.jsonl"
_BESIDE = ("sglang", "megatron-core", "torch")
_PREPARES = ("setup", "exchange")
"""Steps that make an environment, and show nothing of the pin."""


def put_result(root: Path, found: Mapping[str, Any]) -> None:
    """Keep what launch/pins.py found of a pin, in place of what was found before.

    root: the folder of all series.
    found: its JSON. What was installed, and the day, are this environment's and today, unless it says.

    Raises:
        PatchError: It is not of a pin, or of an environment that has another version.
    """
    result = {"day": str(date.today()), "versions": _versions(), **found}
    series = _pin(root, result)
    if result["versions"].get(series.distribution) != series.version:
        raise PatchError(f"{result['pin']}: the environment has {result['versions'].get(series.distribution)}")
    result["series"] = fingerprint(series)
    kept = read_results(root) | {(series.distribution, series.version): result}
    lines = [json.dumps(kept[pin]) for pin in sorted(kept)]
    (root / RESULTS).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")


def read_results(root: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Return what was found of pins, by distribution and version.

    Raises:
        PatchError: The file is malformed.
    """
    path, results = root / RESULTS, {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            result = json.loads(line)
            distribution, _, pin = result["pin"].partition("==")
            results[distribution, pin] = result
        except (ValueError, TypeError, KeyError) as error:
            raise PatchError(f"{path}: malformed: {error!r}: {line!r}") from error
    return results


def cell_of(root: Path, result: Mapping[str, Any]) -> str:
    """Return the cell of a pin in the table of versions."""
    series = _pin(root, result)
    steps = {name: step["passed"] for name, step in result["steps"].items()}
    failed = [name for name, passed in steps.items() if not passed]
    passed = [name for name, passed in steps.items() if passed and name not in _PREPARES]
    words = [f"failed: {', '.join(failed)}"] if failed else []
    words += [f"passed: {', '.join(passed)}"] if passed else []
    beside = ", ".join(f"{name} {have}" for name, have in result["versions"].items() if name != series.distribution)
    before = "" if result["series"] == fingerprint(series) else "before the patches changed, "
    return f"{before}{'; '.join(words)} ({beside})"


def fingerprint(series: Series) -> str:
    """Return what tells apart the patched files of one state of a series from another's."""
    hashes = {path: (pin.before, pin.after) for path, pin in series.files.items()}
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()[:16]


def _pin(root: Path, result: Mapping[str, Any]) -> Series:
    distribution, _, pin = result["pin"].partition("==")
    found = [series for series in load_series(root).get(distribution, ()) if series.version == pin]
    if not found:
        raise PatchError(f"{result['pin']}: no pin, so that nothing can be recorded of it")
    return found[0]


def _versions() -> dict[str, str]:
    versions = {}
    for name in _BESIDE:
        try:
            versions[name] = version(name).partition("+")[0]
        except PackageNotFoundError:
            continue
    return {**versions, "Python": f"{sys.version_info.major}.{sys.version_info.minor}"}
