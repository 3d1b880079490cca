"""Layers of a provider's model: of TransformerEngine's modules or, without it, of Megatron's own."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from r3_adapter.errors import ReplayError, show
from r3_adapter.layout import ParallelLayout


def use_layers(model_type: str, provider: Any, *, contiguous: bool) -> None:
    """Let a provider build its layers of TransformerEngine's modules or, without it, of Megatron's own.

    Raises:
        ReplayError: layers that are only to be had with TransformerEngine, or not for this cut of context parallelism.
    """
    from megatron.bridge.models.gpt_provider import default_layer_spec
    from megatron.core.models.gpt.gpt_layer_specs import HAVE_TE, get_gpt_decoder_block_spec

    theirs = getattr(provider, "transformer_layer_spec", None)
    hybrid = hasattr(provider, "hybrid_stack_spec")
    delta_nets = getattr(provider, "experimental_attention_variant", None) == "gated_delta_net"
    adapt = _adapt(provider, theirs)
    plain = theirs is default_layer_spec or getattr(theirs, "func", None) is get_gpt_decoder_block_spec or adapt
    name = getattr(theirs, "__name__", type(provider).__name__)
    if not plain and contiguous:
        raise ReplayError(f"{model_type}: cp_cut 'contiguous' does not work with its layers ({name})")
    if not plain and HAVE_TE:
        return
    if hybrid:
        provider.hybrid_stack_spec = _local_hybrid_stack()
        return
    if not plain and not delta_nets:
        raise ReplayError(f"{model_type}: its layers ({name}) need TransformerEngine, which is not installed")
    attention = _core_attention(model_type, provider, contiguous=contiguous)

    def make(config: Any, vp_stage: int | None = None) -> Any:
        # Megatron's own refuses the attention that takes the place of its own in some layers.
        same = copy.copy(config)
        same.experimental_attention_variant = None
        spec = get_gpt_decoder_block_spec(same, use_transformer_engine=HAVE_TE, vp_stage=vp_stage)
        for layer in spec.layer_specs:
            here = layer.submodules.self_attention
            if adapt is not None:
                adapt(here)
            if attention is not None:
                here.submodules.core_attention = attention
        if delta_nets:
            _put_delta_nets(spec, config, vp_stage)
        return spec

    provider.transformer_layer_spec = make


def _put_delta_nets(spec: Any, config: Any, vp_stage: int | None) -> None:
    """Give the layers of a stage whose attention is linear a gated delta net of Megatron's own modules.

    Source: megatron/core/models/gpt/experimental_attention_variant_module_specs.py@0.19.2.
    """
    from megatron.core.models.gpt.experimental_attention_variant_module_specs import get_linear_attention_pattern
    from megatron.core.ssm.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.enums import LayerType
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    parts = {"in_proj": ColumnParallelLinear, "out_norm": WrappedTorchNorm, "out_proj": RowParallelLinear}
    net = ModuleSpec(module=GatedDeltaNet, submodules=GatedDeltaNetSubmodules(**parts))
    pattern, layout = get_linear_attention_pattern(config), config.pipeline_model_parallel_layout
    if layout is not None:
        layers = layout.get_layer_id_list(layer_type=LayerType.decoder, vp_stage=vp_stage)
    else:
        first = get_transformer_layer_offset(config, vp_stage=vp_stage)
        layers = range(first, first + len(spec.layer_specs))
    for at, layer in enumerate(layers):
        if pattern[layer]:
            here = spec.layer_specs[at]
            spec.layer_specs[at] = replace(here, submodules=replace(here.submodules, self_attention=net))


def _local_hybrid_stack() -> Any:
    """Return the layers of a HybridModel, of Megatron's own modules.

    Source: megatron/core/models/hybrid/hybrid_layer_specs.py@0.19.2:hybrid_stack_spec.

    Raises:
        ReplayError: there is a GPU; a mixer of Mamba in plain torch is for machines without one.
    """
    if torch.cuda.is_available():
        raise ReplayError("a HybridModel needs TransformerEngine, which is not installed")
    from r3_adapter.megatron import cpu

    cpu.install_hybrid()
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
    from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
    from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_layer import (
        MoETransformerLayer,
        TransformerLayer,
        TransformerLayerSubmodules,
    )

    from r3_adapter.megatron.attention import LocalAttention

    def layer(kind: type, **parts: Any) -> Any:
        return ModuleSpec(module=kind, submodules=TransformerLayerSubmodules(**parts))

    mixer = ModuleSpec(
        module=MambaMixer, submodules=MambaMixerSubmodules(in_proj=ColumnParallelLinear, out_proj=RowParallelLinear)
    )
    # How many experts a layer has, its configuration says.
    experts = get_moe_module_spec(use_te=False, num_experts=8, moe_grouped_gemm=False)
    behind = {"pre_mlp_layernorm": WrappedTorchNorm, "mlp_bda": get_bias_dropout_add}
    return ModuleSpec(
        module=HybridStack,
        submodules=HybridStackSubmodules(
            mamba_layer=ModuleSpec(
                module=MambaLayer,
                submodules=MambaLayerSubmodules(norm=WrappedTorchNorm, mixer=mixer, mamba_bda=get_bias_dropout_add),
            ),
            attention_layer=layer(
                TransformerLayer,
                input_layernorm=WrappedTorchNorm,
                self_attention=self_attention_spec(LocalAttention),
                self_attn_bda=get_bias_dropout_add,
            ),
            mlp_layer=layer(TransformerLayer, mlp=mlp_spec(), **behind),
            moe_layer=layer(MoETransformerLayer, mlp=experts, **behind),
        ),
    )


def check_hybrid(hf: Any, layout: ParallelLayout) -> None:
    """Refuse what Megatron's HybridModel or its mixers of Mamba take for granted of a config.json.

    Raises:
        ReplayError: names the field.
    """
    if layout.vpp > 1:
        raise ReplayError(f"{hf.model_type}: vpp ({layout.vpp}) != 1: megatron-bridge builds hybrid models whole")
    wanted: Mapping[str, Any] = {
        "mamba_hidden_act": "silu",
        "mlp_hidden_act": "relu2",
        "conv_kernel": 4,
        "layer_norm_epsilon": 1e-5,
        "use_conv_bias": True,
        "use_bias": False,
        "mamba_proj_bias": False,
        "mlp_bias": False,
        "attention_bias": False,
        "sliding_window": None,
        "time_step_limit": (0.0, float("inf")),
    }
    for name, want in wanted.items():
        found = getattr(hf, name)
        if (tuple(found) if isinstance(found, list) else found) != want:
            raise ReplayError(f"{hf.model_type}: {name} {show(found)} != {show(want)}, which Megatron has")


def _adapt(provider: Any, theirs: Any) -> Callable[[Any], None] | None:
    """Return what changes the attention of Megatron's layers into a family's own; None where there is nothing to."""
    from r3_adapter.megatron.bridge import attention as ours

    if getattr(theirs, "__name__", "") in ("olmoe_layer_spec", "minimax_m2_layer_spec"):

        def norm_heads(attention: Any) -> None:
            attention.submodules.q_layernorm, attention.submodules.k_layernorm = ours.QueriesNorm, ours.KeysNorm

        return norm_heads
    if getattr(provider, "multi_latent_attention", False) and provider.q_lora_rank is None:
        return lambda attention: setattr(attention, "module", ours.PlainQueryAttention)
    return None


def _core_attention(model_type: str, provider: Any, *, contiguous: bool) -> Any:
    from megatron.core.models.gpt.gpt_layer_specs import HAVE_TE

    from r3_adapter.megatron.attention import LocalAttention, contiguous_attention

    if not contiguous:
        return None if HAVE_TE else LocalAttention
    if (provider.position_embedding_type, provider.rotary_percent) != ("rope", 1.0) or provider.multi_latent_attention:
        raise ReplayError(f"{model_type}: cp_cut 'contiguous' is for plain rotary embeddings of whole heads alone")
    provider.position_embedding_type = "none"
    return contiguous_attention(provider.rotary_base)


def self_attention_spec(core_attention: type) -> Any:
    """Return the spec of Megatron's own self-attention, with a causal mask, around a core."""
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.spec_utils import ModuleSpec

    parts = {"linear_qkv": ColumnParallelLinear, "core_attention": core_attention, "linear_proj": RowParallelLinear}
    mask = {"attn_mask_type": AttnMaskType.causal}
    return ModuleSpec(module=SelfAttention, params=mask, submodules=SelfAttentionSubmodules(**parts))


def mlp_spec() -> Any:
    """Return the spec of Megatron's own dense MLP."""
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLP, MLPSubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec

    parts = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    return ModuleSpec(module=MLP, submodules=parts)
