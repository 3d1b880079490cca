"""What megatron-bridge lacks: two families, and names of parameters of Megatron's own layers."""

import copy
from collections.abc import Container, Mapping
from typing import Any

from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge
from megatron.bridge.models.conversion.param_mapping import AutoMapping, GatedMLPMapping, QKVMapping, ReplicatedMapping
from megatron.core.models.gpt.gpt_model import GPTModel

from r3_adapter.errors import ReplayError

_HERE, _THERE = "decoder.layers.*.", "model.layers.*."

_OF_ALL = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
    _HERE + "self_attention.linear_qkv.layer_norm_weight": _THERE + "input_layernorm.weight",
    _HERE + "self_attention.linear_proj.weight": _THERE + "self_attn.o_proj.weight",
    _HERE + "pre_mlp_layernorm.weight": _THERE + "post_attention_layernorm.weight",
}


def _qkv(kind: str) -> Any:
    return QKVMapping(
        _HERE + f"self_attention.linear_qkv.{kind}", *(_THERE + f"self_attn.{name}_proj.{kind}" for name in "qkv")
    )


def _dense() -> list[Any]:
    """Map layers without experts, of families that have both kinds."""
    return [
        AutoMapping(_HERE + "mlp.linear_fc1.layer_norm_weight", _THERE + "post_attention_layernorm.weight"),
        GatedMLPMapping(
            _HERE + "mlp.linear_fc1.weight", _THERE + "mlp.gate_proj.weight", _THERE + "mlp.up_proj.weight"
        ),
        AutoMapping(_HERE + "mlp.linear_fc2.weight", _THERE + "mlp.down_proj.weight"),
    ]


def _experts(module: str, gate: str, up: str, down: str) -> list[Any]:
    expert = _THERE + module + ".experts.*."
    return [
        GatedMLPMapping(_HERE + "mlp.experts.linear_fc1.weight*", expert + gate + ".weight", expert + up + ".weight"),
        AutoMapping(_HERE + "mlp.experts.linear_fc2.weight*", expert + down + ".weight"),
    ]


def layer_pattern(hf: Any) -> list[int]:
    """Return 1 for each layer of experts, 0 for each dense one, as Qwen's configurations say it."""
    dense, step = set(hf.mlp_only_layers or ()), hf.decoder_sparse_step
    return [int(i not in dense and (i + 1) % step == 0) for i in range(hf.num_hidden_layers)]


class _RoutedGPT(MegatronModelBridge):  # type: ignore[misc]
    """What both families have in common."""

    def provider_bridge(self, hf_pretrained: Any) -> Any:
        provider = super().provider_bridge(hf_pretrained)
        hf = hf_pretrained.config
        if any(kind != "full_attention" for kind in getattr(hf, "layer_types", None) or ()) or hf.sliding_window:
            raise ReplayError(f"{hf.model_type}: attention in a sliding window is not translated")
        provider.normalization, provider.gated_linear_unit = "RMSNorm", True
        provider.add_bias_linear, provider.hidden_dropout = False, 0.0
        provider.kv_channels = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
        return provider


class MixtralBridge(_RoutedGPT):
    """Source: transformers/models/mixtral/modeling_mixtral.py@5.12.1."""

    def provider_bridge(self, hf_pretrained: Any) -> Any:
        provider = super().provider_bridge(hf_pretrained)
        provider.moe_ffn_hidden_size = hf_pretrained.config.intermediate_size
        # Softmax over all experts and renormalised: the same as softmax over the chosen ones.
        provider.moe_router_pre_softmax = False
        return provider

    def mapping_registry(self) -> Any:
        names = {**_OF_ALL, _HERE + "mlp.router.weight": _THERE + "block_sparse_moe.gate.weight"}
        return MegatronMappingRegistry(
            *(AutoMapping(*each) for each in names.items()),
            _qkv("weight"),
            *_experts("block_sparse_moe", "w1", "w3", "w2"),
        )


class Qwen2MoeBridge(_RoutedGPT):
    """Source: transformers/models/qwen2_moe/modeling_qwen2_moe.py@5.12.1."""

    def provider_bridge(self, hf_pretrained: Any) -> Any:
        provider, hf = super().provider_bridge(hf_pretrained), hf_pretrained.config
        provider.add_qkv_bias = hf.qkv_bias
        provider.moe_router_pre_softmax = not hf.norm_topk_prob
        provider.moe_shared_expert_intermediate_size = hf.shared_expert_intermediate_size
        provider.moe_shared_expert_gate = True
        provider.moe_layer_freq = layer_pattern(hf)
        return provider

    def mapping_registry(self) -> Any:
        shared = _THERE + "mlp.shared_expert."
        names = {
            **_OF_ALL,
            _HERE + "mlp.router.weight": _THERE + "mlp.gate.weight",
            _HERE + "mlp.shared_experts.linear_fc2.weight": shared + "down_proj.weight",
        }
        return MegatronMappingRegistry(
            *(AutoMapping(*each) for each in names.items()),
            _qkv("weight"),
            _qkv("bias"),
            GatedMLPMapping(
                _HERE + "mlp.shared_experts.linear_fc1.weight", shared + "gate_proj.weight", shared + "up_proj.weight"
            ),
            ReplicatedMapping(_HERE + "mlp.shared_experts.gate_weight", _THERE + "mlp.shared_expert_gate.weight"),
            *_dense(),
            *_experts("mlp", "gate_proj", "up_proj", "down_proj"),
        )


def register() -> None:
    """Tell megatron-bridge of our families, and of our modules: attention has a part of the heads as its own has."""
    for name, kind, made in (
        ("MixtralForCausalLM", "mixtral", MixtralBridge),
        ("Qwen2MoeForCausalLM", "qwen2_moe", Qwen2MoeBridge),
    ):
        MegatronModelBridge.register_bridge(source=name, target=GPTModel, model_type=kind)(made)
    AutoMapping.register_module_type("LocalAttention", "column")
    AutoMapping.register_module_type("DuplicatedLinear", "replicated")


def _whole_norm(mapping: Any) -> Any:
    """Return what maps the norms of all heads together, which our layers have whole on each rank."""
    if type(mapping).__name__ == "_FullDimQKNormMapping":
        return ReplicatedMapping(mapping.megatron_param, mapping.hf_param)
    return mapping


def prepare(converter: Any) -> None:
    """Give a converter names for experts that are modules of their own, and for the dense layers of Qwen3-MoE."""
    made = converter.mapping_registry

    def mapping_registry() -> Any:
        mappings = [_whole_norm(mapping) for mapping in made()]
        if converter.MODEL_TYPE == "qwen3_moe":
            mappings += _dense()
        known = {mapping.megatron_param for mapping in mappings}
        for mapping in tuple(mappings):
            for kind in ("weight", "bias"):
                for part in ("linear_fc1", "linear_fc2"):
                    grouped = f"mlp.experts.{part}.{kind}*"
                    alone = mapping.megatron_param.removesuffix(grouped) + f"mlp.experts.local_experts.*.{part}.{kind}"
                    if mapping.megatron_param.endswith(grouped) and alone not in known:
                        other = copy.copy(mapping)
                        other.megatron_param = alone
                        mappings.append(other)
        return MegatronMappingRegistry(*mappings)

    converter.mapping_registry = mapping_registry


_WRITTEN: Mapping[str, str] = {"backbone.embeddings.weight": "backbone.embedding.weight"}
"""Published names of tensors, and what transformers writes them as.

Source: transformers/conversion_mapping.py@5.12.1: "nemotron_h".
"""


def use_names(converter: Any, names: Container[str]) -> None:
    """Let a converter call tensors as a checkpoint does, where transformers writes them under a name of its own."""
    made = converter.mapping_registry

    def mapping_registry() -> Any:
        mappings = list(made())
        for at, mapping in enumerate(mappings):
            other = _WRITTEN.get(mapping.hf_param) if isinstance(mapping.hf_param, str) else None
            if other is not None and other in names and mapping.hf_param not in names:
                mappings[at] = copy.copy(mapping)
                mappings[at].hf_param = other
        return MegatronMappingRegistry(*mappings)

    if any(name in names for name in _WRITTEN.values()):
        converter.mapping_registry = mapping_registry
