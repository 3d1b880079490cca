"""Recorded rollouts as training data: shuffled by seed and epoch, divided among data-parallel ranks, resumable.

An item is a list of samples that make one sequence of a micro-batch: one sample, or as many as are packed into it.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate

import numpy as np
import numpy.typing as npt
from torch.utils.data import DataLoader, Dataset

from r3_adapter.errors import LayoutError, TraceError
from r3_adapter.rollout import Sample, SampleFolder


class _Epochs:
    """Samples of folders by their number in an epoch, in an order of each epoch's own.

    folders: each is read when a sample of it is asked for, so that a rank reads its own share only.

    Raises:
        TraceError: folders without any sample.
    """

    def __init__(self, folders: Sequence[SampleFolder], seed: int) -> None:
        self._folders = list(folders)
        self._ends = list(accumulate(map(len, folders)))
        if not self._ends or not self._ends[-1]:
            raise TraceError(f"no samples in {[str(folder.folder) for folder in folders]}")
        self.num_samples = self._ends[-1]
        # The latest two epochs: workers that read ahead may be in either.
        self._orders = lru_cache(2)(lambda epoch: np.random.default_rng([seed, epoch]).permutation(self.num_samples))

    def order(self, epoch: int) -> npt.NDArray[np.int64]:
        """Return [num_samples] the samples' numbers as the epoch has them."""
        found: npt.NDArray[np.int64] = self._orders(epoch)
        return found

    def sample(self, number: int) -> Sample:
        folder, index = self._place(number)
        return folder[index]

    def num_tokens(self, number: int) -> int:
        folder, index = self._place(number)
        return folder.num_tokens(index)

    def _place(self, number: int) -> tuple[SampleFolder, int]:
        folder = bisect_right(self._ends, number)
        return self._folders[folder], number - self._ends[folder]


class RolloutDataset(Dataset[list[Sample]]):
    """Samples in the order in which they are trained on: each epoch has all of them once, in an order of its own.

    Item i depends on the seed, i and the folders alone: a run that is resumed after n samples goes on with item n.

    folders: each is read when an item of it is asked for, so that a rank reads its own share only.
    num_samples: length; may be more or less than an epoch.

    Raises:
        TraceError: folders without any sample.
    """

    def __init__(self, folders: Sequence[SampleFolder], *, num_samples: int, seed: int) -> None:
        self._epochs, self._num_samples = _Epochs(folders, seed), num_samples
        self.epoch_size = self._epochs.num_samples

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: int) -> list[Sample]:
        epoch, place = divmod(index, self.epoch_size)
        return [self._epochs.sample(int(self._epochs.order(epoch)[place]))]


class PackedRollouts(Dataset[list[Sample]]):
    """Packed sequences: each is filled with the next samples of the epoch, in the order of RolloutDataset.

    A sequence ends before the first sample that does not fit, and at the end of the epoch. Item i depends only on the
    arguments, i and the folders.

    num_sequences: length; may be more or less than an epoch.
    seq_length: tokens of a sequence, padding included.
    padded_length: of a sample with a number of tokens.

    Raises:
        TraceError: folders without any sample.
        LayoutError: a sample that is longer than a sequence.
    """

    def __init__(
        self,
        folders: Sequence[SampleFolder],
        *,
        num_sequences: int,
        seq_length: int,
        padded_length: Callable[[int], int],
        seed: int,
    ) -> None:
        self._epochs, self._num_sequences, self._seq_length = _Epochs(folders, seed), num_sequences, seq_length
        self._lengths = [padded_length(self._epochs.num_tokens(number)) for number in range(self._epochs.num_samples)]
        if (longest := max(self._lengths)) > seq_length:
            raise LayoutError(f"padded length ({longest}) of a sample > sequence length ({seq_length})")
        self._ends: list[int] = []
        """Sequences up to the end of each epoch that was read."""
        self._bounds = lru_cache(2)(self._bounds_of)

    def __len__(self) -> int:
        return self._num_sequences

    def __getitem__(self, index: int) -> list[Sample]:
        while not self._ends or index >= self._ends[-1]:
            number = len(self._bounds(len(self._ends))) - 1
            self._ends.append(number + (self._ends[-1] if self._ends else 0))
        epoch = bisect_right(self._ends, index)
        at = index - (self._ends[epoch - 1] if epoch else 0)
        start, stop = self._bounds(epoch)[at : at + 2]
        return [self._epochs.sample(int(number)) for number in self._epochs.order(epoch)[start:stop]]

    def _bounds_of(self, epoch: int) -> list[int]:
        """Return where in the epoch's order each sequence begins, and its end."""
        bounds, filled = [0], 0
        for place, number in enumerate(self._epochs.order(epoch).tolist()):
            length = self._lengths[number]
            if filled + length > self._seq_length:
                bounds.append(place)
                filled = 0
            filled += length
        return [*bounds, self._epochs.num_samples]


def batches_of_rank(
    dataset: RolloutDataset | PackedRollouts,
    *,
    start: int,
    micro_batch_size: int,
    dp_rank: int,
    dp_size: int,
    num_workers: int = 0,
) -> Iterator[list[Sample]]:
    """Return this data-parallel rank's micro-batches, from item `start` of the dataset on.

    The share is that of Megatron's own sampler: dp_size consecutive micro-batches, one for each rank. The last items
    are left out if they do not fill all of these.
    """
    first = range(start + dp_rank * micro_batch_size, len(dataset), micro_batch_size * dp_size)
    whole = (len(dataset) - start) // (micro_batch_size * dp_size)
    batches = [range(at, at + micro_batch_size) for at in first[:whole]]
    return iter(DataLoader(dataset, batch_sampler=batches, num_workers=num_workers, collate_fn=_joined))  # type: ignore[arg-type]


def _joined(items: Sequence[list[Sample]]) -> list[Sample]:
    return [sample for item in items for sample in item]
