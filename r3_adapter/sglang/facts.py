"""What a checkpoint's configuration says about its routers, to hold the engine's replies against."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r3_adapter.errors import CaptureError

_NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_TOPK = ("num_experts_per_tok", "moe_topk", "num_experts_per_token")


@dataclass(frozen=True)
class ModelFacts:
    """The routers of a model.

    num_experts: routed experts of a layer.
    topk: experts a token.
    layer_ids: decoder layers (from 0) that are MoE layers, increasing.
    num_layers: all decoder layers.
    """

    num_experts: int
    topk: int
    layer_ids: tuple[int, ...]
    num_layers: int

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, place: str = "config") -> "ModelFacts":
        """Read a Hugging Face configuration; of a multimodal model, its text part.

        Which layers are MoE layers follows from mlp_only_layers and decoder_sparse_step, or first_k_dense_replace
        and moe_layer_freq; without any of them all are.

        Raises:
            CaptureError: The number of experts, top-k or layers is missing.

        Source: transformers@5.12.1: Qwen3MoeDecoderLayer, DeepseekV2DecoderLayer
        """
        text = config.get("text_config") or config
        num_experts, topk = _first(text, _NUM_EXPERTS, place), _first(text, _TOPK, place)
        num_layers = _first(text, ("num_hidden_layers",), place)
        dense, step = set(text.get("mlp_only_layers") or ()), text.get("decoder_sparse_step") or 1
        start, frequency = text.get("first_k_dense_replace") or 0, text.get("moe_layer_freq") or 1
        if isinstance(frequency, list):
            layer_ids = [layer for layer, sparse in enumerate(frequency) if sparse]
        else:
            layer_ids = [layer for layer in range(start, num_layers) if layer % frequency == 0]
        layer_ids = [layer for layer in layer_ids if layer not in dense and (layer + 1) % step == 0]
        return cls(num_experts, topk, tuple(layer_ids), num_layers)

    @classmethod
    def from_checkpoint(cls, folder: Path) -> "ModelFacts":
        """Read `config.json` of a checkpoint.

        Raises:
            CaptureError: It cannot be read, or says too little.
        """
        path = folder / "config.json"
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CaptureError(f"{path}: cannot be read: {error}") from error
        return cls.from_config(config, place=str(path))


def _first(config: Mapping[str, Any], names: tuple[str, ...], place: str) -> int:
    for name in names:
        if isinstance(config.get(name), int):
            return int(config[name])
    raise CaptureError(f"{place}: none of {', '.join(names)}")
