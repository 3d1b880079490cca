"""What slime 0.3.1 and miles 0.1.0 do with samples, in our own words: conversion, packing, cut, and passes.

b: samples of a micro-batch; t: tokens of it, padding included.

The tests hold replay against these layouts; they were compared with both frameworks' own code.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, TypeVar

import torch

Cell = TypeVar("Cell")

SHARED_OUT = ("tokens", "response_lengths", "rewards", "loss_masks", "rollout_log_probs", "rollout_routed_experts")
"""Of what a conversion returns, the keys that are shared out to data-parallel ranks; others are lost on the way."""


@dataclass
class Sample:
    tokens: list[int]
    response_length: int
    index: int = 0
    reward: float = 0.0
    rollout_log_probs: list[float] | None = None
    rollout_routed_experts: Any = None
    weight_versions: list[str] = field(default_factory=list)


class RolloutManager:
    def __init__(self) -> None:
        raise AssertionError("it starts engines")

    def _convert_samples_to_train_data(self, samples: Sequence[Sample]) -> dict[str, Any]:
        assert self.custom_convert_samples_to_train_data_func is None
        assert all(sample.rollout_routed_experts is None for sample in samples)
        data = {
            "tokens": [sample.tokens for sample in samples],
            "response_lengths": [sample.response_length for sample in samples],
            "rewards": [sample.reward * self.args.reward_scale for sample in samples],
            "loss_masks": [[1] * sample.response_length for sample in samples],
        }
        if samples[0].rollout_log_probs is not None:
            data["rollout_log_probs"] = [sample.rollout_log_probs for sample in samples]
        return data


def share_out(data: Mapping[str, Any], places: Sequence[int], micro_batches: list[list[int]]) -> dict[str, Any]:
    """Return what one data-parallel rank gets: tensors on the host of its samples, and its micro-batches."""
    lengths = [len(tokens) for tokens in data["tokens"]]
    own = {key: [torch.as_tensor(data[key][at]) for at in places] for key in SHARED_OUT if key in data}
    own["response_lengths"] = [int(length) for length in own["response_lengths"]]
    return {**own, "total_lengths": [lengths[at] for at in places], "micro_batch_indices": micro_batches}


def zigzag(row: Sequence[Cell], cp: int, cp_rank: int, fill: Cell) -> list[Cell]:
    """Return a context-parallel rank's two chunks of a sample, which is padded to 2 * cp of them."""
    if cp == 1:
        return list(row)
    chunk = -(-len(row) // (2 * cp))
    padded = [*row, *[fill] * (2 * cp * chunk - len(row))]
    first, second = cp_rank * chunk, (2 * cp - 1 - cp_rank) * chunk
    return padded[first : first + chunk] + padded[second : second + chunk]


def pack(
    rows: Sequence[Sequence[Cell]], *, tp: int, cp: int, cp_rank: int, multiple: int, whole_stream: bool, fill: Cell
) -> tuple[list[Cell], list[int]]:
    """Return a rank's share of a micro-batch, and where its sequences begin and end before the cut.

    multiple: of it times tp are a rank's tokens. Padding behind the samples is one more sequence, if there is any.
    whole_stream: each rank has an interval of the stream (`--allgather-cp`), and not two chunks of each sample.
    """
    if whole_stream:
        stream = [cell for row in rows for cell in row]
        ends, room = list(accumulate(map(len, rows))), multiple * tp * cp
    else:
        parts = [zigzag(row, cp, cp_rank, fill) for row in rows]
        stream = [cell for part in parts for cell in part]
        ends, room = [cp * end for end in accumulate(map(len, parts))], multiple * tp
    padding = -len(stream) % room
    stream += [fill] * padding
    if padding:
        ends.append(ends[-1] + padding * (1 if whole_stream else cp))
    if whole_stream:
        share = len(stream) // cp
        stream = stream[cp_rank * share : (cp_rank + 1) * share]
    return stream, [0, *ends]


class DataIterator:
    def __init__(self, rollout_data: dict[str, Any], micro_batch_indices: list[list[int]]) -> None:
        self.rollout_data, self.micro_batch_indices, self.offset = rollout_data, micro_batch_indices, 0

    def get_next(self, keys: Sequence[str]) -> dict[str, Any]:
        chosen = self.micro_batch_indices[self.offset]
        self.offset += 1
        return {
            key: [self.rollout_data[key][at] for at in chosen] if key in self.rollout_data else None for key in keys
        }

    def reset(self) -> "DataIterator":
        self.offset = 0
        return self


def get_batch(
    data_iterator: DataIterator, keys: Sequence[str], pad_multiplier: int = 128, allgather_cp: bool = False
) -> dict[str, Any]:
    """Return a micro-batch as a rank's model is given it; only packed ones, and samples whose mask is all ones."""
    from megatron.core import parallel_state as ps
    from megatron.core.packed_seq_params import PackedSeqParams

    batch = data_iterator.get_next(keys)
    tokens, bounds = pack(
        [row.tolist() for row in batch["tokens"]],
        tp=ps.get_tensor_model_parallel_world_size(),
        cp=ps.get_context_parallel_world_size(),
        cp_rank=ps.get_context_parallel_rank(),
        multiple=pad_multiplier,
        whole_stream=allgather_cp,
        fill=0,
    )
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    longest = int(cu_seqlens.diff().max())
    params = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
    return {**batch, "unconcat_tokens": batch["tokens"], "tokens": torch.tensor([tokens]), "packed_seq_params": params}


def get_log_probs_and_entropy(
    logits: torch.Tensor, *, unconcat_tokens: Sequence[torch.Tensor], response_lengths: Sequence[int], **_: Any
) -> dict[str, list[torch.Tensor]]:
    """Return each sample's log-probabilities; logits: [1, t, vocabulary], without context parallelism."""
    found, start = [], 0
    for tokens, length in zip(unconcat_tokens, response_lengths, strict=True):
        stop = start + len(tokens)
        rows = logits[0, stop - 1 - length : stop - 1].float().log_softmax(-1)
        found.append(rows.gather(1, tokens[-length:, None])[:, 0])
        start = stop
    return {"log_probs": found}


def slice_log_prob_with_cp(values: Cell, total_length: int, response_length: int) -> Cell:
    """Return a context-parallel rank's part of a sample's values: without context parallelism all of them."""
    return values


def run_model(args: Any, model: Any, iterator: DataIterator) -> tuple[torch.Tensor, dict[str, Any]]:
    """Run the next micro-batch, as the loops of both frameworks call the model."""
    keys = ["tokens", "loss_masks", "total_lengths", "response_lengths", "rollout_log_probs"]
    batch = get_batch(iterator, keys, args.data_pad_size_multiplier, args.allgather_cp)
    logits = model(
        input_ids=batch["tokens"],
        position_ids=None,
        attention_mask=None,
        labels=None,
        packed_seq_params=batch["packed_seq_params"],
    )
    return logits, batch


@torch.no_grad()
def forward_only(
    f: Any, args: Any, model: Any, data_iterator: Any, num_microbatches: Sequence[int], store_prefix: str = ""
) -> dict[str, list[torch.Tensor]]:
    iterator, found = data_iterator[0].reset(), list[torch.Tensor]()
    for _ in range(sum(num_microbatches)):
        logits, batch = run_model(args, model[0], iterator)
        found += f(logits, **batch)["log_probs"]
    places = [at for indices in iterator.micro_batch_indices for at in indices]
    return {f"{store_prefix}log_probs": [found[places.index(at)] for at in range(len(places))]}


def train_one_step(
    args: Any,
    rollout_id: int,
    step_id: int,
    data_iterator: Any,
    model: Any,
    optimizer: Any,
    opt_param_scheduler: Any,
    num_microbatches: int,
    step_global_batch_size: int,
) -> tuple[dict[str, Any], float]:
    """Run the micro-batches of a step; the weights stay as they are."""
    model[0].zero_grad_buffer()
    total = torch.zeros(())
    for _ in range(num_microbatches):
        logits, batch = run_model(args, model[0], data_iterator[0])
        loss = -torch.cat(get_log_probs_and_entropy(logits, **batch)["log_probs"]).sum()
        loss.backward()
        total += loss.detach()
    return {"loss": total}, 0.0
