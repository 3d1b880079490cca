"""Training data of recorded rollouts: each epoch has each sample once, ranks share it out, a resumed run goes on."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torch")

from r3_adapter.errors import LayoutError, TraceError
from r3_adapter.megatron.dataset import PackedRollouts, RolloutDataset, batches_of_rank
from r3_adapter.rollout import Sample, SampleFolder, load_samples, sample_folders, save_samples, unrouted
from r3_adapter.trace import RoutingTrace

NUM_SAMPLES = 7


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[SampleFolder]:
    """Seven samples in two folders; sample i is told by its first token, i."""
    root = tmp_path_factory.mktemp("samples")
    samples = [unrouted([i, *range(i), 0], [False, *[True] * (i + 1)]) for i in range(NUM_SAMPLES)]
    save_samples(root / "a", samples[:3])
    save_samples(root / "b", samples[3:])
    return sample_folders([root])


def names(samples: Iterable[Sample]) -> list[int]:
    return [int(sample.trace.token_ids[0]) for sample in samples]


def names_of(dataset: RolloutDataset | PackedRollouts, items: range) -> list[int]:
    return [name for item in items for name in names(dataset[item])]


def test_each_epoch_has_each_sample_once_in_another_order(folders: list[SampleFolder]) -> None:
    dataset = RolloutDataset(folders, num_samples=4 * NUM_SAMPLES, seed=1)
    order = names_of(dataset, range(len(dataset)))
    epochs = [order[at : at + NUM_SAMPLES] for at in range(0, len(order), NUM_SAMPLES)]
    assert all(sorted(epoch) == list(range(NUM_SAMPLES)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    again = RolloutDataset(folders, num_samples=NUM_SAMPLES, seed=1)
    assert names_of(again, range(NUM_SAMPLES)) == epochs[0]
    other = RolloutDataset(folders, num_samples=NUM_SAMPLES, seed=2)
    assert names_of(other, range(NUM_SAMPLES)) != epochs[0]


@given(seq_length=st.integers(2 * (NUM_SAMPLES + 1), 60), num_sequences=st.integers(0, 25), start=st.integers(0, 9))
def test_sequences_are_packed_with_the_samples_of_an_epoch_in_order(
    folders: list[SampleFolder], seq_length: int, num_sequences: int, start: int
) -> None:
    """A sequence ends where the next sample does not fit, or the epoch ends; any is found without those before it."""

    def packed() -> PackedRollouts:
        return PackedRollouts(
            folders, num_sequences=num_sequences, seq_length=seq_length, padded_length=lambda n: 2 * (n - 1), seed=1
        )

    rows = [names(packed()[item]) for item in range(num_sequences)]
    dataset = packed()
    assert [names(dataset[item]) for item in range(start, num_sequences)] == rows[start:]
    alone = RolloutDataset(folders, num_samples=2**20, seed=1)
    order = names_of(alone, range(sum(map(len, rows))))
    assert [name for row in rows for name in row] == order
    # Sample i has i + 2 tokens, of which the last is not fed.
    rooms, done = [sum(2 * (name + 1) for name in row) for row in rows], 0
    for row, room in zip(rows, rooms, strict=True):
        done += len(row)
        assert row and room <= seq_length
        following = names(alone[done])[0]
        assert done % NUM_SAMPLES == 0 or room + 2 * (following + 1) > seq_length


def test_a_sample_longer_than_a_row_is_refused(folders: list[SampleFolder]) -> None:
    with pytest.raises(LayoutError, match=r"padded length \(8\) of a sample > sequence length \(7\)"):
        PackedRollouts(folders, num_sequences=1, seq_length=7, padded_length=lambda n: n, seed=1)


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
    want = names_of(dataset, range(done * step, (done + rows) * step))
    assert [name for batch in found for name in batch] == want
    assert all(len(batch) == size for batch in found)


def test_coded_samples_come_back_with_sorted_ids(tmp_path: Path) -> None:
    samples = [sample_of(np.random.default_rng(seed), 20 + 30 * seed) for seed in range(3)]
    save_samples(tmp_path / "coded", samples, coded=True)
    save_samples(tmp_path / "plain", samples)
    for one, other in zip(SampleFolder(tmp_path / "coded"), samples, strict=True):
        assert np.array_equal(one.trace.topk_ids, np.sort(other.trace.topk_ids, axis=2))
        for name in ("token_ids", "version_ids", "layer_ids"):
            assert np.array_equal(getattr(one.trace, name), getattr(other.trace, name))
        assert one.trace.weight_versions == other.trace.weight_versions
        assert np.array_equal(one.logprobs, other.logprobs) and one.num_prompt_tokens == other.num_prompt_tokens
    sizes = [(tmp_path / form / "000002.trace.safetensors").stat().st_size for form in ("coded", "plain")]
    assert sizes[0] < 0.7 * sizes[1]


def test_damage_to_a_coded_sample_is_refused(tmp_path: Path) -> None:
    save_samples(tmp_path, [sample_of(np.random.default_rng(0), 30)], coded=True)
    path = tmp_path / "000000.trace.safetensors"
    data = bytearray(path.read_bytes())
    data[-40] ^= 1
    path.write_bytes(data)
    with pytest.raises(TraceError, match=r"000000\.trace"):
        load_samples(tmp_path)


def sample_of(rng: np.random.Generator, num_tokens: int) -> Sample:
    """Return a sample of 48 layers, top 8 of 128, whose last token has no route."""
    ids = rng.random((num_tokens, 48, 128)).argsort(axis=2)[:, :, :8].astype(np.uint8)
    version_ids = rng.integers(0, 2, num_tokens).astype(np.int32)
    ids[-1], version_ids[-1] = 0, -1
    tokens = rng.integers(0, 1000, num_tokens).astype(np.int32)
    trace = RoutingTrace(ids, tokens, version_ids, np.arange(48, dtype=np.int32), 128, ("1", "2"))
    return Sample(trace, 7, -rng.random(num_tokens - 7).astype(np.float32))


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
