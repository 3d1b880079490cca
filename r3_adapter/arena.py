"""Reuse memory for big arrays: the first touch of a new page costs more than a copy, since it is cleared and mapped."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from r3_adapter.errors import LayoutError

_LINE = 64
"""Bytes of a cache line; an array that begins at one is written in whole lines."""


def aligned_empty(shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Return an array of this shape that begins at a cache line, not initialised."""
    return _cut(np.empty(_size(shape, dtype), dtype=np.uint8), shape, dtype)


class _Loan:
    """The owner that an array, and every view of it, refers to instead of the block that its memory is in."""

    def __init__(self, memory: npt.NDArray[np.uint8]) -> None:
        self.memory = memory
        self.__array_interface__ = memory.__array_interface__


@dataclass(eq=False)
class _Block:
    memory: npt.NDArray[np.uint8]
    loan: "weakref.ref[_Loan] | None" = None

    @property
    def is_free(self) -> bool:
        return self.loan is None or self.loan() is None


class Arena:
    """Hands out arrays, and reuses their memory once nothing refers to them any more.

    A view of an array, or a tensor that shares its memory, counts as a reference, so an array that is held never
    changes. Not safe for several threads at once.

    allocate: returns [n] uint8 for n bytes; for memory of another kind, for instance pinned:
        `lambda n: torch.empty(n, dtype=torch.uint8, pin_memory=True).numpy()`.
    """

    def __init__(self, allocate: Callable[[int], npt.NDArray[np.uint8]] | None = None) -> None:
        self._allocate = allocate or (lambda size: np.empty(size, dtype=np.uint8))
        self._blocks: list[_Block] = []

    @property
    def num_bytes(self) -> int:
        """Bytes that the arena keeps, in use or not."""
        return sum(block.memory.nbytes for block in self._blocks)

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Return an array that begins at a cache line, not initialised, from the smallest free block that holds it.

        Where no free block does, the largest one is given up for a new one.

        Raises:
            LayoutError: the allocator gave other than what it was asked for.
        """
        size = _size(shape, dtype)
        free = sorted((block for block in self._blocks if block.is_free), key=lambda block: block.memory.nbytes)
        block = next((block for block in free if block.memory.nbytes >= size), None)
        if block is None:
            if free:
                self._blocks.remove(free[-1])
            block = _Block(self._new(size))
            self._blocks.append(block)
        loan = _Loan(block.memory)
        block.loan = weakref.ref(loan)
        return _cut(np.asarray(loan), shape, dtype)

    def _new(self, size: int) -> npt.NDArray[np.uint8]:
        memory = self._allocate(size)
        if memory.dtype != np.uint8 or memory.shape != (size,) or not memory.flags.writeable:
            found = f"{memory.dtype} {memory.shape}, {'writeable' if memory.flags.writeable else 'read-only'}"
            raise LayoutError(f"allocate({size}) gave {found} != uint8 ({size},), writeable")
        return memory


def _size(shape: tuple[int, ...], dtype: npt.DTypeLike) -> int:
    return prod(shape) * np.dtype(dtype).itemsize + _LINE


def _cut(memory: npt.NDArray[np.uint8], shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    begin = -memory.ctypes.data % _LINE
    end = begin + prod(shape) * np.dtype(dtype).itemsize
    array: npt.NDArray[Any] = memory[begin:end].view(dtype).reshape(shape)
    return array
