"""Stands in for TransformerEngine while megatron-bridge is imported on a machine that lacks it.

megatron-bridge imports and subclasses classes of TransformerEngine at start, though it uses none of them where the
layers are Megatron's own.
"""

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from r3_adapter.errors import ReplayError

_STANDS_FOR = ("transformer_engine", "transformer_engine_torch")


class _Anything(type):
    """Classes that have every attribute: themselves."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return cls


class _Stub(torch.nn.Module, metaclass=_Anything):
    """What each name of a stubbed module is a subclass of; nothing makes one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise ReplayError(f"{type(self).__name__} is TransformerEngine's, which is not installed")


class _StubModule(types.ModuleType):
    """A module that has every name."""

    __path__: list[str] = []  # noqa: RUF012

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (_Stub,), {})
        setattr(self, name, made)
        return made


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] not in _STANDS_FOR:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _StubModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None: ...


@contextmanager
def transformer_engine() -> Iterator[None]:
    """Let imports inside find a TransformerEngine, and no import after it.

    Raises:
        ReplayError: a module of Megatron-core was imported inside and took the stub for the real one.
    """
    before = set(sys.modules)
    finder = _Finder()
    sys.meta_path.append(finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.partition(".")[0] in _STANDS_FOR]:
            del sys.modules[name]
    for name in sys.modules.keys() - before:
        if name.startswith("megatron.core.") and getattr(sys.modules[name], "HAVE_TE", False):
            raise ReplayError(
                f"{name} was imported beside a stand-in for TransformerEngine and took it for the real one"
            )
