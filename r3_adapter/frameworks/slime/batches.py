"""How slime packs micro-batches into a rank's model input, taken from slime's own `get_batch`.

S: tokens of a sample; N: samples of a micro-batch; t: tokens of the micro-batch, padding included.
"""

import copy
import inspect
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from r3_adapter.errors import LayoutError, ReplayError
from r3_adapter.frameworks.rows import from_int32
from r3_adapter.frameworks.slime.rollout import ROUTES
from r3_adapter.layout import CpCut, Packing
from r3_adapter.megatron.replay_batch import StepInput
from r3_adapter.trace import RoutingTrace

GetBatch = Callable[..., dict[str, Any]]

_KEYS = ["tokens", "loss_masks", "total_lengths", "response_lengths", "max_seq_lens", ROUTES]


def step_inputs(iterator: Any, first: int, num: int, get_batch: GetBatch, args: Namespace) -> list[StepInput]:
    """Return what `prepare_step` takes of some micro-batches; the iterator stays where it is.

    iterator: slime's DataIterator. first: of the micro-batches, as its offset counts.
    get_batch: slime's, which packs, cuts and pads.

    Raises:
        R3Error: Routes that are missing or are no traces; names the micro-batch.
    """
    traces_of(iterator.rollout_data)
    ahead = copy.copy(iterator)
    ahead.offset = first
    known = inspect.signature(get_batch).parameters
    options = {
        "pad_multiplier": args.data_pad_size_multiplier,
        "allgather_cp": args.allgather_cp,
        "qkv_format": getattr(args, "qkv_format", "thd"),
    }
    options = {name: value for name, value in options.items() if name in known}
    cut: CpCut = "contiguous" if args.allgather_cp else "zigzag"
    return [step_input(get_batch(ahead, list(_KEYS), **options), cut) for _ in range(num)]


def step_input(batch: dict[str, Any], cp_cut: CpCut) -> StepInput:
    """Return what `prepare_step` takes of one micro-batch.

    batch: of `get_batch`; tokens [1, t / cp], and where the samples of the whole micro-batch begin and end; or [N, s /
        cp] of samples that are padded to one length.

    Raises:
        LayoutError: sequences that are not the samples, or these and one of padding.
    """
    traces, tokens = list(batch[ROUTES]), batch["tokens"]
    bounds = _bounds(batch)
    if bounds is None:
        return StepInput(traces, tokens, _padded(len(traces), tokens, cp_cut))
    return StepInput(with_tail(traces, len(bounds) - 1), tokens, Packing.packed(bounds, cp_cut=cp_cut))


def with_tail(traces: Sequence[RoutingTrace], num_sequences: int) -> list[RoutingTrace]:
    """Return the traces, and an empty one if the packed stream ends in a sequence of padding; not every stream does.

    Raises:
        LayoutError: another number of sequences.
    """
    if num_sequences == len(traces):
        return list(traces)
    if num_sequences == len(traces) + 1:
        return [*traces, traces[-1].rows(0, 0)]
    raise LayoutError(f"{num_sequences} packed sequences != {len(traces)} samples, or these and one of padding")


def traces_of(rollout_data: dict[str, Any]) -> list[RoutingTrace]:
    """Return the traces of a rank's samples; the first time, reads what `convert` has written, and keeps it there.

    Raises:
        ReplayError: There are no routes. TraceError: They are damaged.
    """
    found = rollout_data.get(ROUTES)
    if not found:
        raise ReplayError(
            f"no {ROUTES} in the training data: "
            "--custom-convert-samples-to-train-data-path r3_adapter.frameworks.slime.convert"
        )
    if not all(isinstance(routes, RoutingTrace) for routes in found):
        found = [from_int32(routes, place=f"sample {number} of this rank") for number, routes in enumerate(found)]
        rollout_data[ROUTES] = found
    return list(found)


def _padded(num_samples: int, tokens: torch.Tensor, cp_cut: CpCut) -> Packing:
    from megatron.core import parallel_state as ps

    length = tokens.shape[1] * ps.get_context_parallel_world_size()
    return Packing.padded(num_samples, length, cp_cut=cp_cut)


def _bounds(batch: dict[str, Any]) -> list[int] | None:
    """Return where the sequences of a packed micro-batch begin and end; None of a padded one.

    Source: slime@0.3.1, miles@0.1.0: get_batch; miles makes `packed_seq_params` later, of its `cu_seqlens`.
    """
    params = batch.get("packed_seq_params")
    bounds = batch.get("cu_seqlens") if params is None else params.cu_seqlens_q
    return None if bounds is None else bounds.tolist()


class TokenCheck:
    """Compares the tokens that each forward pass is given with those that its routes were prepared for.

    A context: it looks at passes inside, and `raise_different` is called after it. Nothing waits for the device before.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module], inputs: Sequence[StepInput]) -> None:
        self._chunks, self._inputs = chunks, inputs
        self._found = list[tuple[str, torch.Tensor]]()
        self._hooks = ExitStack()

    def __enter__(self) -> "TokenCheck":
        for index, chunk in enumerate(self._chunks):
            hook = chunk.register_forward_pre_hook(self._comparison(index), with_kwargs=True)
            self._hooks.callback(hook.remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    def raise_different(self) -> None:
        """Refuse passes of other tokens.

        Raises:
            ReplayError: Names chunk and micro-batch.
        """
        different = torch.stack([other for _, other in self._found]).tolist() if self._found else []
        places = [place for (place, _), other in zip(self._found, different, strict=True) if other]
        if places:
            raise ReplayError(f"{places[0]}: the model was given other tokens than its routes were prepared for")

    def _comparison(self, index: int) -> Any:
        waiting = iter(enumerate(self._inputs))

        def compare(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            number, want = next(waiting, (len(self._inputs), None))
            tokens = args[0] if args else kwargs.get("input_ids")
            # Other checks refuse a pass too many.
            if want is None or not isinstance(tokens, torch.Tensor):
                return
            place = f"chunk {index}, micro-batch {number}"
            if tokens.shape != want.tokens.shape:
                raise ReplayError(
                    f"{place}: input_ids {tuple(tokens.shape)} != {tuple(want.tokens.shape)}, of the routes"
                )
            self._found.append((place, (tokens != want.tokens).any()))

        return compare
