"""Whether the compiled module was built from this source: what its functions take is what `_core.pyi` says."""

import ast
import re
from pathlib import Path
from types import ModuleType


def check_core(core: ModuleType) -> None:
    """Compare each function's arguments with the stub's, so that an old build is named before a call of it fails.

    A checkout that was changed since it was built has such a module, and so has one that finds that of another release.

    Raises:
        ImportError: The module lacks a function, or one takes other arguments.
    """
    stub = Path(__file__).with_name("_core.pyi")
    for function in ast.parse(stub.read_text(encoding="utf-8")).body:
        if not isinstance(function, ast.FunctionDef):
            continue
        wants = [each.arg for each in (*function.args.args, *function.args.kwonlyargs)]
        takes = _arguments(getattr(core, function.name, None))
        if takes != wants:
            found = "is not there" if takes is None else f"takes ({', '.join(takes)})"
            raise ImportError(
                f"{core.__file__} was built from other sources: {function.name} {found}, and {stub} wants "
                f"({', '.join(wants)}); build it again: `pip install --no-deps .`, with -e for a checkout you work in",
                name=core.__name__,
                path=core.__file__,
            )


def _arguments(function: object) -> list[str] | None:
    """Return the names in the first line that pybind11 writes of a function; None for no function."""
    lines = (function.__doc__ or "").splitlines() if function is not None else []
    return re.findall(r"(\w+): ", lines[0]) if lines else None
