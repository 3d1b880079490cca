"""Stands in for torchvision where it is not installed: SGLang imports it at start, and a text-only model never uses it.

Every submodule can be imported, and every name in it is a class that cannot be instantiated.

Source: sglang@0.5.20: srt/utils/common.py, srt/configs/deepseek_ocr.py (the imports).
"""

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__version__ = "0.28.0+stand.in"


class _Stub:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("torchvision: only a stand-in is installed")


class _Members(type):
    """The metaclass of enumerations: each member is its own lower-case name."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name.lower()


class _Module(ModuleType):
    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        kind = _Members if name in ("InterpolationMode", "ImageReadMode") else type
        stub = kind(name, (_Stub,), {"__module__": self.__name__})
        setattr(self, name, stub)
        return stub


class _Submodules(MetaPathFinder, Loader):
    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        return ModuleSpec(fullname, self, is_package=True) if fullname.startswith("torchvision.") else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        module.__path__ = []


sys.meta_path.append(_Submodules())
