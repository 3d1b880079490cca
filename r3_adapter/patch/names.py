"""Names that a Python file uses and nothing in it defines; nothing is imported or run."""

import ast
import builtins
import symtable
from collections.abc import Iterator

from r3_adapter.errors import PatchError

_IMPLICIT = frozenset(("__file__", "__path__", "__class__", "__module__", "__qualname__"))


def undefined_names(path: str, data: bytes | None) -> dict[str, list[int]]:
    """Return the lines, from 1, that use each name which is undefined in a file; None stands for no file.

    Raises:
        PatchError: It is no Python.
    """
    if data is None:
        return {}
    try:
        text = data.decode()
        top, tree = symtable.symtable(text, path, "exec"), ast.parse(text, path)
    except (SyntaxError, ValueError) as error:
        raise PatchError(f"{path}: no Python: {error}") from error
    if b"import *" in data:
        return {}
    tables = list(_tables(top))
    known = {symbol.get_name() for symbol in top.get_symbols() if symbol.is_assigned() or symbol.is_imported()}
    known |= {
        symbol.get_name()
        for table in tables
        for symbol in table.get_symbols()
        if symbol.is_declared_global() and symbol.is_assigned()
    }
    used = {
        symbol.get_name()
        for table in tables
        for symbol in table.get_symbols()
        if symbol.is_referenced() and (symbol.is_global() or table is top)
    }
    undefined = used - known - set(dir(builtins)) - _IMPLICIT
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id in undefined]
    return {name: sorted({node.lineno for node in nodes if node.id == name}) for name in sorted(undefined)}


def _tables(table: symtable.SymbolTable) -> Iterator[symtable.SymbolTable]:
    yield table
    for child in table.get_children():
        yield from _tables(child)
