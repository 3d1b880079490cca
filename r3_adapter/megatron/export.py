"""Write a Megatron model as a Hugging Face checkpoint, each rank its own part; what an engine's weight update reads."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from r3_adapter.errors import ReplayError
from r3_adapter.megatron.replay import unwrapped
from r3_adapter.megatron.weights import place_of, source_of

INDEX = "model.safetensors.index.json"


def export_weights(chunks: Sequence[torch.nn.Module], side_files: Mapping[str, bytes], folder: Path) -> list[Path]:
    """Write this rank's share of the weights into a folder, which is complete when all ranks have returned.

    Of ranks that hold the same parameter the first writes it; those that share it out send their parts to that one.
    All ranks must call it. Rank 0 writes the index, and the files beside the weights.

    chunks: model chunks, wrapped or not.
    side_files: config.json, tokenizer and so on, by name: those of the checkpoint that the model was built from, see
        checkpoint.side_files. They are kept in memory, since that checkpoint may be gone by now.

    Returns:
        The files that this rank has written.

    Raises:
        ReplayError: a parameter that the table of weights does not know.
    """
    config = json.loads(side_files["config.json"])
    tensors: dict[str, torch.Tensor] = {}
    for chunk in chunks:
        model = unwrapped(chunk)
        for name, parameter in model.named_parameters():
            tensors.update(_tensors_of(model, name, parameter.detach(), config))
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    everybody: list[tuple[list[str], int]] = [([], 0) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(everybody, (list(tensors), num_bytes))
    rank, writers = torch.distributed.get_rank(), [rank for rank, (names, _) in enumerate(everybody) if names]
    files = {rank: f"model-{at:05d}-of-{len(writers):05d}.safetensors" for at, rank in enumerate(writers, start=1)}
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    if tensors:
        path = folder / files[rank]
        save_file(tensors, path.with_suffix(".part"), {"format": "pt"})
        written.append(path.with_suffix(".part").rename(path))
    if rank == 0:
        for name, data in side_files.items():
            written.append(folder / name)
            written[-1].write_bytes(data)
        places = {name: files[rank] for rank in writers for name in everybody[rank][0]}
        index = {"metadata": {"total_size": sum(size for _, size in everybody)}, "weight_map": places}
        written.append(folder / INDEX)
        written[-1].write_text(json.dumps(index, indent=2, sort_keys=True), encoding="utf-8")
    return written


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
