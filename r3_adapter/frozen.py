"""Arrays whose memory is never written again, so that one check of them stays valid."""

from typing import Any

import numpy as np
import numpy.typing as npt


class _Frozen:
    """What read-only arrays refer to instead of the array that could be made writeable again."""

    def __init__(self, array: npt.NDArray[Any]) -> None:
        self._array = array
        address, _ = array.__array_interface__["data"]
        self.__array_interface__ = {**array.__array_interface__, "data": (address, True)}


def freeze(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return a read-only view of an array; the caller promises that nothing writes its memory."""
    return np.asarray(_Frozen(array))


def is_frozen(data: npt.NDArray[Any] | memoryview) -> bool:
    """Return whether the memory stays as it is: it belongs to bytes or was frozen, and no view on the way can write.

    A read-only array that owns its memory is not: its flag can be turned back.
    """
    owner: object = data
    while isinstance(owner, np.ndarray | memoryview):
        if owner.flags.writeable if isinstance(owner, np.ndarray) else not owner.readonly:
            return False
        owner = owner.base if isinstance(owner, np.ndarray) else owner.obj
    return type(owner) in (bytes, _Frozen)
