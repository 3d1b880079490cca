"""A tiny hybrid model of real Megatron, for programs that tests start; Mamba layers are stood for by linear ones.

T: tokens; M: MoE layers; K: experts a token; E: experts of a layer.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import megatron_tiny as tiny
import numpy as np
import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.ssm.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import multi_token_prediction as mtp
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.moe import moe_layer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_layer import (
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)

from r3_adapter.megatron.bridge.layers import mlp_spec, self_attention_spec
from r3_adapter.trace import ModelId, RoutingTrace

try:
    from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
    from megatron.core.models.hybrid.hybrid_model import HybridModel

    NAMED = True
except ImportError:  # Up to 0.17, without multi-token prediction, chunks of a stage and recomputation of whole layers.
    from megatron.core.models.mamba import MambaModel as HybridModel
    from megatron.core.ssm.mamba_block import MambaStack as HybridStack
    from megatron.core.ssm.mamba_block import MambaStackSubmodules as HybridStackSubmodules

    NAMED = False

BLOCKS, PAIRS = "ME*E-M*E", "*-*EME*E"
"""One letter a layer of Hugging Face's, as Nemotron-H has; two letters a layer, as a GPTModel that was moved over."""
GATED, GATED_LETTERS = "gated", "GE*EGE"
"""A GPTModel with gated delta nets in three of four layers, as Qwen3-Next is; a hybrid model with some."""
LATENT = 16
DELTA_NET = {
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "deterministic_mode": True,
}


class Linear(torch.nn.Module):
    """A layer that takes neither a padding mask nor routes, as one of Mamba does."""

    def __init__(self, config: Any, layer_number: int, **_: Any) -> None:
        super().__init__()
        self.layer_number, self.linear = layer_number, torch.nn.Linear(config.hidden_size, config.hidden_size)
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: Any = None,
        inference_context: Any = None,
        packed_seq_params: Any = None,
        rotary_pos_emb: Any = None,
    ) -> torch.Tensor:
        return hidden_states + self.linear(hidden_states)


class Projection(torch.nn.Linear):
    """In place of TransformerEngine's layer around latent experts, which computes the same."""

    def __init__(self, size: int, out: int, **_: Any) -> None:
        super().__init__(size, out, bias=False)

    def forward(self, input: torch.Tensor) -> Any:
        return super().forward(input), None


def _mtp_spec() -> ModuleSpec:
    names = {field.name for field in dataclasses.fields(mtp.MultiTokenPredictionLayerSubmodules)}
    inner = {"mtp_model_layer", "transformer_layer"} & names
    layer = mtp.MultiTokenPredictionLayerSubmodules(
        enorm=WrappedTorchNorm,
        hnorm=WrappedTorchNorm,
        eh_proj=ColumnParallelLinear,
        layer_norm=WrappedTorchNorm,
        **dict.fromkeys(inner),
    )
    layers = [ModuleSpec(module=mtp.MultiTokenPredictionLayer, submodules=layer)]
    return ModuleSpec(
        module=mtp.MultiTokenPredictionBlock,
        submodules=mtp.MultiTokenPredictionBlockSubmodules(layer_specs=layers),
    )


def _delta_net() -> ModuleSpec:
    parts = {"in_proj": ColumnParallelLinear, "out_norm": WrappedTorchNorm, "out_proj": RowParallelLinear}
    return ModuleSpec(module=GatedDeltaNet, submodules=GatedDeltaNetSubmodules(**parts))


def _spec() -> ModuleSpec:
    experts = get_moe_module_spec(use_te=False, num_experts=tiny.EXPERTS, moe_grouped_gemm=False)

    def layer(kind: type, **parts: Any) -> ModuleSpec:
        return ModuleSpec(module=kind, submodules=TransformerLayerSubmodules(**parts))

    before = {"input_layernorm": WrappedTorchNorm, "self_attn_bda": get_bias_dropout_add}
    behind = {"pre_mlp_layernorm": WrappedTorchNorm, "mlp_bda": get_bias_dropout_add}
    return ModuleSpec(
        module=HybridStack,
        params={"post_layer_norm": False},
        submodules=HybridStackSubmodules(
            mamba_layer=ModuleSpec(module=Linear),
            attention_layer=layer(TransformerLayer, self_attention=self_attention_spec(DotProductAttention), **before),
            mlp_layer=layer(TransformerLayer, mlp=mlp_spec(), **behind),
            moe_layer=layer(MoETransformerLayer, mlp=experts, **behind),
            **(
                {
                    "mtp_block_spec": _mtp_spec(),
                    "gdn_layer": layer(TransformerLayer, self_attention=_delta_net(), **before),
                }
                if NAMED
                else {}
            ),
        ),
    )


def build(pattern: str, *, pre: bool = True, post: bool = True, vp_stage: int | None = None, **options: Any) -> Any:
    """Build the chunk of a pattern that this rank has; the same weights each time.

    pre, post: whether it has the embedding, and the output layer.
    """
    torch.manual_seed(7)
    model_parallel_cuda_manual_seed(7)
    if pattern == GATED:
        return _build_gated(**options)
    if "G" in pattern:
        options = {**DELTA_NET, **options}
    if options.get("moe_latent_size"):
        moe_layer.HAVE_TE, moe_layer.TELinear = True, Projection
    config = tiny.configure(
        len(pattern.partition("/")[0].replace("|", "")),
        mtp_num_layers=pattern.count("/") or None,
        is_hybrid_model=True,
        **options,
    )
    names = ("hybrid_stack_spec", "hybrid_layer_pattern") if NAMED else ("mamba_stack_spec", "hybrid_override_pattern")
    model = HybridModel(
        config=config,
        vocab_size=tiny.VOCAB,
        max_sequence_length=tiny.SEQ,
        position_embedding_type="rope",
        pre_process=pre,
        post_process=post,
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        **dict(zip(names, (_spec(), pattern), strict=True)),
        **({"vp_stage": vp_stage} if NAMED else {}),
    ).train()
    return _sharpened(model)


def _build_gated(**options: Any) -> Any:
    """Build the GPTModel of `GATED`; Megatron's own spec of it wants TransformerEngine."""
    shared = {"moe_shared_expert_intermediate_size": 16, "moe_shared_expert_gate": True, "attention_output_gate": True}
    kind = {"experimental_attention_variant": "gated_delta_net", "linear_attention_freq": 4}
    config = tiny.configure(4, **kind, **DELTA_NET, **shared, **options)
    # It refuses the attention that takes the place of its own.
    spec = get_gpt_decoder_block_spec(tiny.configure(4, **shared, **options), use_transformer_engine=False)
    for at, layer in enumerate(spec.layer_specs):
        if at < 3:
            parts = dataclasses.replace(layer.submodules, self_attention=_delta_net())
            spec.layer_specs[at] = ModuleSpec(module=layer.module, submodules=parts)
    return _sharpened(GPTModel(config, spec, tiny.VOCAB, tiny.SEQ, position_embedding_type="rope").train())


def _sharpened(model: torch.nn.Module) -> torch.nn.Module:
    """Let routers differ more between tokens than fresh ones do."""
    for name, module in model.named_modules():
        if name.endswith(".router"):
            module.weight.data.mul_(10)
    return model


def moe_letters(pattern: str) -> list[int]:
    """Return the numbers of the MoE layers of a pattern, from 0."""
    if pattern == GATED:
        return [0, 1, 2, 3]
    letters = pattern.partition("/")[0].replace("|", "")
    return [at for at, letter in enumerate(letters) if letter == "E"]


def ids_at(sample: int, position: int, moe_layer: int) -> list[int]:
    """Return the two experts of a token in a MoE layer; no other layer has the same of any token in a sample."""
    first = (5 * sample + 3 * position + moe_layer) % tiny.EXPERTS
    return sorted([first, (first + 1 + moe_layer) % tiny.EXPERTS])


def make_traces(
    tokens: torch.Tensor, layers: Sequence[int], first: int = 0, model: ModelId | None = None
) -> list[RoutingTrace]:
    """Return the traces of a micro-batch. layers: of the MoE layers. first: the number of its first sample."""
    found = []
    for sample, row in enumerate(tokens.numpy().astype(np.int32), start=first):
        ids = [[ids_at(sample, at, moe) for moe in range(len(layers))] for at in range(len(row))]
        versions, numbers = np.zeros(len(row), np.int32), np.array(layers, np.int32)
        trace = RoutingTrace(np.array(ids, np.uint8), row, versions, numbers, tiny.EXPERTS, ("v",), model)
        found.append(trace)
    return found
