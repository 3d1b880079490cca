"""What `r3 balance` compares with: EPLB, a placement for each micro-step, steps before; and the file of a placement."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r3_adapter.balance.compare import compare
from r3_adapter.balance.drift import moved_between
from r3_adapter.balance.eplb import copied_loads, eplb, placed_each
from r3_adapter.balance.loads import evenness, identity, rank_loads
from r3_adapter.balance.simulate import World, simulate
from r3_adapter.balance.table import Table
from r3_adapter.balance.tables import ways_table
from r3_adapter.cli import main
from r3_adapter.errors import LayoutError, R3Error, TraceError
from r3_adapter.trace import ModelId

SMALL = {"num_experts": 16, "topk": 4, "num_layers": 8, "num_prompts": 8, "samples_per_prompt": 8, "mean_tokens": 300}


@given(seed=st.integers(0, 2**32), sizes=st.sampled_from([(8, 4, 8), (8, 4, 12), (16, 4, 20), (6, 3, 12)]))
@settings(max_examples=30, deadline=None)
def test_eplb_gives_each_expert_a_slot_and_loses_no_token(seed, sizes):
    experts, ranks, num_slots = sizes
    loads = np.random.default_rng(seed).integers(0, 1000, (3, 2, experts)).astype(np.int32)
    slots = eplb(loads, ranks, num_slots)
    assert slots.shape == (2, num_slots)
    assert all(set(layer) == set(range(experts)) for layer in slots)
    assert np.allclose(copied_loads(loads, slots, ranks).sum(axis=2), loads.sum(axis=2))
    copies = np.stack([np.bincount(layer, minlength=experts) for layer in slots])
    each = loads.sum(axis=0) / copies
    # No copy more would have been better given to another expert.
    for layer in range(2):
        spare = np.where(copies[layer] > 1, loads.sum(axis=0)[layer] / np.maximum(copies[layer] - 1, 1), np.inf)
        assert each[layer].max() <= spare.min() + 1e-9


def test_a_hot_expert_needs_a_copy():
    loads = np.array([[[90, 10, 10, 10]]], np.int32)
    alone, copied = eplb(loads, 2, 4), eplb(loads, 2, 6)
    assert copied_loads(loads, alone, 2).max() == 100
    assert copied_loads(loads, copied, 2).max() == 70
    with pytest.raises(LayoutError, match=r"num_slots \(5\) is no multiple of 2 ranks from 4 experts on"):
        eplb(loads, 2, 5)


@given(seed=st.integers(0, 2**32))
@settings(max_examples=20, deadline=None)
def test_a_placement_for_each_micro_step_keeps_all_tokens_and_is_no_permutation_of_luck(seed):
    loads = np.random.default_rng(seed).integers(0, 1000, (5, 2, 12)).astype(np.int32)
    found = placed_each(loads, 3)
    assert np.array_equal(found.sum(axis=2), loads.sum(axis=2))
    assert found.max(axis=2).sum() <= rank_loads(loads, identity(2, 12), 3).max(axis=2).sum() * 1.1
    assert evenness(found).ratio >= 1


def test_ways_keep_their_order_on_a_policy_that_drifts():
    steps = simulate(World("strong", **SMALL, drift=0.25), 6, seed=2)
    found = compare(steps, 4, 1500)
    ways = {name: way.figures for name, way in found.ways.items()}
    assert ways["bound"].ratio <= ways["placed"].ratio < ways["placed_last"].ratio < ways["arrival"].ratio
    assert ways["oracle"].ratio < ways["placed"].ratio
    assert ways["eplb_copies"].ratio < ways["eplb"].ratio < ways["shuffled"].ratio
    ago = dict(found.ago)
    assert sorted(ago) == [-1, 0, 1, 2, 3, 4, 5]
    assert ago[0].ratio < ago[5].ratio < ago[-1].ratio
    said = found.to_json()
    assert len(said["layers"]["arrival"]) == 8
    assert len(said["micro_steps"]["placed"]) == said["num_micro_steps"]
    assert len(said["steps"]) == 5


def test_a_table_of_one_micro_step_says_so():
    steps = simulate(World("strong", **SMALL), 1, seed=2)
    assert ways_table(compare(steps, 4, 10**9)).title == "Loads of 4 expert-parallel ranks, 1 micro-step"
    assert str(ways_table(compare(steps, 4, 1500)).title).endswith(" micro-steps")


def test_what_moved_is_the_share_of_tokens_that_went_elsewhere():
    still, moved = np.array([[[3, 1, 0, 0]]], np.int32), np.array([[[3, 0, 1, 0]]], np.int32)
    tokens = np.array([4])
    found = moved_between([(tokens, still), (tokens, still * 2), (tokens, moved)])
    assert [each.mean for each in found] == [0, 0.25]
    steady = moved_between(simulate(World(**SMALL), 4, 0))
    drifting = moved_between(simulate(World(**SMALL, drift=0.5), 4, 0))
    assert max(each.mean for each in steady) < min(each.mean for each in drifting)
    with pytest.raises(R3Error, match=r"drift \(2\) outside 0 to 1"):
        World(drift=2)


def test_a_placement_comes_back_from_its_file(tmp_path):
    rng = np.random.default_rng(0)
    expert_at = rng.permuted(identity(3, 8), axis=1)
    table = Table(expert_at, np.array([1, 2, 5], np.int32), ModelId(6, 64, 100))
    table.save(path := tmp_path / "placement")
    found = Table.load(path)
    assert np.array_equal(found.expert_at, expert_at)
    assert found.layer_ids.tolist() == [1, 2, 5]
    assert found.model == table.model
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(TraceError, match="checksum"):
        Table.load(path)
    with pytest.raises(TraceError, match="cannot be read"):
        Table.load(tmp_path / "none")
    expert_at[1, 0] = expert_at[1, 1]
    with pytest.raises(LayoutError, match="expert_at of layer 2 is no permutation of 8 experts"):
        Table(expert_at, table.layer_ids)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--simulate", "mild", "--drift", "7"], "drift (7.0) outside 0 to 1"),
        (["/nowhere", "--drift", "0.1"], "--drift needs --simulate"),
        (["/nowhere", "--steps", "3"], "--steps needs --simulate"),
    ],
)
def test_flags_of_a_simulation_are_refused_elsewhere(arguments, says, capsys):
    assert main(["balance", "--ep", "4", *arguments]) == 2
    assert says in capsys.readouterr().err
