"""What a checkpoint's configuration says about its routers; replies of the engine are checked against it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r3_adapter.errors import CaptureError, UnknownModelError
from r3_adapter.sglang.meta_model import MetaModel, meta_model


@dataclass(frozen=True)
class MoEConfig:
    """The routers of a model.

    num_experts: routed experts of a layer.
    topk: experts a token.
    layer_ids: decoder layers (from 0) that are MoE layers, increasing.
    num_layers: all decoder layers.
    hash_layer_ids: the MoE layers whose experts follow from the token id, which no engine captures.
    """

    num_experts: int
    topk: int
    layer_ids: tuple[int, ...]
    num_layers: int
    hash_layer_ids: tuple[int, ...] = ()

    @property
    def captured_layer_ids(self) -> tuple[int, ...]:
        """The MoE layers of which an engine captures routes."""
        return tuple(layer for layer in self.layer_ids if layer not in self.hash_layer_ids)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, place: str = "config") -> "MoEConfig":
        """Read a Hugging Face configuration; of a multimodal model, its text part.

        Raises:
            UnknownModelError: The installed transformers does not have the family, or its modules do not say which
                experts a token can have in which layers.
            CaptureError: The configuration is none, or of a dense model.
        """
        return cls.from_modules(meta_model(config, place))

    @classmethod
    def from_modules(cls, model: MetaModel) -> "MoEConfig":
        """Read the modules of a model.

        Raises:
            UnknownModelError: Layers differ, or hold experts in a form that is not known.
            CaptureError: A dense model.
        """
        where = f"{model.place}: {model.family}"
        found = {at: moe for at in range(len(model.layers)) if (moe := model.moe_layer(at)) is not None}
        if not found:
            raise CaptureError(f"{where}: none of its {len(model.layers)} layers has routed experts")
        shapes = {(moe.num_experts, moe.topk) for moe in found.values()}
        if len(shapes) > 1:
            said = " and ".join(f"{experts} experts with top-{topk}" for experts, topk in sorted(shapes))
            raise UnknownModelError(f"{where}: its layers differ, {said}: one number for all is not known")
        ((num_experts, topk),) = shapes
        hashed = tuple(at for at in found if model.is_hashed(at))
        return cls(num_experts, topk, tuple(found), len(model.layers), hashed)

    @classmethod
    def from_checkpoint(cls, folder: Path) -> "MoEConfig":
        """Read `config.json` of a checkpoint.

        Raises:
            UnknownModelError: A family that is not known; see from_config.
            CaptureError: It cannot be read, or says too little.
        """
        path = folder / "config.json"
        return cls.from_config(read_config(path), place=str(path))

    @classmethod
    def if_known(cls, folder: Path) -> "MoEConfig | None":
        """Read `config.json` of a checkpoint as from_checkpoint does; None of a family that is not known."""
        try:
            return cls.from_checkpoint(folder)
        except UnknownModelError:
            return None


def read_config(path: Path) -> dict[str, Any]:
    """Read a Hugging Face configuration.

    Raises:
        CaptureError: It cannot be read, or is no JSON object.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CaptureError(
            f"{path}: cannot be read: no such file; models are not looked up on a hub, give a checkpoint's folder"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise CaptureError(f"{path}: cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise CaptureError(f"{path}: {type(config).__name__} is no configuration")
    return config
