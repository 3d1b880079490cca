"""Names that are not defined, and imports of the engine's own modules that do not resolve; nothing is imported."""

import ast
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from r3_adapter.errors import PatchError
from r3_adapter.patch.names import undefined_names as names_of
from r3_adapter.patch.rebase.sides import Finding, Side, module_file, parsed


def undefined_names(folder: Path, files: Sequence[str]) -> list[Finding]:
    """Return the names that nothing defines in some files of a folder, and files that are no Python."""
    found = []
    for path in files:
        data = (folder / path).read_bytes() if (folder / path).is_file() else None
        try:
            names = names_of(path, data)
        except PatchError as error:
            found.append(Finding(path, 0, "names", str(error)))
            continue
        found += [
            Finding(path, line, "names", f"Undefined name `{name}`") for name, lines in names.items() for line in lines
        ]
    return found


def unresolved_imports(side: Side) -> list[Finding]:
    """Return the imports in lines of the series, and the names that its tests patch, that the release does not have."""
    found = []
    for path in side.files():
        tree, ours = parsed(side.folder / path), side.ours[path]
        for line, module, name in _imported(tree, side.dotted) if tree else ():
            if line in ours and (missing := _missing(side, module, name)):
                found.append(Finding(path, line, "imports", missing))
    return found


def _imported(tree: ast.Module, package: str) -> Iterator[tuple[int, str, str | None]]:
    """Yield the line, the module and the name (None: the module itself) of imports from the package."""
    for node in ast.walk(tree):
        wanted: list[tuple[int, str, str | None]]
        if isinstance(node, ast.Import):
            wanted = [(alias.lineno, alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            wanted = [(alias.lineno, str(node.module), alias.name) for alias in node.names]
        elif isinstance(node, ast.Call) and (text := _patched_name(node)):
            module, _, name = text.rpartition(".")
            wanted = [(node.lineno, module, name)]
        else:
            continue
        yield from (each for each in wanted if f"{each[1]}.".startswith(f"{package}."))


def _patched_name(call: ast.Call) -> str | None:
    """Return what `patch("a.b.c")` patches."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    first = call.args[0] if call.args else None
    if name in ("patch", "import_module") and isinstance(first, ast.Constant) and isinstance(first.value, str):
        return first.value
    return None


def _missing(side: Side, module: str, name: str | None) -> str | None:
    root = side.folder / side.prefix
    path = module_file(root, module)
    if path is None:
        # `patch` may name a method: the module is further left.
        parent, _, owner = module.rpartition(".")
        above = module_file(root, parent) if parent else None
        return None if above is not None and owner in _names(root, above) else f"no module {module}"
    if name in (None, "*") or path.is_dir() or module_file(root, f"{module}.{name}"):
        return None if name in (None, "*") or module_file(root, f"{module}.{name}") else f"no module {module}.{name}"
    names = _names(root, path)
    return None if name in names or "*" in names else f"module {module} has no {name}"


@cache
def _names(root: Path, path: Path) -> frozenset[str]:
    """Return what a module binds; "*" where that cannot be told without running it."""
    tree = parsed(path)
    if tree is None:
        return frozenset(("*",)) if path.suffix == ".so" else frozenset()
    names: set[str] = set()
    for node in _top_level(tree.body):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                names.add("*" if name == "__getattr__" else name)
            case ast.Import(names=aliases) | ast.ImportFrom(names=aliases):
                names |= {(alias.asname or alias.name).partition(".")[0] for alias in aliases}
            case _:
                stores = (each for each in ast.walk(node) if isinstance(each, ast.Name))
                names |= {each.id for each in stores if isinstance(each.ctx, ast.Store)}
                names |= {"*" for each in ast.walk(node) if isinstance(each, ast.Name) and each.id == "globals"}
    return frozenset(names)


def _top_level(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements of a module that run when it is imported, those inside `if`, `try` and `with` too."""
    for node in body:
        yield node
        for block in ("body", "orelse", "finalbody"):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                yield from _top_level(getattr(node, block, ()))
        for handler in getattr(node, "handlers", ()):
            yield from _top_level(handler.body)
