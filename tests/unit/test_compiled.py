"""A compiled module of other sources is named when it is imported, not when a call of it fails."""

from collections.abc import Callable
from types import ModuleType

import pytest

from r3_adapter import _core
from r3_adapter.compiled import check_core


def older_repack(core: ModuleType) -> None:
    def repack() -> None:
        pass

    repack.__doc__ = _core.repack.__doc__.replace("ep_size: ", "num_parts: ")
    core.repack = repack


def without_sets(core: ModuleType) -> None:
    del core.encode_sets


def without_an_argument(core: ModuleType) -> None:
    def set_bits() -> None:
        """set_bits(num_experts: int) -> int"""

    core.set_bits = set_bits


CHANGES: dict[str, tuple[Callable[[ModuleType], None], str]] = {
    "another argument": (older_repack, "repack takes (topk_ids, "),
    "no such function": (without_sets, "encode_sets is not there, and "),
    "an argument less": (without_an_argument, "set_bits takes (num_experts), and "),
}


@pytest.mark.parametrize(("change", "says"), CHANGES.values(), ids=CHANGES)
def test_a_module_of_other_sources_is_named(change: Callable[[ModuleType], None], says: str) -> None:
    core = ModuleType("r3_adapter._core")
    core.__dict__.update(_core.__dict__)
    check_core(core)
    change(core)
    with pytest.raises(ImportError) as caught:
        check_core(core)
    assert str(caught.value).startswith(f"{_core.__file__} was built from other sources: {says}")
    assert "build it again: `pip install" in str(caught.value)
