"""Products of many small matrices, one for each expert, in a few calls: for experts in bfloat16 on a CPU.

oneDNN adds bfloat16 up in float32 and in one order, so that rows of zeros beside the others change no bit of a product,
and neither does the product of how many matrices a call is. In float32 this does not hold.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch

_LEAST = 16


class GroupedRows:
    """Where rows lie if each expert has room for a power of two of them: oneDNN makes a kernel for each number of rows.

    counts: the rows of each expert, which lie one expert after the other.
    experts: those that have rows, in the order in which their matrices are to be stacked.
    place: [rows] int64, the place of each row among the padded ones.
    """

    def __init__(self, counts: Sequence[int]) -> None:
        capacities = [max(_LEAST, 1 << (count - 1).bit_length()) if count else 0 for count in counts]
        self.experts = sorted((e for e, capacity in enumerate(capacities) if capacity), key=capacities.__getitem__)
        starts, self._parts, self._num_places = [0] * len(counts), list[tuple[slice, slice, int]](), 0
        at = 0
        for capacity, group in groupby(self.experts, key=capacities.__getitem__):
            first = self._num_places
            for expert in group:
                starts[expert] = self._num_places
                self._num_places += capacity
            num = (self._num_places - first) // capacity
            self._parts.append((slice(first, self._num_places), slice(at, at + num), capacity))
            at += num
        before = torch.tensor([0, *counts]).cumsum(0)[:-1]
        shift = torch.tensor(starts) - before
        self.place = torch.arange(sum(counts)) + shift.repeat_interleave(torch.tensor(counts))

    def padded(self, rows: torch.Tensor) -> torch.Tensor:
        """Return [places, ...] rows where they belong, and zeros between them; rows: [rows, ...]."""
        return rows.new_zeros(self._num_places, *rows.shape[1:]).index_copy_(0, self.place, rows)

    def through(self, padded: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
        """Return [rows, out] each row times its expert's matrix; padded: [places, in]; matrices: [experts, in, out]."""
        out = padded.new_empty(self._num_places, matrices.shape[2])
        for places, at, capacity in self._parts:
            torch.bmm(_split(padded[places], capacity), matrices[at], out=_split(out[places], capacity))
        return out.index_select(0, self.place)

    def products(self, left: torch.Tensor, right: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield [a, b] each expert's left rows, transposed, times its right; left: [places, a]; right: [places, b]."""
        for places, _, capacity in self._parts:
            yield from torch.bmm(_split(left[places], capacity).transpose(1, 2), _split(right[places], capacity))


def _split(rows: torch.Tensor, capacity: int) -> torch.Tensor:
    return rows.view(-1, capacity, rows.shape[1])
