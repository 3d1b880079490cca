"""Stands in for SGLang's compiled kernels where there is no GPU: names to import, none of which computes.

On a CPU without AMX kernels SGLang imports `*_cpu` names at start, and then takes its own torch implementations.

Source: sglang@0.5.20: srt/speculative/eagle_info.py, srt/mem_cache (the imports); srt/utils:cpu_has_amx_support.
"""

from collections.abc import Callable
from typing import Any, NoReturn


def __getattr__(name: str) -> Callable[..., NoReturn]:
    if name.startswith("__") or not name.endswith("_cpu"):
        raise AttributeError(f"module {__name__!r} (a stand-in without a GPU) has no attribute {name!r}")

    def missing(*args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name}: only a stand-in is installed")

    return missing
