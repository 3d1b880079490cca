"""Recorded rollouts as training data: shuffled by seed and epoch, shared out over data-parallel ranks, resumable."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate

import numpy as np
import numpy.typing as npt
from torch.utils.data import DataLoader, Dataset

from r3_adapter.errors import TraceError
from r3_adapter.rollout import Sample, SampleFolder


class RolloutDataset(Dataset[Sample]):
    """Samples in the order in which they are trained on: each epoch has all of them once, in an order of its own.

    Item i depends on the seed, i and the folders alone: a run that is resumed after n samples goes on with item n.

    folders: each is read when an item of it is asked for, so that a rank reads its own share only.
    num_samples: length; may be more or less than an epoch.

    Raises:
        TraceError: folders without any sample.
    """

    def __init__(self, folders: Sequence[SampleFolder], *, num_samples: int, seed: int) -> None:
        self._folders, self._num_samples = list(folders), num_samples
        self._ends = list(accumulate(map(len, folders)))
        if not self._ends or not self._ends[-1]:
            raise TraceError(f"no samples in {[str(folder.folder) for folder in folders]}")
        self.epoch_size = self._ends[-1]
        # The latest two epochs: workers that read ahead are at both sides of a border.
        self._order = lru_cache(2)(lambda epoch: np.random.default_rng([seed, epoch]).permutation(self.epoch_size))

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: int) -> Sample:
        epoch, place = divmod(index, self.epoch_size)
        order: npt.NDArray[np.int64] = self._order(epoch)
        number = int(order[place])
        folder = bisect_right(self._ends, number)
        return self._folders[folder][number - self._ends[folder]]


def batches_of_rank(
    dataset: RolloutDataset, *, start: int, micro_batch_size: int, dp_rank: int, dp_size: int, num_workers: int = 0
) -> Iterator[list[Sample]]:
    """Return this data-parallel rank's micro-batches, from sample `start` of the dataset on.

    The share is that of Megatron's own sampler: dp_size micro-batches in a row, one for each rank. The last samples are
    left out where they fill no such row.
    """
    first = range(start + dp_rank * micro_batch_size, len(dataset), micro_batch_size * dp_size)
    whole = (len(dataset) - start) // (micro_batch_size * dp_size)
    batches = [range(at, at + micro_batch_size) for at in first[:whole]]
    return iter(DataLoader(dataset, batch_sampler=batches, num_workers=num_workers, collate_fn=list))  # type: ignore[arg-type]
