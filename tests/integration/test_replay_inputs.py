"""Wrong uses of replay, on a real model: each is refused with the place and both operands, and nothing else happens."""

from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.megatron

ZIGZAG = "replay expects Megatron's zigzag cut, where cp rank 0 of 2 has chunks 0 and 3 of 4 of each sample"
PLACE = "rank 0, micro-batch: "
NO_MODEL = "has no decoder layers: give prepare a GPTModel or a HybridModel, wrapped or not"
FORMS = ("list", "tuple", "text", "text of a number", "number")
RIGHT = ("right", "packed", "last row live", "last row balanced", "its model", "padded vocabulary", "right after all")
RIGHT = (*RIGHT, *(f"moe_layer_freq, {form}" for form in FORMS))

MESSAGES = {
    "no process group": "ReplayError: no process group: replay needs torch.distributed.init_process_group, "
    "also on one rank",
    "agree without one": "ReplayError: no process group: replay needs torch.distributed.init_process_group, "
    "also on one rank",
    "no traces": "ReplayError: traces: None is not a sequence of RoutingTrace",
    "one trace": "ReplayError: traces: a RoutingTrace is not a sequence of RoutingTrace",
    "bytes": "ReplayError: sample 0: a bytes is not a RoutingTrace",
    "empty": "LayoutError: an empty micro-batch: 0 traces, tokens of shape (2, 16)",
    "no token": "LayoutError: an empty micro-batch: 2 traces, tokens of shape (2, 0)",
    "list of tokens": "ReplayError: tokens: a list is not a tensor of [b, s]",
    "1-d": "LayoutError: tokens of shape (32,) have 1 dimensions != 2 of [b, s] or [1, t]",
    "1-d packed": "LayoutError: tokens of shape (32,) have 1 dimensions != 2 of [b, s] or [1, t]",
    "3-d": "LayoutError: tokens of shape (1, 2, 16) have 3 dimensions != 2 of [b, s] or [1, t]",
    "float": "ReplayError: tokens of torch.float32 != torch.int64: they are no ids",
    "bool": "ReplayError: tokens of torch.bool != torch.int64: they are no ids",
    "device": "ReplayError: tokens on meta != cpu, the model's device",
    "transposed": f"LayoutError: {PLACE}tokens (16, 2) != (2, 2), a cp rank's share of 2 samples",
    "fewer traces": f"LayoutError: {PLACE}tokens (2, 16) != (1, 16), a cp rank's share of 1 samples",
    "padded for packed": f"LayoutError: {PLACE}tokens (2, 16) != (1, 32), a cp rank's share of 2 samples: "
    "these tokens are a padded batch of 2 samples, and its rows are s * b + i in Megatron, not sample by sample: "
    "give Packing.padded",
    "packed for padded": f"LayoutError: {PLACE}tokens (1, 32) != (2, 16), a cp rank's share of 2 samples: "
    "these tokens are sample by sample, b * s + i; the rows of a padded batch are s * b + i in Megatron: "
    "give input_ids as the model gets it, or Packing.packed if it gets a packed batch",
    "order of rows": f"TraceError: {PLACE}these tokens lie in the order of Megatron's rows, s * b + i; "
    "replay takes input_ids, [b, s] (token (",
    "last_row": "ReplayError: last_row 'padding' is none of 'live', 'balanced'",
    "lengths for packing": "ReplayError: packing: a list is not a Packing; see Packing.padded and Packing.packed",
    "number for version": "ReplayError: weight_version: 3 is not a string, as the engine's names are",
    "another token": f"TraceError: {PLACE}token (5) of the trace of sample 0 at position 5 != 6 "
    "of the micro-batch at local row 10",
    "not a model": f"ReplayError: a Linear {NO_MODEL}",
    "list of chunks": f"ReplayError: a list {NO_MODEL}",
    "chunk for chunks": "ReplayError: rank 0: ReplayError: chunks: a GPTModel, not a sequence of model chunks",
    "no chunks": "ReplayError: rank 0: ReplayError: chunks: none of model chunks",
    "no micro-batches": "ReplayError: rank 0: ReplayError: micro_batches: none of StepInput",
    "tuple for StepInput": "ReplayError: rank 0: ReplayError: micro-batch 0: a tuple is not a StepInput",
    "StepInput for a list": "ReplayError: rank 0: ReplayError: micro_batches: a StepInput, not a sequence of StepInput",
    "contiguous": f"TraceError: {PLACE}these tokens are cut contiguously; {ZIGZAG} (",
    "contiguous stream": f"TraceError: {PLACE}these tokens are cut contiguously, "
    f"the packed stream as a whole; {ZIGZAG} (",
    "uncut": f"LayoutError: {PLACE}tokens (2, 16) != (2, 8), a cp rank's share of 2 samples: "
    "these tokens are not cut for context parallelism, of which there are 2 ranks",
    "deeper": "ReplayError: sample 0: layer 4 of its trace's 5 MoE layers is none of the model's 3 (2 such layers)",
    "dense": "ReplayError: sample 0: layer 0 of its trace's 4 MoE layers is none of the model's 3 (1 such layers)",
    "shallower": f"LayoutError: {PLACE}layer 3 is none of the MoE layers [1, 2]",
    "more layers": "ReplayError: sample 1: num_layers (94) of its trace's model != 4",
    "wider": "ReplayError: sample 0: hidden_size (64) of its trace's model != 32",
    "larger vocabulary": "ReplayError: sample 0: vocab_size (65) of its trace's model > 64, padding included",
    "moe_layer_freq, short": "ReplayError: moe_layer_freq [0, 1, 1] is no pattern of 4 layers",
    "moe_layer_freq, zero": "ReplayError: moe_layer_freq 0 is no pattern of 4 layers",
    "moe_layer_freq, true": "ReplayError: moe_layer_freq True is no pattern of 4 layers",
    "moe_layer_freq, twos": "ReplayError: moe_layer_freq [0, 2, 2, 2] is no pattern of 4 layers",
    "moe_layer_freq, nothing": "ReplayError: moe_layer_freq None is no pattern of 4 layers",
    "moe_layer_freq, code": "ReplayError: moe_layer_freq \"__import__('os').getpid()\" is no pattern of layers: ",
    "moe_layer_freq, huge": "ReplayError: moe_layer_freq '[1]*10000000000' is no pattern of layers: ",
    "moe_layer_freq, deep": "ReplayError: moe_layer_freq '[[[",
}


@pytest.fixture(scope="module")
def said(tell: Callable[..., list[dict[str, Any]]]) -> dict[str, Any]:
    """What each use raised."""
    (found,) = tell(["replay_inputs.py"])
    return found


def test_every_use_has_a_message(said: dict[str, Any]) -> None:
    assert set(said) == {*MESSAGES, *RIGHT}


@pytest.mark.parametrize("use", MESSAGES)
def test_a_wrong_use_is_told_what_is_wrong(said: dict[str, Any], use: str) -> None:
    assert said[use] is not None and said[use].startswith(MESSAGES[use]), said[use]
    if MESSAGES[use][-1] not in " ([":
        assert said[use] == MESSAGES[use]


@pytest.mark.parametrize("use", RIGHT)
def test_right_uses_pass(said: dict[str, Any], use: str) -> None:
    assert said[use] is None
