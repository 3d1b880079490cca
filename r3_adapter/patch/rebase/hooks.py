"""What a maintainer is to read: functions of the engine that the series hooks or uses and that upstream has changed.

A merge without a conflict says that the lines around a hook are the same, not that the function still does what the
hook relies on, or is called where it was.
"""

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from r3_adapter.patch.rebase.sides import Finding, Side, module_file, parsed

_Function = ast.FunctionDef | ast.AsyncFunctionDef
_MANY = 12
"""Call sites; a name that is called in more places is of more functions than one."""


def changed_hosts(pinned: Side, new: Side) -> list[Finding]:
    """Return the functions that the series changes and whose released code is not as in the pinned release."""
    found = []
    for path in new.sources():
        before, after = _functions(pinned.released / path), _functions(new.released / path)
        for name in _hosts(new, path):
            if name in before and name in after and _code(before[name]) != _code(after[name]):
                text = f"{name} is hooked, and upstream changed it since {pinned.version}"
                found.append(Finding(path, after[name].lineno, "hooks", text, breaks=False))
    return found


def changed_uses(pinned: Side, new: Side) -> list[Finding]:
    """Return the functions and classes that lines of the series import and whose code upstream has changed."""
    found = set()
    for path in new.files():
        tree = parsed(new.folder / path)
        nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)] if tree else []
        for module, alias in ((node.module, alias) for node in nodes for alias in node.names):
            if not module or alias.lineno not in new.ours[path]:
                continue
            before, after = (_definition(side, module, alias.name) for side in (pinned, new))
            if before and after and _code(before) != _code(after):
                text = f"{module}.{alias.name} is used, and upstream changed it since {pinned.version}"
                found.add(Finding(path, alias.lineno, "hooks", text, breaks=False))
    return sorted(found)


def moved_calls(pinned: Side, new: Side) -> list[Finding]:
    """Return the hooked functions that are called elsewhere than before, or nowhere any more."""
    every = [(path, name) for path in new.sources() for name in _hosts(new, path, outer=True)]
    hosts = {name.rpartition(".")[2]: (path, name) for path, name in every}
    hosts = {short: place for short, place in hosts.items() if not short.startswith("__")}
    before, after = (_callers(side, hosts) for side in (pinned, new))
    found = []
    for short, (path, name) in hosts.items():
        gone, come = before[short] - after[short], after[short] - before[short]
        if not gone or len(before[short]) > _MANY:
            continue
        where = f"now {', '.join(sorted(come))}" if come else "called nowhere in its place"
        text = f"{name} is hooked; {', '.join(sorted(gone))} called it in {pinned.version}, {where}"
        found.append(Finding(path, 0, "hooks", text, breaks=not after[short]))
    return found


def callers_of_changed(side: Side) -> list[str]:
    """Return the files that the series leaves alone and that call a function of which it changes the parameters."""
    names = set()
    for path in side.sources():
        before = _functions(side.released / path)
        for name, node in _functions(side.folder / path).items():
            if name in before and ast.dump(node.args) != ast.dump(before[name].args):
                names.add(name.split(".")[-2] if name.endswith(".__init__") else name.rpartition(".")[2])
    called = [places for places in _callers(side, dict.fromkeys(names)).values() if len(places) <= _MANY]
    places = {place.partition(":")[0] for each in called for place in each}
    return sorted({f"{side.prefix}{place}" for place in places} - set(side.ours))


def _hosts(side: Side, path: str, *, outer: bool = False) -> list[str]:
    """Return the released functions with lines of the series in them: of nested ones the innermost or outermost."""
    there, names = _functions(side.released / path), []
    for name, node in _functions(side.folder / path).items():
        lines = set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
        if name in there and lines & side.ours[path]:
            names.append(name)
    if outer:
        return [name for name in names if not any(name.startswith(f"{other}.") for other in names)]
    return [name for name in names if not any(other.startswith(f"{name}.") for other in names)]


def _functions(path: Path) -> dict[str, _Function]:
    """Return the functions of a file by qualified name; of several with one name the last."""
    tree = parsed(path)
    return dict(_walk(tree.body, "")) if tree else {}


def _walk(body: list[ast.stmt], above: str) -> Iterator[tuple[str, _Function]]:
    for node in body:
        if isinstance(node, _Function):
            yield f"{above}{node.name}", node
        if isinstance(node, _Function | ast.ClassDef):
            yield from _walk(node.body, f"{above}{node.name}.")
        elif isinstance(node, ast.If | ast.Try):
            yield from _walk([*node.body, *node.orelse], above)


def _definition(side: Side, module: str, name: str) -> ast.stmt | None:
    path = module_file(side.released / side.prefix, module)
    tree = parsed(path) if path and path.is_file() else None
    nodes = tree.body if tree else []
    return next((node for node in nodes if isinstance(node, _Function) and node.name == name), None)


def _code(node: ast.AST) -> str:
    """Return what a function does: its code without comments, docstring and places."""
    body = [each for each in getattr(node, "body", ()) if not isinstance(getattr(each, "value", None), ast.Constant)]
    signature = ast.dump(node.args) if isinstance(node, _Function) else ""
    return signature + "".join(ast.dump(each) for each in body)


def _callers(side: Side, names: Mapping[str, object]) -> dict[str, set[str]]:
    """Return which functions of the release call something with one of some names."""
    found: dict[str, set[str]] = {name: set() for name in names}
    if not names:
        return found
    called = re.compile(rf"(?<!def )\b({'|'.join(map(re.escape, names))})\(")
    heads = [f"{name}(" for name in names]
    root = side.released / side.prefix
    for path in (root / side.package).rglob("*.py"):
        text = path.read_text(encoding="utf-8", errors="replace")
        if not any(head in text for head in heads):
            continue
        lines = [(text.count("\n", 0, match.start()) + 1, match[1]) for match in called.finditer(text)]
        spans = [(node.lineno, node.end_lineno or 0, name) for name, node in _functions(path).items()] if lines else []
        for line, name in lines:
            inside = [span for span in spans if span[0] <= line <= span[1]]
            place = max(inside)[2] if inside else "the module"
            found[name].add(f"{path.relative_to(root).as_posix()}:{place}")
    return found
