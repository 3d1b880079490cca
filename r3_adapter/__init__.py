"""Rollout Routing Replay between SGLang and Megatron-core; `r3_adapter.public` lists what programs may count on."""

from pkgutil import extend_path

# A checkout that comes first on the path has no compiled module; that of an installed wheel serves it.
__path__ = extend_path(__path__, __name__)


def __getattr__(name: str) -> str:
    """Return `__version__`, which the installed metadata says."""
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Asked for rarely, and it imports a dozen modules.
    from importlib.metadata import version

    return version("r3-adapter")
