"""Names of the engine's that the series uses and that the new release defines nowhere any more.

This sees what types do not: attributes of objects without annotations, `getattr(x, "name", default)`, `patch.object`.
"""

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from r3_adapter.patch.rebase.sides import Finding, Side, parsed

T = TypeVar("T", str, int)

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
    gone = _gone(pinned, new, {name for _, _, name, _ in used})
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


def _gone(pinned: Side, new: Side, used: set[str]) -> set[str]:
    """Return those of some names that the pinned release defines and the new one neither defines nor reads itself."""
    old, now = _sources(pinned), _sources(new)
    differ = {path for path in old.keys() | now.keys() if old.get(path) != now.get(path)}
    gone = (_defined(old, differ) & used) - _defined(now, differ)
    # Files that are the same in both are looked at for the few names that are left.
    texts = [text for text in now.values() if any(name in text for name in gone)]
    gone -= _defined(dict(enumerate(texts)), range(len(texts)))
    # What the release itself still reads is of another library, as a tensor's method.
    return {name for name in gone if not any(re.search(rf"[.]{name}\b(?!\s*=[^=])", text) for text in texts)}


def _sources(side: Side) -> dict[str, str]:
    root = Path(side.released, side.prefix, side.package)
    return {
        path.relative_to(root).as_posix(): path.read_text(encoding="utf-8", errors="replace")
        for path in root.rglob("*.py")
    }


def _defined(texts: Mapping[T, str], paths: Iterable[T]) -> set[str]:
    names: set[str] = set()
    for path in paths:
        for groups in _DEFINES.findall(texts.get(path, "")):
            names.update(groups)
    return names
