"""Between a Megatron model and a Hugging Face checkpoint: megatron-bridge, and without it a table of Qwen3-MoE alone.

The table says the names of tensors and how ranks cut each.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from r3_adapter.balance.table import Table
from r3_adapter.errors import ReplayError
from r3_adapter.megatron.bridge import library as bridge
from r3_adapter.megatron.placed import PlacedCheckpoint
from r3_adapter.megatron.policy_trainer.checkpoint import Checkpoint, not_taken


@dataclass(frozen=True)
class Place:
    """What a rank needs to know to cut a tensor: its number among those that share it, and the attention's shape."""

    part: int
    parts: int
    num_groups: int
    head_dim: int


@dataclass(frozen=True)
class Cut:
    """How a parameter is made of a checkpoint's tensors, and the way back.

    take: reads this rank's part of the named tensors.
    join: makes the tensors, in the order of their names, of all ranks' parts and the number of tensors.
    shared: whether ranks have different parts.
    """

    take: Callable[[Checkpoint, tuple[str, ...], Place], torch.Tensor]
    join: Callable[[Sequence[torch.Tensor], int, Place], list[torch.Tensor]]
    shared: bool = True


def _take_whole(checkpoint: Checkpoint, names: tuple[str, ...], _: Place) -> torch.Tensor:
    (name,) = names
    return checkpoint.read(name)


def _join_whole(parts: Sequence[torch.Tensor], _: int, __: Place) -> list[torch.Tensor]:
    return [parts[0]]


def _take_rows(checkpoint: Checkpoint, names: tuple[str, ...], place: Place) -> torch.Tensor:
    return torch.cat([checkpoint.read(name, part=place.part, parts=place.parts) for name in names])


def _join_rows(parts: Sequence[torch.Tensor], num_tensors: int, _: Place) -> list[torch.Tensor]:
    pieces = [part.chunk(num_tensors) for part in parts]
    return [torch.cat(tensor) for tensor in zip(*pieces, strict=True)]


def _take_columns(checkpoint: Checkpoint, names: tuple[str, ...], place: Place) -> torch.Tensor:
    (name,) = names
    return checkpoint.read(name, dim=1, part=place.part, parts=place.parts)


def _join_columns(parts: Sequence[torch.Tensor], _: int, __: Place) -> list[torch.Tensor]:
    return [torch.cat(list(parts), dim=1)]


def _take_groups(checkpoint: Checkpoint, names: tuple[str, ...], place: Place) -> torch.Tensor:
    if place.num_groups % place.parts:
        raise ReplayError(f"{names[0]}: {place.num_groups} query groups are not a multiple of tp ({place.parts})")
    parts = [checkpoint.read(name, part=place.part, parts=place.parts) for name in names]
    groups = place.num_groups // place.parts
    shaped = [part.reshape(groups, part.shape[0] // groups, *part.shape[1:]) for part in parts]
    return torch.cat(shaped, dim=1).flatten(0, 1)


def _join_groups(parts: Sequence[torch.Tensor], _: int, place: Place) -> list[torch.Tensor]:
    fused = torch.cat(list(parts))
    shaped = fused.reshape(place.num_groups, -1, *fused.shape[1:])
    num_query_rows = shaped.shape[1] - 2 * place.head_dim
    pieces = torch.split(shaped, [num_query_rows, place.head_dim, place.head_dim], dim=1)
    return [piece.flatten(0, 1) for piece in pieces]


WHOLE = Cut(_take_whole, _join_whole, shared=False)
ROWS = Cut(_take_rows, _join_rows)
"""Along the outputs, column parallel; several tensors are stacked: SwiGLU's gate and up lie in one parameter."""
COLUMNS = Cut(_take_columns, _join_columns)
"""Along the inputs, row parallel."""
GROUPS = Cut(_take_groups, _join_groups)
"""q, k and v interleaved by query group, as in Megatron's fused projection; ranks share the groups out."""


@dataclass(frozen=True)
class Rule:
    """Megatron parameters that match `parameter`, and the tensors and the cut that make them.

    {layer} stands for the layer's place in its chunk on the left and its global number on the right; {expert} likewise.
    """

    parameter: str
    sources: tuple[str, ...]
    cut: Cut


_HERE, _THERE = "decoder.layers.{layer}.", "model.layers.{layer}."


def _layer(parameter: str, *sources: str, cut: Cut = WHOLE) -> Rule:
    return Rule(_HERE + parameter, tuple(_THERE + source for source in sources), cut)


_EXPERT = "mlp.experts.{expert}."

# Where the layer spec is TransformerEngine's, norms are fused into the projection behind them and experts are grouped.
QWEN3_MOE: tuple[Rule, ...] = (
    Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), ROWS),
    Rule("decoder.final_layernorm.weight", ("model.norm.weight",), WHOLE),
    Rule("output_layer.weight", ("lm_head.weight",), ROWS),
    _layer("input_layernorm.weight", "input_layernorm.weight"),
    _layer("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
    _layer(
        "self_attention.linear_qkv.weight",
        *(f"self_attn.{name}_proj.weight" for name in "qkv"),
        cut=GROUPS,
    ),
    _layer("self_attention.q_layernorm.weight", "self_attn.q_norm.weight"),
    _layer("self_attention.k_layernorm.weight", "self_attn.k_norm.weight"),
    _layer("self_attention.linear_proj.weight", "self_attn.o_proj.weight", cut=COLUMNS),
    _layer("pre_mlp_layernorm.weight", "post_attention_layernorm.weight"),
    _layer("mlp.linear_fc1.layer_norm_weight", "post_attention_layernorm.weight"),
    _layer("mlp.linear_fc1.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight", cut=ROWS),
    _layer("mlp.linear_fc2.weight", "mlp.down_proj.weight", cut=COLUMNS),
    _layer("mlp.router.weight", "mlp.gate.weight"),
    _layer(
        "mlp.experts.local_experts.{expert}.linear_fc1.weight",
        _EXPERT + "gate_proj.weight",
        _EXPERT + "up_proj.weight",
        cut=ROWS,
    ),
    _layer("mlp.experts.local_experts.{expert}.linear_fc2.weight", _EXPERT + "down_proj.weight", cut=COLUMNS),
    _layer("mlp.experts.linear_fc1.weight{expert}", _EXPERT + "gate_proj.weight", _EXPERT + "up_proj.weight", cut=ROWS),
    _layer("mlp.experts.linear_fc2.weight{expert}", _EXPERT + "down_proj.weight", cut=COLUMNS),
)


def load_weights(
    chunks: Sequence[torch.nn.Module], folder: Path, *, without: tuple[str, ...] = (), placement: Table | None = None
) -> None:
    """Copy this rank's share of a checkpoint into its model chunks. All ranks must call it.

    without: beginnings of the names of parameters that are left as they are.
    placement: where the model's experts lie.

    Raises:
        ReplayError: a parameter that no tensor or more than one makes, or a tensor that is missing, does not fit, or
            that no rank has read though models must take it.
    """
    with PlacedCheckpoint(folder, placement) as checkpoint:
        if bridge.is_installed():
            from r3_adapter.megatron.bridge import weights

            used = weights.load(chunks, checkpoint, without=without)
        else:
            used = {name for chunk in chunks for name in _load_chunk(chunk, checkpoint, without)}
        _check_all_read(checkpoint, used)


def _check_all_read(checkpoint: Checkpoint, used: set[str]) -> None:
    everybody: list[set[str]] = [set() for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(everybody, used)
    names = {name for name in checkpoint.names() if not not_taken(name, checkpoint.config)}
    unread = names.difference(*everybody)
    if unread:
        place = checkpoint.folder
        raise ReplayError(f"{place}: {len(unread)} of {len(names)} tensors were read by no rank: {min(unread)!r}, ...")


def _load_chunk(model: torch.nn.Module, checkpoint: Checkpoint, without: tuple[str, ...]) -> list[str]:
    used: list[str] = []
    tied = bool(getattr(model, "share_embeddings_and_output_weights", False))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(without):
                continue
            rule, sources, expert = source_of(model, name)
            data = rule.cut.take(checkpoint, sources, place_of(checkpoint.config, expert=expert))
            if data.shape != parameter.shape:
                raise ReplayError(f"{name}: shape {tuple(parameter.shape)} != {tuple(data.shape)} made of {sources}")
            twice = set(used).intersection(sources)
            if twice and not tied:
                raise ReplayError(f"{name}: {min(twice)!r} makes another parameter of this rank too")
            parameter.copy_(data)
            used += sources
    return used


def source_of(model: Any, name: str) -> tuple[Rule, tuple[str, ...], bool]:
    """Return a parameter's rule, the checkpoint's tensors that make it, and whether it is an expert's.

    Raises:
        ReplayError: no rule or more than one matches.
    """
    rule, found = _match(name)
    numbers = {}
    if "layer" in found:
        layer = model.decoder.layers[int(found["layer"])]
        numbers["layer"] = layer.layer_number - 1
        if "expert" in found:
            numbers["expert"] = int(found["expert"]) + _first_expert(layer)
    sources = tuple(source.format(**numbers) for source in rule.sources)
    if getattr(model, "share_embeddings_and_output_weights", False) and sources == ("lm_head.weight",):
        sources = ("model.embed_tokens.weight",)
    return rule, sources, "expert" in numbers


@cache
def _match(name: str) -> tuple[Rule, dict[str, str]]:
    found = [(rule, match) for rule in QWEN3_MOE if (match := _pattern(rule).fullmatch(name))]
    if len(found) != 1:
        raise ReplayError(f"{name}: {len(found)} rules match this parameter != 1")
    rule, match = found[0]
    return rule, match.groupdict()


@cache
def _pattern(rule: Rule) -> re.Pattern[str]:
    return re.compile(re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>\\d+)", re.escape(rule.parameter)))


def _first_expert(layer: Any) -> int:
    return int(layer.mlp.local_expert_indices[0])


def place_of(config: Mapping[str, Any], *, expert: bool) -> Place:
    """Return this rank's place among those that share a parameter; config: the checkpoint's."""
    from megatron.core import parallel_state as ps

    shape = (config["num_key_value_heads"], config["head_dim"])
    if expert:
        return Place(ps.get_expert_tensor_parallel_rank(), ps.get_expert_tensor_parallel_world_size(), *shape)
    return Place(ps.get_tensor_model_parallel_rank(), ps.get_tensor_model_parallel_world_size(), *shape)
