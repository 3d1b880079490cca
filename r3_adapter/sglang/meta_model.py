"""A model without memory: transformers' own modules of a configuration, on torch's meta device.

Configurations name the same thing in many ways, and leave out what has a default. What a family makes of its
configuration is in its modules, so layers, experts and sizes are read there.
"""

import contextlib
import json
import logging
import re
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from r3_adapter.errors import CaptureError, UnknownModelError

if TYPE_CHECKING:
    from torch import nn

TOPK_NAMES = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_k", "moe_topk", "moe_top_k")
"""What configurations call the experts of a token."""
_ATTRIBUTES = (*TOPK_NAMES, "top_k", "topk")
_EXPERTS = re.compile(r"Expert|NaiveMoe")
_MACHINE = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")
"""What configurations say of kernels, which this machine may not have and modules do not depend on."""
MAX_EXPERTS = 1 << 16
_MAX_LAYERS = 1 << 10
_KEPT = 16
_models: "OrderedDict[str, MetaModel]" = OrderedDict()


@dataclass(frozen=True)
class MoeLayer:
    """The routed part of a decoder layer. Parameters of experts are named as in the layer."""

    num_experts: int
    topk: int
    expert_parameters: frozenset[str]


@dataclass(frozen=True)
class MetaModel:
    """Modules of a decoder.

    family: model_type of the configuration.
    config: transformers' configuration of the text part.
    model: the modules; layers: the decoder's layers; decoder: what they, the embedding and the last norm are in.
    """

    family: str
    config: Any
    model: "nn.Module"
    decoder: "nn.Module"
    layers: "list[nn.Module]"
    place: str

    def moe_layer(self, layer_id: int) -> MoeLayer | None:
        """Return the routed part of a decoder layer, None of a dense one.

        Raises:
            UnknownModelError: Experts in a form that is not known.
        """
        layer = self.layers[layer_id]
        where = f"{self.place}: {self.family}: layer {layer_id}"
        found = _expert_modules(layer)
        if not found:
            named = (name for name, each in layer.named_modules() if _EXPERTS.search(type(each).__name__))
            if any("shared" not in name for name in named) or any(True for _ in _topk_values(layer)):
                raise UnknownModelError(f"{where} has experts of a form that is not known")
            return None
        blocks = {_block_of(layer, name, where) for name, _ in found}
        if len(blocks) > 1:
            raise UnknownModelError(f"{where} has routed experts in {' and '.join(sorted(blocks))}: which is not known")
        block = layer.get_submodule(blocks.pop())
        sizes = {each.shape[0] for _, module in found for each in module.parameters(recurse=False) if each.dim() == 3}
        topk = self._topk(block, where)
        if len(sizes) > 1 or max(sizes) > MAX_EXPERTS:
            raise UnknownModelError(f"{where}: experts of {' and '.join(map(str, sorted(sizes)))}: which is not known")
        (num_experts,) = sizes
        names = frozenset(
            f"{name}.{each}" for name, module in found for each, _ in module.named_parameters(recurse=False)
        )
        inside = {id(each) for _, module in found for each in module.parameters()}
        if not any(
            each.dim() == 2 and each.shape[0] == num_experts for each in block.parameters() if id(each) not in inside
        ):
            raise UnknownModelError(f"{where}: no router of {num_experts} experts")
        if not 1 <= topk <= num_experts:
            raise UnknownModelError(f"{where}: topk {topk} outside 1 to {num_experts} experts")
        return MoeLayer(num_experts, topk, names)

    def moe_modules(self, layer_id: int) -> "tuple[nn.Module, nn.Module]":
        """Return the module that routes and computes the experts of a MoE layer, and the one in it that holds them.

        Raises:
            UnknownModelError: Experts in a form that is not known, or in several modules.
        """
        layer, where = self.layers[layer_id], f"{self.place}: {self.family}: layer {layer_id}"
        found = _expert_modules(layer)
        if len(found) != 1:
            raise UnknownModelError(f"{where} has routed experts in {len(found)} modules != 1")
        ((name, experts),) = found
        return layer.get_submodule(_block_of(layer, name, where)), experts

    def is_hashed(self, layer_id: int) -> bool:
        """Tell whether the experts of a MoE layer follow from token ids, by a table among its buffers."""
        return any(name.endswith("tid2eid") for name, _ in self.layers[layer_id].named_buffers())

    def _topk(self, block: "nn.Module", where: str) -> int:
        found = set(_topk_values(block)) or {
            value for name in TOPK_NAMES if type(value := getattr(self.config, name, None)) is int
        }
        if len(found) != 1:
            said = " and ".join(map(str, sorted(found))) or "nothing"
            raise UnknownModelError(f"{where}: topk is not known: its modules and configuration say {said}")
        return found.pop()


def meta_model(config: Mapping[str, Any], place: str) -> MetaModel:
    """Build the modules of a Hugging Face configuration; of a multimodal model's, the smallest that has its text part.

    Raises:
        UnknownModelError: The installed transformers does not know the family, or cannot build it.
        CaptureError: The configuration is none.
    """
    if not isinstance(config, Mapping):
        raise CaptureError(f"{place}: {type(config).__name__} is no configuration")
    key = json.dumps(config, sort_keys=True, default=str)
    if key not in _models:
        _models[key] = _build(dict(config), place)
        while len(_models) > _KEPT:
            _models.popitem(last=False)
    return _models[key]


def modules_of(model: "nn.Module", place: str) -> MetaModel:
    """Take the modules of a model of transformers that is there.

    Raises:
        UnknownModelError: Its decoder layers are not known.
    """
    text = model.config.get_text_config()  # type: ignore[union-attr, operator]
    family = str(text.model_type)
    decoder, layers = _decoder(model, text, f"{place}: {family}")
    return MetaModel(family, text, model, decoder, layers, place)


def _build(config: dict[str, Any], place: str) -> MetaModel:
    family = config.get("model_type")
    try:
        import torch
        import transformers
    except ImportError as error:
        raise UnknownModelError(f"{place}: {family}: layers are not known without transformers: {error}") from error
    kind = _config_class(config, transformers)
    if kind is None:
        raise UnknownModelError(
            f"{place}: model_type {family!r} is not known to transformers {transformers.__version__}"
        )
    with quiet():
        try:
            # Infinity has a form of its own in files of transformers 5.
            config = kind._decode_special_floats(config)
            whole = kind.from_dict({name: value for name, value in config.items() if name not in _MACHINE})
            text = whole.get_text_config()
            if (num_layers := getattr(text, "num_hidden_layers", 0)) > _MAX_LAYERS:
                raise ValueError(f"num_hidden_layers ({num_layers}) > {_MAX_LAYERS}")
            model_class, model_config = _model_class(whole, text)
            with torch.device("meta"):
                model = None if model_class is None else model_class(model_config)
        # A configuration that its family cannot use fails in as many ways as there are families.
        except Exception as error:
            said = " ".join(str(error).split())[:300]
            raise UnknownModelError(
                f"{place}: {family}: transformers cannot build it: {type(error).__name__}: {said}"
            ) from error
    if model is None:
        raise UnknownModelError(f"{place}: {family}: transformers has no decoder for it")
    if getattr(text, "is_encoder_decoder", False):
        raise UnknownModelError(f"{place}: {family}: an encoder with a decoder, whose layers are not known")
    decoder, layers = _decoder(model, text, f"{place}: {family}")
    return MetaModel(str(family), text, model, decoder, layers, place)


def _config_class(config: Mapping[str, Any], transformers: Any) -> Any:
    """Return transformers' class for the model_type, or else for a class of models that the configuration names."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    family = config.get("model_type")
    if isinstance(family, str) and family in CONFIG_MAPPING:
        return CONFIG_MAPPING[family]
    names = config.get("architectures")
    for name in names if isinstance(names, list) else ():
        found = getattr(transformers, name, None) if isinstance(name, str) else None
        if (kind := getattr(found, "config_class", None)) is not None:
            return kind
    return None


def _model_class(whole: Any, text: Any) -> tuple[Any, Any]:
    """Return the class of a decoder and the part of the configuration that it takes; None where there is no class."""
    from transformers.models.auto import modeling_auto

    chain = _chain(whole, text)
    for name in ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM"):
        mapping = getattr(modeling_auto, f"MODEL_FOR_{name}_MAPPING", {})
        for config in chain:
            if type(config) in mapping:
                return mapping[type(config)], config
    for config in chain:
        if type(config) in modeling_auto.MODEL_MAPPING:
            found = modeling_auto.MODEL_MAPPING[type(config)]
            return (found[0] if isinstance(found, tuple | list) else found), config
    return None, None


def _chain(whole: Any, text: Any) -> list[Any]:
    """Return the text part and the configurations that it is in, the innermost first."""
    if whole is text:
        return [text]
    for name in getattr(whole, "sub_configs", {}):
        part = getattr(whole, name, None)
        if part is not None and text in (chain := _chain(part, text)):
            return [*chain, whole]
    return [whole]


def _decoder(model: "nn.Module", text: Any, where: str) -> "tuple[nn.Module, list[nn.Module]]":
    """Return the list of decoder layers and what it is in: the list that has the experts, else the longest."""
    from torch import nn

    lists = {name: each for name, each in model.named_modules() if isinstance(each, nn.ModuleList)}
    outer = {name: each for name, each in lists.items() if not any(name.startswith(f"{other}.") for other in lists)}
    routed = [name for name, each in outer.items() if _expert_modules(each)]
    if len(routed) > 1:
        raise UnknownModelError(f"{where}: routed experts in {' and '.join(routed)}: which is the decoder is not known")
    want = getattr(text, "num_hidden_layers", None)
    names = routed or [name for name, each in outer.items() if len(each) == want]
    if not names:
        raise UnknownModelError(f"{where}: its decoder layers are not known")
    return model.get_submodule(names[0].rpartition(".")[0]), list(outer[names[0]])


def _expert_modules(root: "nn.Module") -> "list[tuple[str, nn.Module]]":
    """Return the modules that hold routed experts: parameters of three dimensions, of which the first counts them."""
    return [
        (name, module)
        for name, module in root.named_modules()
        if (_EXPERTS.search(type(module).__name__) or name.endswith(".experts") or name == "experts")
        and any(each.dim() == 3 for each in module.parameters(recurse=False))
    ]


def _block_of(layer: "nn.Module", name: str, where: str) -> str:
    """Return the innermost module around experts that says how many of them a token takes, else the one around them."""
    outer = name.rpartition(".")[0]
    while outer:
        if any(True for _ in _topk_values(layer.get_submodule(outer))):
            return outer
        outer = outer.rpartition(".")[0]
    if any(True for _ in _topk_values(layer)):
        return ""
    return re.sub(r"(^|\.)experts$", "", name.rpartition(".")[0])


def _topk_values(block: "nn.Module") -> Iterator[int]:
    for module in block.modules():
        for name in _ATTRIBUTES:
            if type(value := vars(module).get(name)) is int:
                yield value


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' remarks on a configuration to itself."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
