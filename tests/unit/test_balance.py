"""Placement and composition: nothing is lost, limits hold, and the loads become as even as is promised."""

import json
import re
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from r3_adapter.balance.compare import compare
from r3_adapter.balance.composition import compose, compose_parts, in_order
from r3_adapter.balance.loads import count_trace, count_traces, evenness, identity, rank_loads, summed
from r3_adapter.balance.placement import place
from r3_adapter.balance.simulate import World, simulate
from r3_adapter.balance.steps import steps_of
from r3_adapter.balance.table import Table
from r3_adapter.cli import main
from r3_adapter.errors import LayoutError
from r3_adapter.rollout import Sample, SampleFolder, save_samples
from r3_adapter.trace import RoutingTrace


def fullest(counts, placed, num_ranks):
    return int(rank_loads(counts, placed, num_ranks).max(axis=2).sum())


@given(
    seed=st.integers(0, 2**32),
    steps=st.integers(1, 9),
    sizes=st.sampled_from([(1, 1, 1), (8, 1, 1), (8, 8, 1), (12, 3, 4), (12, 4, 2), (20, 5, 2), (32, 4, 8)]),
)
@settings(max_examples=40, deadline=None)
def test_every_expert_has_a_slot_groups_stay_together_and_loads_get_no_worse(seed, steps, sizes):
    experts, ranks, groups = sizes
    loads = np.random.default_rng(seed).integers(0, 1000, (steps, 3, experts)).astype(np.int32)
    placed = place(loads, ranks, num_groups=groups, seed=seed, num_swaps=100)
    assert np.array_equal(np.sort(placed, axis=1), identity(3, experts))
    blocks = placed.reshape(3, groups, -1) // (experts // groups)
    assert (blocks == blocks[:, :, :1]).all()
    assert fullest(loads, placed, ranks) <= fullest(loads, identity(3, experts), ranks)
    assert np.array_equal(placed, place(loads, ranks, num_groups=groups, seed=seed, num_swaps=100, num_threads=1))


@given(seed=st.integers(0, 2**32), steps=st.integers(1, 4))
@settings(max_examples=20, deadline=None)
def test_four_experts_on_two_ranks_are_placed_as_well_as_can_be(seed, steps):
    loads = np.random.default_rng(seed).integers(0, 100, (steps, 1, 4)).astype(np.int32)
    placed = place(loads, 2, num_swaps=200)
    pairs = [[*pair, *sorted({0, 1, 2, 3} - set(pair))] for pair in combinations(range(4), 2)]
    assert fullest(loads, placed, 2) == min(fullest(loads, np.array([pair], np.int32), 2) for pair in pairs)


@given(seed=st.integers(0, 2**32), samples=st.integers(1, 40), max_tokens=st.sampled_from([1, 30, 200, 10**6]))
@settings(max_examples=40, deadline=None)
def test_every_sample_is_in_one_micro_step_and_none_is_too_long(seed, samples, max_tokens):
    rng = np.random.default_rng(seed)
    tokens, counts = rng.integers(1, 100, samples), rng.integers(0, 50, (samples, 2, 8)).astype(np.int32)
    found = compose(tokens, counts, identity(2, 8), 4, max_tokens, seed=seed, num_moves=3000)
    assert sorted(np.concatenate(found)) == list(range(samples))
    assert all(tokens[step].sum() <= max_tokens or len(step) == 1 for step in found)
    again = compose(tokens, counts, identity(2, 8), 4, max_tokens, seed=seed, num_moves=3000)
    assert all(np.array_equal(one, other) for one, other in zip(found, again, strict=True))
    filled = in_order(rng.permutation(samples), tokens, max_tokens)
    assert sorted(np.concatenate(filled)) == list(range(samples))
    assert all(tokens[step].sum() <= max_tokens or len(step) == 1 for step in filled)


@given(
    seed=st.integers(0, 2**32),
    sizes=st.sampled_from([(1, 1, 1), (9, 2, 1), (40, 2, 2), (40, 3, 4), (64, 1, 4)]),
    max_tokens=st.sampled_from([60, 200, 10**6]),
    attention=st.sampled_from([0.0, 0.2, 5.0]),
)
@example(seed=243, sizes=(9, 2, 1), max_tokens=60, attention=0.0)
@settings(max_examples=40, deadline=None)
def test_each_group_has_as_many_micro_steps_and_no_part_is_empty(seed, sizes, max_tokens, attention):
    samples, parts, groups = sizes
    rng = np.random.default_rng(seed)
    tokens, counts = rng.integers(1, 60, samples), rng.integers(0, 50, (samples, 2, 8)).astype(np.int32)
    options = {"num_parts": parts, "num_groups": groups, "attention": attention, "num_moves": 2000, "seed": seed}

    def composed(threads):
        return compose_parts(tokens, counts, identity(2, 8), 4, max_tokens, num_threads=threads, **options)

    if np.sort(tokens)[:2].sum() > max_tokens and samples % (parts * groups):
        # No two of them fit into a part, so that each has one, and a part is left over.
        with pytest.raises(LayoutError, match=f"{samples} samples cannot fill"):
            composed(1)
        return
    found = [composed(threads) for threads in (1, 3)]
    assert np.array_equal(found[0].step_of, found[1].step_of)
    assert np.array_equal(found[0].part_of, found[1].part_of)
    ranks = found[0].micro_batches()
    assert len(ranks) == parts * groups
    assert len({len(micro_batches) for micro_batches in ranks}) == 1
    assert sorted(np.concatenate([each for rank in ranks for each in rank])) == list(range(samples))
    assert all(0 < tokens[each].sum() <= max_tokens or len(each) == 1 for rank in ranks for each in rank)


def test_attention_is_evened_out_over_parts():
    rng = np.random.default_rng(1)
    tokens = np.clip(rng.lognormal(6, 0.8, 128), 16, 4096).astype(np.int64)
    counts = rng.poisson(1, (128, 2, 8)).astype(np.int32) * tokens[:, None, None].astype(np.int32)

    def fullest_squares(attention):
        found = compose_parts(tokens, counts, identity(2, 8), 4, 4096, num_parts=4, attention=attention)
        return sum(max((tokens[part] ** 2).sum() for part in step) for step in zip(*found.micro_batches(), strict=True))

    even = (tokens**2).sum() / 4
    assert fullest_squares(0.2) < 1.3 * even < fullest_squares(0)


@pytest.mark.parametrize("skew", ["mild", "medium", "strong"])
@given(seed=st.integers(0, 2**32), max_tokens=st.sampled_from([500, 1500, 6000]), placing=st.booleans())
@settings(max_examples=15, deadline=None)
def test_packed_is_not_worse_than_shuffled(skew, seed, max_tokens, placing):
    world = World(skew, num_experts=16, topk=4, num_layers=3, num_prompts=8, samples_per_prompt=8, mean_tokens=300)
    [(tokens, counts)] = simulate(world, 1, seed)
    shuffled = in_order(np.random.default_rng(seed).permutation(len(tokens)), tokens, max_tokens)
    placed = place(summed(shuffled, counts), 4) if placing else identity(3, 16)
    packed = compose(tokens, counts, placed, 4, max_tokens)
    # Attention is evened out too, which may take a thousandth of the experts' loads where lengths leave little choice.
    assert fullest(summed(packed, counts), placed, 4) <= 1.005 * fullest(summed(shuffled, counts), placed, 4)


@pytest.mark.parametrize(("skew", "ratio", "worst"), [("medium", 1.16, 1.5), ("strong", 1.30, 1.95)])
def test_simulated_loads_become_as_even_as_promised(skew, ratio, worst):
    ways = compare(simulate(World(skew=skew), 2, seed=1), 16, 32768).ways
    found = {name: way.figures for name, way in ways.items()}
    assert found["arrival"].ratio > 1.5
    assert found["placed_last"].ratio <= ratio
    assert found["placed_last"].worst <= worst
    assert found["placed"].ratio <= found["placed_last"].ratio < found["packed"].ratio < found["shuffled"].ratio


def a_trace(rng, num_tokens=20, num_layers=3, num_experts=16, topk=4):
    ids = rng.permuted(np.tile(np.arange(num_experts, dtype=np.uint8), (num_tokens, num_layers, 1)), axis=2)[..., :topk]
    versions = np.zeros(num_tokens, np.int32)
    ids[-1], versions[-1] = 0, -1
    tokens = np.arange(num_tokens, dtype=np.int32)
    return RoutingTrace(
        np.ascontiguousarray(ids), tokens, versions, np.arange(num_layers, dtype=np.int32), num_experts, ("0",)
    )


def test_counts_are_those_of_the_routes(tmp_path):
    rng = np.random.default_rng(0)
    trace = a_trace(rng)
    wanted = [np.bincount(trace.topk_ids[:-1, layer].ravel(), minlength=16) for layer in range(3)]
    assert np.array_equal(count_trace(trace), wanted)
    with pytest.raises(LayoutError, match=r"sample 1: 2 layers of 16 experts are not those of sample 0, 3 of 16"):
        count_traces([trace, a_trace(rng, num_layers=2)])
    with pytest.raises(LayoutError, match="no traces"):
        count_traces([])


def test_even_loads_have_the_ratio_of_one():
    loads = np.full((3, 2, 4), 7, np.int32)
    assert evenness(loads).ratio == evenness(loads).worst == 1
    assert evenness(np.zeros_like(loads)).ratio == 1
    counts = np.arange(16, dtype=np.int32).reshape(2, 1, 8)
    assert np.array_equal(summed([[0, 1]], counts), counts.sum(axis=0, keepdims=True))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_ranks": 3}, r"num_ranks \(3\) does not divide the 8 experts"),
        ({"num_groups": 5}, r"num_groups \(5\) does not divide the 8 experts"),
        ({"num_ranks": 0}, r"num_ranks \(0\) outside 1"),
        ({"loads": np.full((1, 1, 8), -1, np.int32)}, r"a load \(-1\)"),
        ({"loads": np.zeros((1, 1, 8), np.int64)}, r"dtype int64 != int32"),
        ({"num_threads": 0}, r"num_threads \(0\) outside 1"),
    ],
)
def test_what_cannot_be_placed_is_refused_by_name(change, says):
    given = {"loads": np.ones((1, 1, 8), np.int32), "num_ranks": 2, **change}
    with pytest.raises(LayoutError, match=says):
        place(given.pop("loads"), given.pop("num_ranks"), **given)


def test_what_cannot_be_composed_is_refused_by_name():
    tokens, counts = np.array([4, 5]), np.ones((2, 1, 8), np.int32)
    with pytest.raises(LayoutError, match=r"3 lengths of samples != 2"):
        compose(np.array([1, 2, 3]), counts, identity(1, 8), 2, 10)
    with pytest.raises(LayoutError, match=r"max_tokens \(0\) < 1"):
        compose(tokens, counts, identity(1, 8), 2, 0)
    with pytest.raises(LayoutError, match=r"tokens: a load \(-4\)"):
        compose(-tokens, counts, identity(1, 8), 2, 10)
    with pytest.raises(LayoutError, match=r"counts: a load \(-4\)"):
        compose(tokens, -counts, identity(1, 8), 2, 10)
    with pytest.raises(LayoutError, match=r"expert_at: expert 8 outside 0 to 8 - 1"):
        compose(tokens, counts, identity(1, 8) + 1, 2, 10)
    with pytest.raises(LayoutError, match=r"attention \(-1\) outside 0"):
        compose(tokens, counts, identity(1, 8), 2, 10, attention=-1)
    with pytest.raises(LayoutError, match=r"2 samples cannot fill 3 micro-steps of 1 parts"):
        compose_parts(tokens, counts, identity(1, 8), 2, 10, num_groups=3)


def test_recorded_rollouts_are_taken_step_by_step(tmp_path, capsys):
    rng = np.random.default_rng(3)
    for name in ("000000-00000", "000000-00001", "000001-00000"):
        samples = [Sample(trace := a_trace(rng), 5, np.zeros(15, np.float32)) for _ in range(4)]
        save_samples(tmp_path / name, samples)
    steps = steps_of([SampleFolder(path) for path in sorted(tmp_path.iterdir())])
    assert [len(tokens) for tokens, _ in steps] == [8, 4]
    assert steps[0][1].sum() == 8 * 19 * 3 * trace.topk
    out = tmp_path.parent / "balance.json"
    assert main(["balance", str(tmp_path), "--ep", "4", "--max-tokens", "40", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert set(found) > {"arrival", "shuffled", "packed", "placed_last", "placed", "eplb", "oracle", "seconds"}
    assert "experts placed by the step before" in capsys.readouterr().out
    placement = tmp_path.parent / "placement"
    given = ["balance", str(tmp_path), "--ep", "4", "--max-tokens", "40"]
    assert main([*given, "--placement", str(placement), "--max-received", "60"]) == 0
    assert "No rank receives more than" in capsys.readouterr().out
    table = Table.load(placement)
    assert table.layer_ids.tolist() == [0, 1, 2]
    assert table.expert_at.shape == (3, 16)
    assert main([*given, "--max-received", "3"]) == 2
    assert re.search(r"rank \d of the expert group receives \d+ tokens > 3 in MoE layer \d", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--ep", "4"], "give folders of traces, or --simulate, and not both"),
        (["--ep", "4", "--simulate", "huge"], "skew 'huge'"),
        (["--ep", "5", "--simulate", "mild"], "--ep (5) does not divide the 128 experts"),
        (["--ep", "4", "/nowhere"], "/nowhere"),
    ],
)
def test_the_command_refuses_what_it_cannot_do(arguments, says, capsys):
    assert main(["balance", *arguments]) == 2
    assert says in capsys.readouterr().err
    assert not Path("/nowhere").exists()
