"""Model chunks of this rank, as megatron-bridge translates a config.json."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch

from r3_adapter.errors import ReplayError
from r3_adapter.layout import ParallelLayout
from r3_adapter.megatron.bridge.layers import check_hybrid, use_layers
from r3_adapter.megatron.bridge.library import converter, hf_config
from r3_adapter.megatron.policy_trainer.options import TrainerOptions


def build_chunks(
    config: Mapping[str, Any], layout: ParallelLayout, options: TrainerOptions, run: Mapping[str, Any]
) -> list[torch.nn.Module]:
    """Build this rank's model chunks (one without VPP) of a checkpoint's config.json; the weights are random.

    run: fields of Megatron's configuration that come from layout and options, not from the checkpoint.

    Raises:
        ReplayError: an architecture that is not known, or a part of it that has no module on this machine.
    """
    made, hf = converter(config), hf_config(config)
    try:
        provider = made.provider_bridge(SimpleNamespace(config=hf))
    except AttributeError as error:
        raise ReplayError(f"{hf.model_type}: megatron-bridge does not translate its config.json: {error}") from error
    if hf.model_type == "nemotron_h":
        check_hybrid(hf, layout)
    _translate_rest(hf, provider)
    from megatron.core.transformer.enums import AttnBackend

    fields = {name: value for name, value in _OURS.items() if hasattr(provider, name)}
    # It is said to TransformerEngine by environment variables, which the next model of a process may not say otherwise.
    fields["attention_backend"] = AttnBackend.auto
    for name, value in {**fields, **run, **options.megatron_arguments}.items():
        if not hasattr(provider, name):
            raise ReplayError(f"{name}: {type(provider).__name__} has no such field")
        setattr(provider, name, value)
    use_layers(str(hf.model_type), provider, contiguous=options.cp_cut == "contiguous" and layout.cp > 1)
    from megatron.core.process_groups_config import ProcessGroupCollection

    provider._pg_collection = ProcessGroupCollection.use_mpu_process_groups()
    try:
        provider.finalize()
    except (AssertionError, ValueError) as error:
        raise ReplayError(f"{hf.model_type}: Megatron refuses its configuration: {error}") from error
    vp_stages = range(layout.vpp) if layout.vpp > 1 else [None]
    return [provider.provide(vp_stage=stage).to(torch.cuda.current_device()) for stage in vp_stages]


_OURS: Mapping[str, Any] = {
    "mtp_num_layers": None,
    "mtp_hybrid_override_pattern": None,
    "mtp_use_repeated_layer": False,
    "keep_mtp_spec_in_bf16": False,
    "moe_router_load_balancing_type": "none",
    "moe_aux_loss_coeff": 0.0,
    "moe_z_loss_coeff": None,
    "moe_shared_expert_overlap": False,
    "moe_grouped_gemm": False,
    "moe_permute_fusion": False,
    "cross_entropy_loss_fusion": False,
    "autocast_dtype": None,
    "fp16": False,
    "first_last_layers_bf16": False,
}
"""What providers say beyond the architecture, as they would train it."""


def _translate_rest(hf: Any, provider: Any) -> None:
    """Say what megatron-bridge takes for granted of a config.json, or leaves out.

    Raises:
        ReplayError: a feature that is not translated.
    """
    rope = getattr(hf, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "yarn"):
        raise ReplayError(f"{hf.model_type}: rope {kind!r} is none of 'default', 'yarn'")
    if hasattr(hf, "decoder_sparse_step"):
        from r3_adapter.megatron.bridge.families import layer_pattern

        provider.moe_layer_freq = layer_pattern(hf)
    normalised = getattr(hf, "norm_topk_prob", None)
    if provider.moe_router_score_function == "softmax" and normalised is not None:
        if hf.model_type == "deepseek_v2" and normalised:
            raise ReplayError("deepseek_v2: norm_topk_prob=True, which transformers leaves out, is not translated")
        provider.moe_router_pre_softmax = not normalised
    elif normalised is False:
        raise ReplayError(f"{hf.model_type}: norm_topk_prob=False: Megatron normalises the scores of a sigmoid")
    groups, chosen = (getattr(hf, name, None) or 1 for name in ("n_group", "topk_group"))
    # Megatron ranks groups by their best K / chosen experts together, transformers by two, or one in DeepSeek-V2.
    if groups > 1 and hf.num_experts_per_tok // chosen != (1 if hf.model_type == "deepseek_v2" else 2):
        num = hf.num_experts_per_tok
        raise ReplayError(f"{hf.model_type}: {num} experts of {chosen} groups: Megatron ranks groups otherwise")
    if hf.model_type == "gpt_oss":
        if kind != "yarn":
            raise ReplayError(f"gpt_oss: rope {kind!r} != 'yarn'")
        if hf.hidden_size == 2 * hf.intermediate_size:
            # megatron-bridge tells by its shape which way round a tensor lies, and would transpose a square one.
            raise ReplayError(f"gpt_oss: hidden_size {hf.hidden_size} == 2 * intermediate_size: it may lie either way")
        provider.yarn_rotary_scaling_factor = rope["factor"]
        provider.yarn_original_max_position_embeddings = rope["original_max_position_embeddings"]
        provider.yarn_beta_fast, provider.yarn_beta_slow = rope["beta_fast"], rope["beta_slow"]
        provider.yarn_correction_range_round_to_int = rope["truncate"]
