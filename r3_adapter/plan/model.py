"""What a checkpoint's config.json says about sizes: parameters, and what a rank of a layout holds of them.

All sizes are those of transformers' own modules, built without memory; see sglang/meta_model.py.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from r3_adapter.errors import LayoutError, UnknownModelError
from r3_adapter.layout import ParallelLayout
from r3_adapter.sglang.meta_model import TOPK_NAMES, MetaModel, meta_model
from r3_adapter.sglang.moe_config import MoEConfig, read_config

if TYPE_CHECKING:
    from torch import nn

_CACHED = ("full_attention", "attention", "sliding_attention", "chunked_attention")
_STATES = ("linear_attention", "mamba", "conv")
_BARE = ("moe", "mlp")
"""Kinds of layers in transformers' layer_types: with keys and values of each token, with a state, without either."""
_WINDOWED = ("sliding_attention", "chunked_attention")
_LATENTS = ("q_a_proj", "kv_a_proj_with_mqa", "q_a_proj_with_mqa")
"""Projections to a latent, which tensor parallelism does not cut."""


class Parameters(NamedTuple):
    """Parameters of a rank: what every data-parallel rank has a copy of, and routed experts."""

    dense: int
    expert: int


class LayerShape(NamedTuple):
    """A decoder layer: parameters that tensor parallelism cuts, does not cut, and those of its routed experts.

    kv_size: numbers that a token has in its KV cache, of all key-value heads or of the latent; 0 without a cache.
    """

    split: int
    whole: int
    experts: int
    kv_size: int


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder with routed experts.

    family: model_type of the configuration.
    moe: its layers and routers.
    num_kv_heads: None under multi-head latent attention, where all ranks have the one latent.
    layers: of each decoder layer.
    embedding, output: parameters of the input's and of the output's table; the last norm's are `norm`.
    ffn_size, expert_ffn_size, shared_ffn_size: inner sizes of dense layers, of a routed expert and of all shared ones;
        0 where there are none.
    num_windowed, num_states: layers that see a window of tokens only, and ones with a state in place of a KV cache.
    num_mtp_layers: multi-token prediction layers, which are not part of the figures.
    """

    family: str
    moe: MoEConfig
    hidden_size: int
    num_heads: int
    num_kv_heads: int | None
    layers: tuple[LayerShape, ...]
    embedding: int
    norm: int
    output: int
    ffn_size: int
    expert_ffn_size: int
    shared_ffn_size: int
    vocab_size: int
    max_length: int | None
    tied: bool
    num_windowed: int
    num_states: int
    num_mtp_layers: int
    dtype_size: int

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, place: str = "config") -> "ModelShape":
        """Read a Hugging Face configuration; of a multimodal model, its text part.

        Raises:
            UnknownModelError: a family whose layers or sizes are not known; names `place`.
            R3Error: the configuration is none, or of a dense model, or misses a size.
        """
        _check_sizes(config, place)
        model = meta_model(config, place)
        moe, text = MoEConfig.from_modules(model), model.config
        layers = [_layer(model, at) for at in range(moe.num_layers)]
        root: Any = model.model
        table, head = root.get_input_embeddings(), root.get_output_embeddings()
        tied = bool(text.tie_word_embeddings) if head is None else head.weight is table.weight
        embedding, norm = _outside(model)
        kinds = [_kind(model, at) for at in range(moe.num_layers)]
        dense = [at for at in range(moe.num_layers) if at not in moe.layer_ids]
        heads = _config_size(model, "num_attention_heads")
        latent = any(name.endswith("kv_a_proj_with_mqa") for name, _ in model.decoder.named_modules())
        dtype = str(getattr(text, "dtype", None) or "bfloat16").removeprefix("torch.")
        return cls(
            family=model.family,
            moe=moe,
            hidden_size=_config_size(model, "hidden_size"),
            num_heads=heads,
            num_kv_heads=None if latent else int(getattr(text, "num_key_value_heads", None) or heads),
            layers=tuple(layers),
            embedding=embedding,
            norm=norm,
            output=head.weight.numel() if head is not None else table.weight.numel(),
            ffn_size=max((_inner_size(model.layers[at], "") for at in dense), default=0),
            expert_ffn_size=_expert_size(model, moe),
            shared_ffn_size=_inner_size(model.layers[moe.layer_ids[-1]], "shared"),
            vocab_size=_config_size(model, "vocab_size"),
            max_length=getattr(text, "max_position_embeddings", None),
            tied=tied,
            num_windowed=sum(kind in _WINDOWED for kind in kinds),
            num_states=sum(kind in _STATES for kind in kinds),
            num_mtp_layers=int(getattr(text, "num_nextn_predict_layers", None) or 0),
            dtype_size=4 if dtype == "float32" else 2,
        )

    @classmethod
    def from_file(cls, path: Path) -> "ModelShape":
        """Read config.json, or the one in a checkpoint's folder.

        Raises:
            R3Error: it cannot be read, or says too little.
        """
        path = path / "config.json" if path.is_dir() else path
        return cls.from_config(read_config(path), place=str(path))

    @property
    def num_moe_layers(self) -> int:
        return len(self.moe.layer_ids)

    def num_parameters(self) -> int:
        """Return the parameters of the whole model, without multi-token prediction layers."""
        return sum(self.rank_parameters(range(self.moe.num_layers), ParallelLayout(), first=True, last=True))

    def rank_parameters(self, layers: Sequence[int], layout: ParallelLayout, *, first: bool, last: bool) -> Parameters:
        """Return what a rank holds that has these decoder layers.

        first, last: whether its pipeline stage has the embedding, and the final norm and the output layer.
        """
        tp, etp, own = layout.tp, layout.etp, [self.layers[at] for at in layers]
        assert etp is not None
        dense = sum(_share(each.split, tp) + each.whole for each in own)
        dense += _share(self.embedding, tp) if first else 0
        # A tied output layer is a copy of the embedding where another stage has that.
        dense += self.norm + (0 if self.tied and first else _share(self.output, tp)) if last else 0
        experts, num = _share(self.moe.num_experts, layout.ep), self.moe.num_experts
        return Parameters(dense, sum(experts * _share(each.experts // num, etp) for each in own))

    def kv_size(self, layers: Sequence[int], heads: int) -> int:
        """Return the numbers that a token has in the KV cache of these layers, on each of `heads` ranks."""
        parts = 1 if self.num_kv_heads is None else min(heads, self.num_kv_heads)
        return sum(_share(self.layers[at].kv_size, parts) for at in layers)


def _layer(model: MetaModel, at: int) -> LayerShape:
    layer, mlp = model.layers[at], model.moe_layer(at)
    names = mlp.expert_parameters if mlp is not None else frozenset[str]()
    num = mlp.num_experts if mlp is not None else 0
    split = whole = experts = 0
    for name, each in layer.named_parameters():
        if name in names:
            experts += each.numel()
        elif each.dim() == 1 or 1 in each.shape or _is_uncut(name, each, num):
            whole += each.numel()
        else:
            split += each.numel()
    return LayerShape(split, whole, experts, _cached(model, at))


def _is_uncut(name: str, weight: Any, num_experts: int) -> bool:
    """Tell whether a weight is a router's or a projection to a latent, which every rank has whole."""
    router = num_experts and weight.shape[0] == num_experts and "attn" not in name
    return bool(router) or any(f"{latent}." in name for latent in _LATENTS)


def _kind(model: MetaModel, at: int) -> str:
    config: Any = model.config
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    if kinds is None:
        return "full_attention"
    if len(kinds) != len(model.layers):
        raise UnknownModelError(
            f"{model.place}: {model.family}: {len(kinds)} layer_types != {len(model.layers)} layers"
        )
    if kinds[at] not in (*_CACHED, *_STATES, *_BARE):
        raise UnknownModelError(
            f"{model.place}: {model.family}: layer {at}: the KV cache of {kinds[at]!r} is not known"
        )
    return str(kinds[at])


def _cached(model: MetaModel, at: int) -> int:
    """Return the numbers that a layer caches of a token: the outputs of its projections to keys and values."""
    if _kind(model, at) in (*_STATES, *_BARE):
        return 0
    where, total = f"{model.place}: {model.family}: layer {at}", 0
    for name, module in model.layers[at].named_modules():
        children = dict(module.named_children())
        if "ndexer" in type(module).__name__ or "indexer" in children:
            raise UnknownModelError(f"{where}: the cache of {name}, which picks tokens by an index, is not known")
        if "kv_a_proj_with_mqa" in children:
            total += children["kv_a_proj_with_mqa"].out_features
        elif {"k_proj", "v_proj"} <= children.keys():
            total += children["k_proj"].out_features + children["v_proj"].out_features
    if not total or getattr(model.config, "num_kv_shared_layers", None):
        raise UnknownModelError(f"{where}: the KV cache of its attention is not known")
    return total


def _outside(model: MetaModel) -> tuple[int, int]:
    """Return the parameters beside the layers: of the embedding and what is with it, and of the last norm."""
    ours = {id(each) for layer in model.layers for each in layer.parameters()}
    rest = {name: each for name, each in model.decoder.named_parameters() if id(each) not in ours}
    norm = sum(each.numel() for each in rest.values() if each.dim() == 1)
    return sum(each.numel() for each in rest.values()) - norm, norm


def _inner_size(layer: "nn.Module", part: str) -> int:
    """Return the inner size of a layer's dense or shared network: the inputs of its projection back; 0 without one."""
    names = ("down_proj", "w2", "fc2", "output_linear")
    found = [
        each.in_features
        for name, each in layer.named_modules()
        if name.rpartition(".")[2] in names and part in name and hasattr(each, "in_features")
    ]
    return max(found, default=0)


def _expert_size(model: MetaModel, moe: MoEConfig) -> int:
    """Return the inner size of a routed expert: its smallest dimension beside the hidden one."""
    experts = model.moe_layer(moe.layer_ids[0])
    assert experts is not None
    hidden, layer = _config_size(model, "hidden_size"), dict(model.layers[moe.layer_ids[0]].named_parameters())
    found = set()
    for name in experts.expert_parameters:
        shape = list(layer[name].shape[1:])
        if layer[name].dim() == 3 and hidden in shape:
            shape.remove(hidden)
            found.add(shape[0])
    if not found:
        raise UnknownModelError(f"{model.place}: {model.family}: the inner size of an expert is not known")
    return int(min(found))


def _check_sizes(config: Mapping[str, Any], place: str) -> None:
    """Refuse sizes that no model has, and a configuration that leaves one out: a family's default is seldom meant."""
    given = dict(_leaves(config))
    for name in ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size"):
        if name in given and (type(given[name]) is not int or given[name] < 1):
            raise LayoutError(f"{place}: {name} ({given[name]!r}) is not a whole number from 1")
    for names in (("hidden_size",), ("vocab_size",), TOPK_NAMES):
        if not any(given.get(name) is not None for name in names):
            raise LayoutError(f"{place}: no {' or '.join(names)} is given")


def _leaves(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the values of a configuration and of the parts in it; those of its text part last."""
    if not isinstance(config, Mapping):
        return
    for name, value in sorted(config.items(), key=lambda item: item[0] in ("thinker_config", "text_config")):
        yield name, value
        if isinstance(value, Mapping):
            yield from _leaves(value)


def _config_size(model: MetaModel, name: str) -> int:
    value = getattr(model.config, name, None)
    if type(value) is not int or value < 1:
        raise LayoutError(f"{model.place}: {name} ({value!r}) is not a whole number from 1")
    return value


def _share(number: int, parts: int) -> int:
    return -(-number // parts)


def windows(shape: ModelShape) -> Iterator[str]:
    """Yield what a plan leaves out of a cache that is not one of all tokens in all layers."""
    if shape.num_windowed:
        yield f"{shape.num_windowed} layers see a window of tokens; they are counted as if they cached all of them."
    if shape.num_states:
        yield f"{shape.num_states} layers have a state in place of a KV cache, which comes on top of what is counted."
