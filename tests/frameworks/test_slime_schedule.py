"""slime's plan of micro-batches with samples put together by their loads: nobody is lost, and loads are evener."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from r3_adapter.balance.schedule import fullest_load, schedule
from r3_adapter.balance.simulate import World, simulate
from r3_adapter.errors import LayoutError, ReplayError
from r3_adapter.frameworks.slime import schedule as packed
from r3_adapter.frameworks.slime.rollout import ROUTES

SPEC = importlib.util.spec_from_file_location("test_slime_rollout", Path(__file__).with_name("test_slime_rollout.py"))
assert SPEC is not None and SPEC.loader is not None
rollout_tests = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(rollout_tests)
arguments, samples = rollout_tests.arguments, rollout_tests.samples


CONFIG = {"dp_size": 4, "cp_size": 1, "vpp_size": 1, "microbatch_group_size_per_vp_stage": None}


def in_turns(tokens: list[int], dp_size: int, num_steps: int, size: int) -> packed.Planned:
    """A plan of slime's form: steps of consecutive samples, fixed micro-batches, ranks in turns."""
    partitions: list[list[int]] = [[] for _ in range(dp_size)]
    places: list[list[list[int]]] = [[] for _ in range(dp_size)]
    per_step = len(tokens) // num_steps
    for start in range(0, len(tokens), size):
        rank = start // size % dp_size
        own = len(partitions[rank])
        partitions[rank].extend(range(start, start + size))
        places[rank].append(list(range(own, own + size)))
    return partitions, places, [per_step // size // dp_size] * num_steps, [per_step] * num_steps


def test_each_step_keeps_its_samples_and_its_loads_become_evener() -> None:
    world = World("strong", num_experts=16, topk=4, num_layers=3, num_prompts=16, samples_per_prompt=8, mean_tokens=300)
    [(tokens, counts)] = simulate(world, 1, 3)
    theirs = in_turns(tokens.tolist(), 4, 2, 4)
    args = arguments(
        tensor_model_parallel_size=1,
        expert_model_parallel_size=4,
        expert_tensor_parallel_size=1,
        max_tokens_per_gpu=1500,
    )
    partitions, places, numbers, rollouts = packed.replanned(theirs, tokens.tolist(), counts, args, CONFIG)
    assert rollouts == theirs[3]
    assert {len(rank) for rank in places} == {sum(numbers)}
    first = 0
    for step, number in enumerate(numbers):
        found = [
            [[rank[at] for at in batch] for batch in own[first : first + number]]
            for rank, own in zip(partitions, places, strict=True)
        ]
        assert sorted(sample for rank in found for batch in rank for sample in batch) == list(
            range(64 * step, 64 * step + 64)
        )
        assert all(tokens[batch].sum() <= 1500 or len(batch) == 1 for rank in found for batch in rank)
        before = [[rank[at : at + 4] for at in range(step * 16, step * 16 + 16, 4)] for rank in theirs[0]]
        fullest = [fullest_load(each, counts, num_ranks=4, num_parts=4)[0] for each in (found, before)]
        assert fullest[0] < fullest[1]
        first += number
    assert [sorted(at for batch in rank for at in batch) for rank in places] == [
        list(range(len(own))) for own in partitions
    ]


def test_two_groups_and_interleaved_stages_get_as_many_micro_batches() -> None:
    [(tokens, counts)] = simulate(World(num_experts=16, topk=4, num_layers=2, num_prompts=8, mean_tokens=300), 1, 0)
    found = schedule(tokens, counts, num_ranks=2, dp_size=4, num_parts=2, max_tokens=2000, multiple=3)
    assert len({len(rank) for rank in found}) == 1
    assert len(found[0]) % 3 == 0
    assert sorted(sample for rank in found for batch in rank for sample in batch) == list(range(len(tokens)))
    with pytest.raises(LayoutError, match=r"num_parts \(3\) does not divide dp_size \(4\)"):
        schedule(tokens, counts, num_ranks=2, dp_size=4, num_parts=3, max_tokens=2000)


@pytest.fixture
def framework(slimelike: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    def build_dp_schedule(args: Any, train_parallel_config: Any, total_lengths: Any, **_: Any) -> packed.Planned:
        return in_turns(total_lengths, train_parallel_config["dp_size"], 1, 1)

    monkeypatch.setattr(slimelike, "build_dp_schedule", build_dp_schedule, raising=False)
    monkeypatch.setitem(sys.modules, "slime.ray.rollout", slimelike)
    return slimelike


def test_the_plan_is_made_of_the_samples_that_were_converted_last(framework: ModuleType) -> None:
    args = arguments(
        use_dynamic_batch_size=True,
        tensor_model_parallel_size=1,
        expert_model_parallel_size=2,
        expert_tensor_parallel_size=1,
        max_tokens_per_gpu=100,
    )
    config = {**CONFIG, "dp_size": 2}
    for _ in range(2):
        made = [*samples(framework), *samples(framework)]
        data = packed.convert_packed(args, made)
        assert len(data[ROUTES]) == 4
        planned = framework.build_dp_schedule(args, config, [len(each) for each in data["tokens"]])
        assert sorted(planned[0][0] + planned[0][1]) == [0, 1, 2, 3]
    with pytest.raises(ReplayError, match="3 samples that are not those which were converted last"):
        framework.build_dp_schedule(args, config, [4, 5, 4])
    with pytest.raises(ReplayError, match="--use-dynamic-batch-size is off"):
        packed.convert_packed(arguments(), made)


def test_an_unknown_version_is_refused(slimelike: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "slime.ray.rollout", slimelike)
    with pytest.raises(ReplayError, match="build_dp_schedule: there is no such function"):
        packed.convert_packed(arguments(use_dynamic_batch_size=True), samples(slimelike))
