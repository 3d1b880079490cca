"""Which MoE layers a model of Megatron has, by its own numbers and by those of traces.

A GPTModel has a layer where Hugging Face's model has one. A hybrid model (HybridModel, up to megatron-core 0.17
MambaModel) has a layer for each letter of its pattern, of one kind only: `*` attention, `M` Mamba, `G` gated delta net,
`E` MoE, `-` dense. Hugging Face counts the layers of Nemotron-H so too. Those of a model that was moved over from a
GPTModel are two letters each: `*E` is one layer.
"""

import ast
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from r3_adapter.errors import ReplayError, show
from r3_adapter.trace import RoutingTrace

_MOST_LAYERS = 1 << 16
_MOE, _MIXERS, _NETWORKS = "E", frozenset("MG*D+"), frozenset("E-")


def unwrapped(chunk: torch.nn.Module) -> Any:
    """Return the model of a chunk, wrapped or not; also the one in a model of another kind, if it is alone there."""
    model: Any = chunk
    while hasattr(model, "module"):
        model = model.module
    if not hasattr(model, "decoder") and isinstance(model, torch.nn.Module):
        kinds = _kinds()
        inside = [module for module in model.modules() if isinstance(module, kinds)]
        return inside[0] if len(inside) == 1 else model
    return model


def _kinds() -> tuple[type, ...]:
    from megatron.core.models.gpt import GPTModel

    try:
        from megatron.core.models.hybrid.hybrid_model import HybridModel
    except ImportError:
        from megatron.core.models.mamba import MambaModel as HybridModel
    return GPTModel, HybridModel


def moe_routers(chunk: torch.nn.Module) -> Iterator[tuple[int, torch.nn.Module]]:
    """Yield the global decoder layer and the router of each of `moe_layers`."""
    return ((layer_id, layer.router) for layer_id, layer in moe_layers(chunk))


def moe_layers(chunk: torch.nn.Module) -> Iterator[tuple[int, Any]]:
    """Yield the global decoder layer (from 0, the model's own) and the MoELayer of each MoE layer of a chunk.

    Layers of multi-token prediction are not among them: routers there see no route.

    chunk: a GPTModel or a hybrid model, wrapped or not.

    Raises:
        ReplayError: It is none.
    """
    model = unwrapped(chunk)
    layers = getattr(getattr(model, "decoder", None), "layers", None)
    if layers is None:
        raise ReplayError(
            f"a {type(model).__name__} has no decoder layers: give prepare a GPTModel or a HybridModel, wrapped or not"
        )
    for layer in layers:
        # Layers of Mamba do not say.
        if getattr(layer, "is_moe_layer", False):
            yield layer.layer_number - 1, layer.mlp


def hybrid_pattern(model: Any) -> str | None:
    """Return a letter for each decoder layer of a hybrid model, of all stages; None of another one.

    Source: megatron/core/models/hybrid/hybrid_layer_allocation.py@0.19.2:parse_hybrid_pattern;
        megatron/core/ssm/mamba_hybrid_layer_allocation.py@0.16.1:allocate_layers.
    """
    if not hasattr(getattr(model, "decoder", None), "layer_type_list"):
        return None
    names = ("hybrid_layer_pattern", "hybrid_override_pattern")
    pattern = next((found for name in names if (found := getattr(model, name, None))), "")
    # One that is made of ratios has no MoE layers, and none is then asked for.
    return str(pattern).partition("/")[0].replace("|", "")


def whole_moe_layers(model: Any, config: Any) -> list[int]:
    """Return the MoE layers of all stages of a model, by its own numbers from 0.

    Raises:
        ReplayError: a moe_layer_freq that says none.
    """
    pattern = hybrid_pattern(model)
    return configured_moe_layers(config) if pattern is None else _letters(pattern)


def trace_layers(model: Any, config: Any, traces: Sequence[RoutingTrace]) -> tuple[Mapping[int, int], int]:
    """Return what the traces call each MoE layer of a model, and how many layers that has by their count.

    traces: one at least; the first one's layers are all traces', or repack refuses them.

    Raises:
        ReplayError: they have other layers than a hybrid model by either count; names both.
    """
    own, pattern = whole_moe_layers(model, config), hybrid_pattern(model)
    if pattern is None:
        return {layer: layer for layer in own}, config.num_layers
    found = traces[0].layer_ids.tolist()
    if found == own:
        return {layer: layer for layer in own}, len(pattern)
    pairs = _are_pairs(pattern)
    if pairs and found == [layer // 2 for layer in own]:
        return {layer: layer // 2 for layer in own}, len(pattern) // 2
    either = f", nor {show([layer // 2 for layer in own])}, with one number for two letters" if pairs else ""
    raise ReplayError(
        f"sample 0: MoE layers {show(found)} of its trace are not {show(own)}, those of the hybrid model "
        f"{show(pattern)}{either}"
    )


def _letters(pattern: str) -> list[int]:
    return [at for at, letter in enumerate(pattern) if letter == _MOE]


def _are_pairs(pattern: str) -> bool:
    """Tell whether the letters come in pairs: attention, or what replaces it, then an MLP or MoE."""
    return len(pattern) % 2 == 0 and {*pattern[::2]} <= _MIXERS and {*pattern[1::2]} <= _NETWORKS


def configured_moe_layers(config: Any) -> list[int]:
    """Return the global decoder layers (from 0) of the whole model that are MoE layers, of a GPTModel.

    Raises:
        ReplayError: A moe_layer_freq that says none.

    Source: megatron/core/models/gpt/gpt_layer_specs.py@0.16.1:get_gpt_decoder_layer_specs;
        megatron/training/arguments.py@0.19.2:moe_freq_type, for the text.
    """
    frequency, number = getattr(config, "moe_layer_freq", 1), config.num_layers
    pattern = frequency
    if isinstance(frequency, str):
        try:
            pattern = _pattern(ast.parse(frequency, mode="eval").body)
        except (SyntaxError, ValueError, RecursionError, MemoryError, TypeError) as error:
            raise ReplayError(f"moe_layer_freq {frequency!r} is no pattern of layers: {error}") from error
    if isinstance(pattern, int) and not isinstance(pattern, bool) and pattern > 0:
        return list(range(0, number, pattern))
    if not isinstance(pattern, list | tuple) or len(pattern) != number or not {*pattern} <= {0, 1}:
        raise ReplayError(f"moe_layer_freq {frequency!r} is no pattern of {number} layers")
    return [layer for layer, moe in enumerate(pattern) if moe]


def _pattern(node: ast.expr) -> Any:
    """Evaluate a number, or lists of numbers with + and *, as in "[0]*3+[1]*58"."""
    if isinstance(node, ast.Constant) and type(node.value) is int and node.value < _MOST_LAYERS:
        return node.value
    if isinstance(node, ast.List):
        return [_pattern(each) for each in node.elts]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Mult):
        left, right = _pattern(node.left), _pattern(node.right)
        found = left + right if isinstance(node.op, ast.Add) else left * right
        if isinstance(found, list) and len(found) < _MOST_LAYERS:
            return found
    raise ValueError(f"{ast.unparse(node)!r} is none")
