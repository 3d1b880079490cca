"""Names of the engine's that the series uses and that the new release defines nowhere any more.

This sees what types do not: attributes of objects without annotations, `getattr(x, "name", default)`, `patch.object`.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from r3_adapter.rebase.sides import Finding, Side, parsed

_DEFINES = re.compile(
    r"\b(?:def|class)[ \t]+(\w+)"  # functions and classes
    r"|^[ \t]*(\w+)[ \t]*:(?!=)"  # annotated names: fields and parameters
    r"|^[ \t]*(\w+)[ \t]+=[ \t]"  # names; keyword arguments have no spaces
    r"|[.](\w+)[ \t]*(?::[^=\n]*)?=[^=]"  # attributes of self and others
    r"|[(,][ \t]*(\w+)[ \t]*:(?!=)",  # parameters in one line
    re.MULTILINE,
)
_ASKS = ("getattr", "hasattr")
_MUST = ("setattr", "object")  # `patch.object`


def vanished_names(pinned: Side, new: Side) -> list[Finding]:
    """Return the names that lines of the series read, that the pinned release defined and the new one does not."""
    used = [(path, line, name, breaks) for path in new.files() for line, name, breaks in _reads(new, path)]
    gone = _defined(pinned) - _defined(new)
    text = f"is defined nowhere in {new.package} {new.version}, but was in {pinned.version}"
    found = {
        Finding(path, line, "uses", f'"{name}" {text}', breaks) for path, line, name, breaks in used if name in gone
    }
    return sorted(found)


def _reads(side: Side, path: str) -> Iterator[tuple[int, str, bool]]:
    """Yield line and name of the attributes and keyword arguments that lines of the series name.

    With each, whether it must be there: `hasattr` and a `getattr` with a default ask.
    """
    tree, ours = parsed(side.folder / path), side.ours[path]
    for node in ast.walk(tree) if tree else ():
        match node:
            case ast.Attribute(attr=name, ctx=ast.Load(), end_lineno=int(line)):
                found = (line, name, True)
            case ast.Call(func=function, args=[_, ast.Constant(value=str(name)), *rest], lineno=line):
                by = str(getattr(function, "id", getattr(function, "attr", "")))
                found = (line, name, by in _MUST or (by == "getattr" and not rest))
                if by not in (*_MUST, *_ASKS):
                    continue
            case ast.keyword(arg=str(name), lineno=line):
                found = (line, name, True)
            case _:
                continue
        if found[0] in ours:
            yield found


def _defined(side: Side) -> set[str]:
    """Return the names that the release defines, wherever that is."""
    names: set[str] = set()
    for path in Path(side.released, side.prefix, side.package).rglob("*.py"):
        for groups in _DEFINES.findall(path.read_text(encoding="utf-8", errors="replace")):
            names.update(groups)
    return names
