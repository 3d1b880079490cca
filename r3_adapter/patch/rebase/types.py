"""What mypy says of the engine's types in the files that a series touches: attributes, arguments, overridden methods.

No engine is installed for it: what the tree does not have is Any, but for the stubs beside this file, whose classes are
bases of the engine's own.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from r3_adapter.errors import PatchError
from r3_adapter.patch.rebase.sides import Finding

_STUBS = Path(__file__).with_name("stubs")
_OPTIONS = (
    "--ignore-missing-imports",
    "--follow-imports=silent",
    "--check-untyped-defs",
    "--no-strict-optional",
    "--no-site-packages",
    "--namespace-packages",
    "--explicit-package-bases",
    "--hide-error-context",
    "--output=json",
)
# Failing code, whatever the types are meant to be; the rest of mypy's words may be a matter of annotation alone.
_BREAKS = frozenset(
    ("abstract", "attr-defined", "call-arg", "call-overload", "name-defined", "override", "syntax", "union-attr")
)
_STYLE = frozenset(("annotation-unchecked", "has-type", "no-redef", "valid-type", "var-annotated"))


def type_errors(root: Path, folder: Path, files: Sequence[str], cache: Path) -> list[Finding]:
    """Run mypy on some files of a folder.

    root: what imports of the package start from. cache: a folder that mypy keeps what it knows in.

    Raises:
        PatchError: mypy is not installed, or failed.
    """
    there = [path for path in files if (folder / path).is_file()]
    if not there:
        return []
    with tempfile.NamedTemporaryFile("w", suffix=".ini") as config:
        config.write(f"[mypy]\nmypy_path = {root.resolve()}:{_STUBS}\n")
        config.flush()
        options = [f"--config-file={config.name}", f"--cache-dir={cache}", *_OPTIONS]
        command = [sys.executable, "-m", "mypy", *options, "--", *there]
        run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    lines = [line for line in run.stdout.splitlines() if line.startswith("{")]
    if run.returncode and not lines:
        said = (run.stderr or run.stdout).strip() or f"exit code {run.returncode}"
        raise PatchError(f"mypy failed; `pip install 'r3-adapter[test]'` installs it: {said}")
    found = [json.loads(line) for line in lines]
    errors = (each for each in found if each["severity"] == "error" and each["code"] not in _STYLE)
    return [
        Finding(each["file"], each["line"], "types", _plain(each["message"]), each["code"] in _BREAKS)
        for each in errors
    ]


def _plain(message: str) -> str:
    """Leave out what differs between releases although the fault is the same."""
    return re.sub(r"; maybe .*$| on line \d+", "", message)
