"""Write a Megatron model as a Hugging Face checkpoint, each rank its own part; what an engine's weight update reads."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from r3_adapter.errors import ReplayError
from r3_adapter.megatron.bridge import library as bridge
from r3_adapter.megatron.layers import unwrapped
from r3_adapter.megatron.placed import in_checkpoint_order, placement_of
from r3_adapter.megatron.policy_trainer.checkpoint import Template, not_taken
from r3_adapter.megatron.policy_trainer.weights import place_of, source_of

INDEX = "model.safetensors.index.json"


def export_weights(chunks: Sequence[torch.nn.Module], like: Template, folder: Path) -> list[Path]:
    """Write the weights into a folder, which is complete when all ranks have returned; each rank writes a part of them.

    All ranks must call it. Rank 0 writes the index, and the files beside the weights.

    chunks: model chunks, wrapped or not.
    like: the checkpoint that the model was built from: what it has, and nothing else, is written.

    Returns:
        The files that this rank has written.

    Raises:
        ReplayError: a tensor of the checkpoint that is not made, made twice, or in another shape, on every rank.
    """
    if bridge.is_installed():
        tensors = _converted(chunks, like)
    else:
        tensors, config = {}, like.config
        for chunk in chunks:
            model = unwrapped(chunk)
            for name, parameter in model.named_parameters():
                tensors.update(_tensors_of(model, name, parameter.detach(), config))
    tensors = in_checkpoint_order(tensors, placement_of(unwrapped(chunks[0])))
    tensors = {**{name: _fitting(name, tensor, like) for name, tensor in tensors.items()}, **like.kept}
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    everybody: list[tuple[list[str], int]] = [([], 0) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(everybody, (list(tensors), num_bytes))
    _check_complete([name for names, _ in everybody for name in names], like)
    rank, writers = torch.distributed.get_rank(), [rank for rank, (names, _) in enumerate(everybody) if names]
    files = {rank: f"model-{at:05d}-of-{len(writers):05d}.safetensors" for at, rank in enumerate(writers, start=1)}
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    if tensors:
        path = folder / files[rank]
        save_file(tensors, path.with_suffix(".part"), {"format": "pt"})
        written.append(path.with_suffix(".part").rename(path))
    if rank == 0:
        for name, data in like.files.items():
            written.append(folder / name)
            written[-1].write_bytes(data)
        places = {name: files[rank] for rank in writers for name in everybody[rank][0]}
        index = {"metadata": {"total_size": sum(size for _, size in everybody)}, "weight_map": places}
        written.append(folder / INDEX)
        written[-1].write_text(json.dumps(index, indent=2, sort_keys=True), encoding="utf-8")
    return written


def _fitting(name: str, tensor: torch.Tensor, like: Template) -> torch.Tensor:
    """Return a tensor as it is to be written: in the checkpoint's dtype, which a buffer of the model may not have."""
    want = like.tensors.get(name)
    if want is None:
        raise ReplayError(f"{name}: the checkpoint that the model was built from has no such tensor")
    if tensor.shape != want.shape:
        raise ReplayError(f"{name}: shape {tuple(tensor.shape)} != {tuple(want.shape)} of the checkpoint")
    return tensor.to(want.dtype).contiguous()


def _check_complete(written: Sequence[str], like: Template) -> None:
    counts = Counter(written)
    wrong = {name: counts[name] for name in {*like.tensors, *counts} if counts[name] != 1}
    if wrong:
        name = min(wrong)
        raise ReplayError(
            f"{len(wrong)} of {len(like.tensors)} tensors would not be written once: {name!r} {wrong[name]} times"
        )


def _converted(chunks: Sequence[torch.nn.Module], like: Template) -> dict[str, torch.Tensor]:
    """Return this rank's part of the tensors; all ranks have each for a moment, and the one with the least keeps it."""
    from r3_adapter.megatron.bridge.weights import tensors_of

    rank, size = torch.distributed.get_rank(), [0] * torch.distributed.get_world_size()
    tensors: dict[str, torch.Tensor] = {}
    config = like.config
    for name, tensor in tensors_of(chunks, config, like.tensors):
        if not_taken(name, config):
            continue
        writer = size.index(min(size))
        size[writer] += tensor.nbytes
        if writer == rank:
            tensors[name] = tensor.detach().to("cpu", copy=True)
    return tensors


def _tensors_of(model: Any, name: str, data: torch.Tensor, config: Any) -> dict[str, torch.Tensor]:
    """Return the checkpoint's tensors that a parameter makes; none on a rank that does not write them."""
    from megatron.core import parallel_state as ps

    rule, sources, expert = source_of(model, name)
    place = place_of(config, expert=expert)
    first = ps.get_expert_data_parallel_rank() == 0 if expert else ps.get_data_parallel_rank(True) == 0
    if not first or (model.pre_process is False and sources == ("model.embed_tokens.weight",)):
        return {}
    group = ps.get_expert_tensor_parallel_group() if expert else ps.get_tensor_model_parallel_group()
    parts = [data]
    if place.parts > 1 and rule.cut.shared:
        parts = [torch.empty_like(data) for _ in range(place.parts)]
        torch.distributed.all_gather(parts, data.contiguous(), group=group)
    if place.part:
        return {}
    found = [tensor.contiguous().cpu() for tensor in rule.cut.join(parts, len(sources), place)]
    if len(found) != len(sources):
        raise ReplayError(f"{name}: makes {len(found)} tensors != {len(sources)} of {sources}")
    return dict(zip(sources, found, strict=True))
