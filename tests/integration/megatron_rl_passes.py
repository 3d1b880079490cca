"""The passes of Megatron-LM's RL loop, in our own words, with replay around them; print what the routers did, as JSON.

b: rows of a micro-batch; S: tokens of a row; E: experts.

Source: NVIDIA/Megatron-LM@d98e8a64: megatron/rl/rl_utils.py:prepare_data_for_update, compute_logprobs_batch
"""

import itertools
import json
from types import ModuleType, SimpleNamespace
from typing import Any

import megatron_tiny as tiny
import numpy as np
import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

from r3_adapter.errors import R3Error
from r3_adapter.frameworks import megatron_rl
from r3_adapter.frameworks.megatron_rl import Passes, Recorded

ROWS, LENGTHS = 4, (13, 16, 9)
ARGS = SimpleNamespace(
    moe_enable_routing_replay=True,
    rl_use_sequence_packing=False,
    cuda_graph_impl="none",
    virtual_pipeline_model_parallel_size=None,
)
tiny.start()
model = tiny.build(moe_enable_routing_replay=True)
rl = ModuleType("rl")
used: list[torch.Tensor] = []
"""What each MoE layer's router selects, one after the other: [S * b, E] bool."""


def rollouts() -> tuple[list[Any], dict[str, Any]]:
    """Return rollouts of one turn, and the ledger of their requests; the last row of the step is padding."""
    rng, found, ledger = np.random.default_rng(3), [], {}
    for number, length in enumerate(LENGTHS):
        tokens = rng.integers(0, tiny.VOCAB, length)
        scores = rng.random((length - 1, tiny.MOE_LAYERS, tiny.EXPERTS))
        routes = scores.argsort(axis=-1)[..., : tiny.TOPK].astype(np.int16)
        record = SimpleNamespace(policy_epoch=[(0, 0)])
        setattr(record, megatron_rl._RECORDED, Recorded(tokens.astype(np.int32), routes))
        ledger[f"request-{number}"] = record
        found.append(SimpleNamespace(trajectory=[tokens.tolist()], completion_ids=[f"request-{number}"], env_id="e"))
    return found, ledger


def prepare_data_for_update(**call: Any) -> tuple[Any, str]:
    for each in call["rollouts"]:
        for name in each.completion_ids:
            call["request_ledger"].pop(name)
    rows = [*call["rollouts"], *[None] * (ROWS - len(call["rollouts"]))]
    tokens = rl.prepare_trajectories(rows, "tokenizer", tiny.SEQ)
    loader = [(tokens[at : at + tiny.BATCH], "advantages") for at in range(0, ROWS, tiny.BATCH)]
    for _ in ("policy", "reference"):
        rl.compute_logprobs_batch(model=call["model"][0], data_loader=loader)
    return SimpleNamespace(iterable=itertools.cycle(loader)), "statistics"


def prepare_trajectories(rows: list[Any], tokenizer: str, seq_length: int) -> torch.Tensor:
    tokens = torch.zeros(len(rows), seq_length, dtype=torch.int64)
    for row, rollout in enumerate(rows):
        if rollout is not None:
            tokens[row, : len(rollout.trajectory[-1])] = torch.tensor(rollout.trajectory[-1])
    return tokens


def forward_step(iterator: Any, chunk: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    tokens, _ = next(iterator)
    positions = torch.arange(tiny.SEQ).expand(len(tokens), -1)
    losses = chunk(tokens, positions, None, labels=tokens.roll(-1, 1))
    return losses, lambda output: (output.sum(), {"loss": output.detach().sum()})


def run(schedule: Any, iterator: Any, number: int, forward_only: bool) -> None:
    schedule(
        forward_step_func=forward_step,
        data_iterator=iterator,
        model=model,
        num_microbatches=number,
        seq_length=tiny.SEQ,
        micro_batch_size=tiny.BATCH,
        forward_only=forward_only,
    )


def compute_logprobs_batch(**call: Any) -> None:
    iterator = iter(call["data_loader"])
    for _ in call["data_loader"]:
        run(get_forward_backward_func(), iterator, 1, True)


def replayed(routes: list[np.ndarray[Any, Any]]) -> list[int]:
    """Return, of a pass over all rows, how many experts of routes routers selected, and how many there are."""
    equal = total = 0
    for index, routing_map in enumerate(used):
        micro_batch, layer = divmod(index, tiny.MOE_LAYERS)
        maps = routing_map.reshape(tiny.SEQ, tiny.BATCH, tiny.EXPERTS)
        for at, route in enumerate(routes[micro_batch * tiny.BATCH : (micro_batch + 1) * tiny.BATCH]):
            want = torch.from_numpy(route[:, layer].astype(np.int64))
            equal += int(maps[: len(want), at].gather(1, want).sum())
            total += want.numel()
    used.clear()
    return [equal, total]


def main() -> None:
    said: dict[str, Any] = {}
    passes = Passes(lambda: ARGS)  # type: ignore[arg-type,return-value]
    for function, around in (
        (prepare_data_for_update, passes.prepare),
        (prepare_trajectories, passes.trajectories),
        (compute_logprobs_batch, passes.log_probs),
    ):
        setattr(rl, function.__name__, function)
        megatron_rl._around(rl, function.__name__, around)
    for router in tiny.routers(model):
        router.register_forward_hook(lambda _, __, output: used.append(output[1].bool()))
    RouterReplay.set_global_router_replay_action(RouterReplayAction.RECORD)

    episodes, ledger = rollouts()
    routes = [getattr(each, megatron_rl._RECORDED).routes for each in ledger.values()]
    data, statistics = rl.prepare_data_for_update(model=[model], rollouts=episodes, request_ledger=ledger)
    half = len(used) // 2
    reference, used[half:] = used[half:], []
    said["policy"] = replayed(routes)
    used[:] = reference
    said["reference"] = replayed(routes)
    said["passed on"] = [statistics, len(ledger)]

    for name in ("training", "training again"):
        run(lambda **call: passes.schedule(get_forward_backward_func(), **call), data.iterable, 2, False)
        said[name] = replayed(routes)
    said["gradient"] = all(bool(router.weight.grad.abs().sum()) for router in tiny.routers(model))
    run(get_forward_backward_func(), data.iterable, 2, True)
    said["outside"] = replayed(routes)
    said["actions"] = sorted({str(each.router_replay_action) for each in RouterReplay.global_router_replay_instances})

    swapped = list(itertools.islice(data.iterable, 2))
    for each in swapped:
        each.first = tiny.BATCH - each.first
    try:
        run(lambda **call: passes.schedule(get_forward_backward_func(), **call), iter(swapped), 2, False)
    except R3Error as error:
        said["swapped"] = str(error)
    print(json.dumps(said))


if __name__ == "__main__":
    main()
