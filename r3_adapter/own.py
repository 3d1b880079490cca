"""Functions of the user's own, which a flag names."""

import importlib
from typing import Any

from r3_adapter.errors import R3Error


def function_named(what: str, name: str) -> Any:
    """Return the function "package.module:function"; a dot in place of the colon is the same.

    what: it is for, as the error says.

    Raises:
        R3Error: there is none of that name.
    """
    module, _, attribute = name.replace(":", ".").rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as error:
        # The module is the user's: importing it may raise anything.
        raise R3Error(f"{what} {name!r} is no package.module:function: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise R3Error(f"{what} {name!r} is {type(found).__name__}, no function")
    return found
