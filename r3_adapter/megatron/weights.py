"""Give a Megatron model the weights of a Hugging Face checkpoint: a table of names, and how ranks cut each tensor."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from r3_adapter.errors import ReplayError
from r3_adapter.megatron.checkpoint import Checkpoint


@dataclass(frozen=True)
class Place:
    """What a rank needs to know to cut a tensor: its number among those that share it, and the attention's groups."""

    part: int
    parts: int
    num_groups: int


Cut = Callable[[Checkpoint, tuple[str, ...], Place], torch.Tensor]


def _whole(checkpoint: Checkpoint, names: tuple[str, ...], _: Place) -> torch.Tensor:
    (name,) = names
    return checkpoint.read(name)


def _rows(checkpoint: Checkpoint, names: tuple[str, ...], place: Place) -> torch.Tensor:
    """Cut each source along its outputs, then stack: column parallel; SwiGLU's gate and up lie in one tensor."""
    return torch.cat([checkpoint.read(name, part=place.part, parts=place.parts) for name in names])


def _columns(checkpoint: Checkpoint, names: tuple[str, ...], place: Place) -> torch.Tensor:
    """Cut along the inputs: row parallel."""
    (name,) = names
    return checkpoint.read(name, dim=1, part=place.part, parts=place.parts)


def _groups(checkpoint: Checkpoint, names: tuple[str, ...], place: Place) -> torch.Tensor:
    """Interleave q, k and v by query group, as Megatron's fused projection has them; ranks share the groups out."""
    if place.num_groups % place.parts:
        raise ReplayError(f"{names[0]}: {place.num_groups} query groups are not a multiple of tp ({place.parts})")
    parts = [checkpoint.read(name, part=place.part, parts=place.parts) for name in names]
    groups = place.num_groups // place.parts
    shaped = [part.reshape(groups, part.shape[0] // groups, *part.shape[1:]) for part in parts]
    return torch.cat(shaped, dim=1).flatten(0, 1)


@dataclass(frozen=True)
class Rule:
    """Megatron parameters that match `parameter`, and the tensors and the cut that make them.

    {layer} stands for the layer's place in its chunk on the left and its global number on the right; {expert} likewise.
    """

    parameter: str
    sources: tuple[str, ...]
    cut: Cut


_HERE, _THERE = "decoder.layers.{layer}.", "model.layers.{layer}."


def _layer(parameter: str, *sources: str, cut: Cut = _whole) -> Rule:
    return Rule(_HERE + parameter, tuple(_THERE + source for source in sources), cut)


_EXPERT = "mlp.experts.{expert}."

# Where the layer spec is TransformerEngine's, norms are fused into the projection behind them and experts are grouped.
QWEN3_MOE: tuple[Rule, ...] = (
    Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), _rows),
    Rule("decoder.final_layernorm.weight", ("model.norm.weight",), _whole),
    Rule("output_layer.weight", ("lm_head.weight",), _rows),
    _layer("input_layernorm.weight", "input_layernorm.weight"),
    _layer("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
    _layer(
        "self_attention.linear_qkv.weight",
        *(f"self_attn.{name}_proj.weight" for name in "qkv"),
        cut=_groups,
    ),
    _layer("self_attention.q_layernorm.weight", "self_attn.q_norm.weight"),
    _layer("self_attention.k_layernorm.weight", "self_attn.k_norm.weight"),
    _layer("self_attention.linear_proj.weight", "self_attn.o_proj.weight", cut=_columns),
    _layer("pre_mlp_layernorm.weight", "post_attention_layernorm.weight"),
    _layer("mlp.linear_fc1.layer_norm_weight", "post_attention_layernorm.weight"),
    _layer("mlp.linear_fc1.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight", cut=_rows),
    _layer("mlp.linear_fc2.weight", "mlp.down_proj.weight", cut=_columns),
    _layer("mlp.router.weight", "mlp.gate.weight"),
    _layer(
        "mlp.experts.local_experts.{expert}.linear_fc1.weight",
        _EXPERT + "gate_proj.weight",
        _EXPERT + "up_proj.weight",
        cut=_rows,
    ),
    _layer("mlp.experts.local_experts.{expert}.linear_fc2.weight", _EXPERT + "down_proj.weight", cut=_columns),
    _layer(
        "mlp.experts.linear_fc1.weight{expert}", _EXPERT + "gate_proj.weight", _EXPERT + "up_proj.weight", cut=_rows
    ),
    _layer("mlp.experts.linear_fc2.weight{expert}", _EXPERT + "down_proj.weight", cut=_columns),
)


def load_weights(model: torch.nn.Module, folder: Path) -> list[str]:
    """Copy this rank's share of a Qwen3-MoE checkpoint into a GPTModel; return the names read, one for each reading.

    Raises:
        ReplayError: a parameter that no rule or more than one matches, a tensor that is missing or does not fit.
    """
    decoder: Any = model.decoder
    used: list[str] = []
    tied = bool(getattr(model, "share_embeddings_and_output_weights", False))
    with Checkpoint(folder) as checkpoint, torch.no_grad():
        for name, parameter in model.named_parameters():
            rule, found = _match(name)
            numbers = {}
            if "layer" in found:
                layer = decoder.layers[int(found["layer"])]
                numbers["layer"] = layer.layer_number - 1
                if "expert" in found:
                    numbers["expert"] = int(found["expert"]) + _first_expert(layer)
            sources = tuple(source.format(**numbers) for source in rule.sources)
            if tied and sources == ("lm_head.weight",):
                sources = ("model.embed_tokens.weight",)
            data = rule.cut(checkpoint, sources, _place(checkpoint, expert="expert" in numbers))
            if data.shape != parameter.shape:
                raise ReplayError(f"{name}: shape {tuple(parameter.shape)} != {tuple(data.shape)} made of {sources}")
            twice = set(used).intersection(sources)
            if twice and not tied:
                raise ReplayError(f"{name}: {min(twice)!r} makes another parameter of this rank too")
            parameter.copy_(data)
            used += sources
    return used


def _match(name: str) -> tuple[Rule, dict[str, str]]:
    found = [(rule, match) for rule in QWEN3_MOE if (match := _pattern(rule).fullmatch(name))]
    if len(found) != 1:
        raise ReplayError(f"{name}: {len(found)} rules match this parameter != 1")
    rule, match = found[0]
    return rule, match.groupdict()


def _pattern(rule: Rule) -> re.Pattern[str]:
    return re.compile(re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>\\d+)", re.escape(rule.parameter)))


def _first_expert(layer: Any) -> int:
    return int(layer.mlp.local_expert_indices[0])


def _place(checkpoint: Checkpoint, *, expert: bool) -> Place:
    from megatron.core import parallel_state as ps

    groups = checkpoint.config["num_key_value_heads"]
    if expert:
        return Place(ps.get_expert_tensor_parallel_rank(), ps.get_expert_tensor_parallel_world_size(), groups)
    return Place(ps.get_tensor_model_parallel_rank(), ps.get_tensor_model_parallel_world_size(), groups)
