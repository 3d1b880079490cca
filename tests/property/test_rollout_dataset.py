"""Training data of recorded rollouts: each epoch has each sample once, ranks share it out, a resumed run goes on."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torch")

from r3_adapter.errors import TraceError
from r3_adapter.megatron.dataset import RolloutDataset, batches_of_rank
from r3_adapter.rollout import SampleFolder, load_samples, sample_folders, save_samples, unrouted

NUM_SAMPLES = 7


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[SampleFolder]:
    """Seven samples in two folders; sample i is told by its first token, i."""
    root = tmp_path_factory.mktemp("samples")
    samples = [unrouted([i, *range(i), 0], [False, *[True] * (i + 1)]) for i in range(NUM_SAMPLES)]
    save_samples(root / "a", samples[:3])
    save_samples(root / "b", samples[3:])
    return sample_folders([root])


def names(samples: object) -> list[int]:
    return [int(sample.trace.token_ids[0]) for sample in samples]  # type: ignore[attr-defined]


def test_each_epoch_has_each_sample_once_in_another_order(folders: list[SampleFolder]) -> None:
    dataset = RolloutDataset(folders, num_samples=4 * NUM_SAMPLES, seed=1)
    order = names(dataset[i] for i in range(len(dataset)))
    epochs = [order[at : at + NUM_SAMPLES] for at in range(0, len(order), NUM_SAMPLES)]
    assert all(sorted(epoch) == list(range(NUM_SAMPLES)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    again = RolloutDataset(folders, num_samples=NUM_SAMPLES, seed=1)
    assert names(again[i] for i in range(NUM_SAMPLES)) == epochs[0]
    other = RolloutDataset(folders, num_samples=NUM_SAMPLES, seed=2)
    assert names(other[i] for i in range(NUM_SAMPLES)) != epochs[0]


@given(
    dp_size=st.integers(1, 3), size=st.integers(1, 3), rows=st.integers(0, 4), done=st.integers(0, 3), rest=st.data()
)
def test_ranks_share_what_is_left_of_a_run(
    folders: list[SampleFolder], dp_size: int, size: int, rows: int, done: int, rest: st.DataObject
) -> None:
    """Row by row of micro-batches, from where the run was stopped; what fills no row is left out."""
    step = dp_size * size
    extra = rest.draw(st.integers(0, step - 1))
    dataset = RolloutDataset(folders, num_samples=(done + rows) * step + extra, seed=3)
    shares = [
        list(batches_of_rank(dataset, start=done * step, micro_batch_size=size, dp_rank=rank, dp_size=dp_size))
        for rank in range(dp_size)
    ]
    assert {len(share) for share in shares} == {rows}
    found = [names(batch) for row in zip(*shares, strict=True) for batch in row]
    want = names(dataset[i] for i in range(done * step, (done + rows) * step))
    assert [name for batch in found for name in batch] == want
    assert all(len(batch) == size for batch in found)


def test_folders_are_read_lazily_and_as_a_whole(folders: list[SampleFolder]) -> None:
    assert [len(folder) for folder in folders] == [3, 4]
    for folder in folders:
        for one, other in zip(folder, load_samples(folder.folder), strict=True):
            np.testing.assert_array_equal(one.trace.token_ids, other.trace.token_ids)
            np.testing.assert_array_equal(one.sampled, other.sampled)
    assert names(folders[1][1:3]) == [4, 5]
    assert names([folders[1][-1]]) == [6]
    assert Counter(names(sample for folder in folders for sample in folder)) == Counter(range(NUM_SAMPLES))
    with pytest.raises(IndexError):
        folders[0][3]


def test_a_folder_without_samples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="neither a folder of samples nor one of such folders"):
        sample_folders([tmp_path])
    save_samples(tmp_path, [])
    with pytest.raises(TraceError, match="no samples in"):
        RolloutDataset(sample_folders([tmp_path]), num_samples=1, seed=0)
