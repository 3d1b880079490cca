"""Every field of Megatron's TransformerConfig and ModelParallelConfig: allowed, allowed and tested, or refused and why.

A field matters to replay if it changes which tokens a rank's MoE layers have, their order, which experts a token goes
to, or whether the argument gets to the routers. A release with a new field fails a test until somebody has read what
the field does, and has put it into one of the three classes.
"""

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, NamedTuple

RELEASES = ("0.16.1", "0.18.0", "0.18.2", "0.19.0", "0.19.1", "0.19.2")


class Refusal(NamedTuple):
    """Values of an option that are refused: all but these, and why."""

    allowed: tuple[Any, ...]
    why: str


_OFF = (False, None)
_DROPS = "it drops tokens from the experts that they were routed to"
_RANDOM = "it replaces the logits by random ones"
_GRAPHS = (
    "graphs are captured without the argument (transformer_engine, whose graphed layers hand on hidden states alone), "
    "or it was not shown that they replay other routes than those of the capture (local, full_iteration)"
)
_OTHER_RANKS = "it takes ranks from other dimensions, which a layout does not know"
_INFERENCE = "its routers and dispatchers are those of inference"

REFUSED: Mapping[str, Refusal] = {
    # Other experts than those that are given.
    "moe_router_force_load_balancing": Refusal(_OFF, _RANDOM),
    "moe_router_force_biased": Refusal((None,), _RANDOM),
    "moe_enable_routing_replay": Refusal(_OFF, "it selects experts itself"),
    "moe_expert_capacity_factor": Refusal((None,), _DROPS),
    "moe_expert_rank_capacity_factor": Refusal((None,), _DROPS),
    "moe_pad_expert_input_to_capacity": Refusal(_OFF, "it wants a capacity factor, which drops tokens"),
    "moe_paged_stash": Refusal(_OFF, "it wants a capacity factor, which drops tokens, and runs some passes twice"),
    "moe_token_dropping": Refusal(_OFF, _DROPS),
    # The argument does not get to the routers.
    "cuda_graph_impl": Refusal(("none",), _GRAPHS),
    "enable_cuda_graph": Refusal(_OFF, _GRAPHS),
    "external_cuda_graph": Refusal(_OFF, _GRAPHS),
    "mlp_chunks_for_training": Refusal((1,), "a chunk of the sequence is given no routes"),
    "transformer_impl": Refusal(("transformer_engine", "local"), _INFERENCE),
    "use_inference_optimized_layers": Refusal(_OFF, _INFERENCE),
    # Other tokens on a rank than a layout says.
    "hybrid_context_parallel": Refusal(
        _OFF, "it gives each sample a context-parallel size of its own, so that ranks have other tokens"
    ),
    "gtp_weight_remat_size": Refusal((1, None), _OTHER_RANKS),
    "expert_gtp_weight_remat_size": Refusal((1, None), _OTHER_RANKS),
    "moe_extended_tp": Refusal(_OFF, "it shares experts out over tensor-parallel ranks, which a layout does not know"),
}
"""Fields of which only some values are allowed; the first is the default. A pin that lacks one has not the option."""

NATIVE_REFUSED: Mapping[str, Refusal] = {
    "moe_router_fusion": Refusal(_OFF, "the fused router does not ask RouterReplay, and selects for itself"),
    "overlap_moe_expert_parallel_comm": Refusal(
        _OFF, "layers of two micro-batches take turns in a schedule plan, and a router has one target"
    ),
    "moe_token_dispatcher_type": Refusal(
        ("alltoall", "allgather"),
        "the flex dispatcher looks for experts by their weights, and loses those whose weight is 0",
    ),
}
"""Fields of which the patch takes more values than Megatron's own replay."""

SELECTS = ("sinkhorn", "quantile_balancing")
"""Kinds of load balancing that select experts themselves."""

CONDITIONAL: Mapping[str, str] = {
    "moe_router_load_balancing_type": "refused if it is of SELECTS; aux losses are tested",
    "batch_p2p_comm": "refused with pp 2 and vpp > 1; tested",
    "sequence_parallel": "refused if it is off with tp > 1; tested",
}
"""Fields that depend on others; `refused_options` and `check_model` have the conditions."""

_TESTED = """
    tensor_model_parallel_size pipeline_model_parallel_size virtual_pipeline_model_parallel_size context_parallel_size
    expert_model_parallel_size expert_tensor_parallel_size pipeline_model_parallel_layout variable_seq_lengths
    overlap_p2p_comm use_cpu_initialization bf16 params_dtype pipeline_dtype gradient_accumulation_fusion
    finalize_model_grads_func grad_scale_func calculate_per_token_loss
    num_layers hidden_size num_attention_heads num_query_groups kv_channels ffn_hidden_size normalization
    layernorm_epsilon qk_layernorm add_bias_linear gated_linear_unit activation_func hidden_dropout attention_dropout
    attention_softmax_in_fp32 masked_softmax_fusion bias_activation_fusion bias_dropout_fusion persist_layer_norm
    apply_rope_fusion mtp_num_layers
    recompute_granularity recompute_method recompute_num_layers recompute_modules
    num_moe_experts moe_router_topk moe_layer_freq moe_ffn_hidden_size moe_shared_expert_intermediate_size
    moe_router_pre_softmax moe_router_topk_scaling_factor moe_router_score_function moe_router_dtype
    moe_router_num_groups moe_router_group_topk moe_router_enable_expert_bias moe_router_fusion moe_aux_loss_coeff
    moe_router_replay_aux_loss moe_z_loss_coeff moe_input_jitter_eps moe_token_dispatcher_type
    overlap_moe_expert_parallel_comm
"""

TESTED = frozenset(_TESTED.split())
"""Allowed, and used by tests that hold routes, or what a step makes of them, against a reference."""

_ALLOWED: Mapping[str, str] = {
    "ranks talk in another way, and have the same tokens": """
        pipeline_model_parallel_comm_backend hierarchical_context_parallel_sizes max_seqlen_per_dp_cp_rank cp_comm_type
        no_sync_func grad_sync_func param_sync_func tp_comm_overlap tp_comm_bulk_wgrad tp_comm_bulk_dgrad
        tp_comm_overlap_ag tp_comm_overlap_rs tp_comm_overlap_rs_dgrad tp_comm_split_ag tp_comm_atomic_ag
        tp_comm_split_rs tp_comm_atomic_rs tp_comm_overlap_disable_qkv tp_comm_overlap_disable_fc1
        tp_comm_bootstrap_backend async_tensor_model_parallel_allreduce batch_p2p_sync use_ring_exchange_p2p
        overlap_p2p_comm_warmup_flush deallocate_pipeline_outputs high_priority_a2a_comm_stream symmetric_ar_type
        tp_only_amax_red
    """,
    "derived from others, which are looked at": """
        tensor_parallel_num_weight_shards expert_tensor_parallel_num_weight_shards _cpu_offloading_context
    """,
    "where layers are, which is read from the model, and in which order a stage takes its micro-batches": """
        num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage account_for_embedding_in_pipeline_split
        account_for_loss_in_pipeline_split microbatch_group_size_per_vp_stage mtp_standalone heterogeneous_block_specs
        hetereogenous_dist_checkpoint
    """,
    "how the model is made and its weights begin": """
        perform_initialization init_method output_layer_init_method init_method_std embedding_init_method
        embedding_init_method_std init_model_with_meta_device use_mup mup_width_mult mup_base_hidden_size
        mup_embedding_mult mup_output_mult mup_base_head_dim mup_attn_scale_power is_hybrid_model
    """,
    "numbers: their format, where they are rounded, and which kernels compute them": """
        fp16 enable_autocast autocast_dtype deterministic_mode use_te_rng_tracker disable_bf16_reduced_precision_matmul
        batch_invariant_mode fp32_residual_connection test_mode quant_recipe use_kitchen use_kitchen_attention
        kitchen_attention_backend fp8 fp8_recipe fp8_param fp8_quantizer_factory fp8_margin fp8_interval
        fp8_amax_history_len fp8_amax_compute_algo fp8_wgrad fp8_output_proj fp8_dot_product_attention
        fp8_multi_head_attention first_last_layers_bf16 num_layers_at_start_in_bf16 num_layers_at_end_in_bf16 fp4
        fp4_recipe fp4_param fp4_quantizer_factory activation_func_fp8_input_store disable_parameter_transpose_cache
        memory_efficient_layer_norm fused_residual_rmsnorm use_te_activation_func use_fused_weighted_squared_relu
        use_transformer_engine_op_fuser use_grouped_gemm_for_dense_mlp use_grouped_gemm_for_shared_expert
    """,
    "layers that are no routers: attention, norms, dense parts, embedding and loss": """
        multi_latent_attention attention_backend flash_attention_version softmax_scale softmax_type
        apply_residual_connection_post_layernorm layernorm_zero_centered_gamma add_qkv_bias glu_linear_offset
        activation_func_clamp_value rotary_interleaved window_size window_attn_skip_freq qk_l2_norm qk_clip
        qk_clip_alpha qk_clip_threshold log_max_attention_logit attention_output_gate no_rope_freq fused_single_qkv_rope
        apply_query_key_layer_scaling mrope_section experimental_attention_variant
        experimental_attention_variant_loss_scale_func dsa_indexer_n_heads dsa_indexer_head_dim dsa_indexer_topk
        dsa_indexer_topk_freq dsa_indexer_skip_topk_offset dsa_indexer_loss_coeff dsa_indexer_use_sparse_loss
        dsa_kernel_backend dsa_indexer_rope_interleaved dsa_indexer_rotate_activation dsa_indexer_scoring_relu
        dsa_indexer_k_norm_epsilon dsa_indexer_k_norm_fp32 linear_attention_freq linear_conv_kernel_dim
        linear_key_head_dim linear_value_head_dim linear_num_key_heads linear_num_value_heads
        cross_entropy_loss_fusion cross_entropy_fusion_impl clone_scatter_output_in_embedding
        q_lora_rank kv_lora_rank qk_head_dim qk_pos_emb_head_dim v_head_dim rope_type rotary_base rotary_percent
        rotary_scaling_factor original_max_position_embeddings beta_fast beta_slow mscale mscale_all_dim
        cache_mla_latents mla_down_proj_fusion
    """,
    "only hybrid models read them": """
        mamba_state_dim mamba_head_dim mamba_num_groups mamba_num_heads mamba_training_ssm_states_dtype
        use_mamba_mem_eff_path
    """,
    "multi-token prediction, whose routers are given no routes": """
        mtp_loss_scaling_factor mtp_use_repeated_layer mtp_detach_heads mtp_grad_scale_func mtp_hybrid_override_pattern
    """,
    "what is kept for the backward pass, where, and when gradients are computed": """
        num_microbatches_with_partial_activation_checkpoints distribute_saved_activations moe_layer_recompute
        cpu_offloading cpu_offloading_num_layers cpu_offloading_activations cpu_offloading_weights
        cpu_offloading_double_buffering cpu_offloading_retain_pinned_cpu_buffers fine_grained_activation_offloading
        offload_modules min_offloaded_tensor_size delay_offload_until_cuda_graph delta_offload_bytes_across_pp_ranks
        activation_offload_fraction fine_grained_offloading_max_inflight_offloads delay_wgrad_compute
        overlap_dispatch_backward_with_experts_wgrad ep_overlap_early_attn_memory_release
        defer_embedding_wgrad_compute wgrad_deferral_limit
    """,
    "routing of rows that have no route, and losses": """
        moe_router_topk_limited_devices moe_router_bias_update_rate moe_router_quantile_balancing_ema
        moe_grad_scale_func moe_per_layer_logging
    """,
    "experts after they are chosen: how tokens get there and what is computed; padding of experts weighs nothing": """
        moe_shared_expert_gate moe_shared_expert_overlap moe_shared_expert_glu_interleave_size moe_grouped_gemm
        moe_use_legacy_grouped_gemm moe_single_grouped_weight moe_single_grouped_bias moe_permute_fusion
        moe_apply_probs_on_input moe_latent_size moe_mlp_glu_interleave_size moe_router_padding_for_quantization
        moe_router_padding_for_fp8 moe_enable_deepep moe_flex_dispatcher_backend moe_permute_fusion_into_hybridep
        moe_hybridep_pad_uneven_dispatch_inputs moe_flex_dispatcher_num_sms moe_deepep_num_sms moe_hybridep_num_sms
        moe_hybridep_num_blocks_permute moe_hybridep_num_blocks_unpermute moe_hybridep_num_sms_preprocessing
        moe_ncclep_static_shape moe_ncclep_zero_copy
    """,
    "nothing without an option that is refused": """
        moe_token_drop_policy cuda_graph_use_single_mempool cuda_graph_retain_backward_graph cuda_graph_warmup_steps
        cuda_graph_modules cuda_graph_scope moe_paged_stash_page_size moe_paged_stash_buffer_size_factor_cuda
        moe_paged_stash_buffer_size_factor_cpu
    """,
    "inference alone, which is given no routes": """
        moe_pad_experts_for_cuda_graph_inference inference_cuda_graph_scope flash_decode inference_rng_tracker
        inference_sampling_seed nccl_all_reduce_for_prefill inference_fuse_tp_communication
        inference_disable_triton_nvls_kernels inference_grouped_gemm_backend inference_moe_disable_fused_quant_kernels
        inference_moe_token_dispatcher_type mlp_chunks_for_prefill
    """,
    "what is written down and timed": "timers barrier_with_L1_time config_logger_dir",
}

ALLOWED: Mapping[str, str] = {name: reason for reason, names in _ALLOWED.items() for name in names.split()}
"""The other fields, each with what it is about that leaves routes as they are."""


_ADDED: Mapping[str, str] = {
    "0.18.0": """
        cpu_offloading_retain_pinned_cpu_buffers cuda_graph_modules fine_grained_offloading_max_inflight_offloads
        fp8_output_proj fused_residual_rmsnorm high_priority_a2a_comm_stream inference_cuda_graph_scope
        inference_disable_triton_nvls_kernels inference_grouped_gemm_backend inference_moe_disable_fused_quant_kernels
        inference_moe_token_dispatcher_type mla_down_proj_fusion mlp_chunks_for_training moe_expert_rank_capacity_factor
        moe_hybridep_num_blocks_permute moe_hybridep_num_blocks_unpermute moe_hybridep_num_sms_preprocessing
        moe_mlp_glu_interleave_size moe_pad_experts_for_cuda_graph_inference moe_paged_stash
        moe_paged_stash_buffer_size_factor_cpu moe_paged_stash_buffer_size_factor_cuda moe_paged_stash_page_size
        moe_permute_fusion_into_hybridep moe_router_force_biased moe_single_grouped_bias moe_single_grouped_weight
        mtp_hybrid_override_pattern mtp_use_repeated_layer mup_attn_scale_power mup_base_head_dim mup_base_hidden_size
        mup_embedding_mult mup_output_mult mup_width_mult nccl_all_reduce_for_prefill
        overlap_dispatch_backward_with_experts_wgrad use_grouped_gemm_for_dense_mlp use_mup
        use_transformer_engine_op_fuser
    """,
    "0.19.0": """
        activation_offload_fraction delay_offload_until_cuda_graph delta_offload_bytes_across_pp_ranks
        dsa_indexer_k_norm_epsilon dsa_indexer_k_norm_fp32 dsa_indexer_rope_interleaved dsa_indexer_rotate_activation
        dsa_indexer_scoring_relu dsa_indexer_skip_topk_offset dsa_indexer_topk_freq dsa_kernel_backend
        experimental_attention_variant_loss_scale_func expert_gtp_weight_remat_size
        expert_tensor_parallel_num_weight_shards flash_attention_version gtp_weight_remat_size
        mamba_training_ssm_states_dtype moe_flex_dispatcher_num_sms moe_grad_scale_func
        moe_hybridep_pad_uneven_dispatch_inputs moe_ncclep_static_shape moe_ncclep_zero_copy
        moe_router_quantile_balancing_ema moe_shared_expert_glu_interleave_size mtp_detach_heads mtp_grad_scale_func
        tensor_parallel_num_weight_shards use_grouped_gemm_for_shared_expert
    """,
}
_REMOVED: Mapping[str, str] = {
    "0.18.0": "async_tensor_model_parallel_allreduce moe_extended_tp moe_use_legacy_grouped_gemm"
}
"""Fields that came or went with a release; all others each pin has."""

KNOWN = frozenset({*REFUSED, *CONDITIONAL, *TESTED, *ALLOWED})
"""All fields that are in a class."""


def fields_of(release: str) -> frozenset[str]:
    """Return the fields of the configurations of a pin, as they were read when they were classified."""
    names, at = set(KNOWN), RELEASES.index(release)
    for changes, there_since in ((_ADDED, True), (_REMOVED, False)):
        for changed, text in changes.items():
            if (at >= RELEASES.index(changed)) is not there_since:
                names -= {*text.split()}
    return frozenset(names)


def unknown_options(config: Any) -> Iterator[tuple[str, Any]]:
    """Yield the fields of Megatron's own configurations that are in no class and are not at their default.

    A framework's configuration may extend Megatron's; fields that the framework adds are not looked at.
    """
    for kind in type(config).__mro__:
        if not (kind.__module__.startswith("megatron.core.") and is_dataclass(kind)):
            continue
        for field in fields(kind):
            default = field.default if field.default_factory is MISSING else field.default_factory()
            value = getattr(config, field.name, default)
            if field.name not in KNOWN and not (value is default or value == default):
                yield field.name, value
        return


def refusals(refused: Mapping[str, Refusal], values: Mapping[str, Any]) -> Iterator[tuple[str, Any, str, str]]:
    """Yield each option of a table that has a value that is refused, as `refused_options` does."""
    for name, (allowed, why) in refused.items():
        found = values.get(name, allowed[0])
        if not any(found is each or (type(found) is type(each) and found == each) for each in allowed):
            # None stands for off, where off is another value.
            wanted = [repr(each) for each in allowed if each is not None] or ["None"]
            yield name, found, " or ".join(wanted), why


def refused_options(values: Mapping[str, Any]) -> Iterator[tuple[str, Any, str, str]]:
    """Yield each option that replay refuses: its name, its value, the values that it needs, and why.

    values: fields of TransformerConfig by name; those that are left out are at their defaults.
    """
    yield from refusals(REFUSED, values)
    chunks, tp = values.get("virtual_pipeline_model_parallel_size"), values.get("tensor_model_parallel_size", 1)
    if chunks and values.get("pipeline_model_parallel_size") == 2 and values.get("batch_p2p_comm"):
        # Both neighbours of a stage are one rank then, and its two sends in a batch are not told apart.
        why = "megatron-core mixes up the chunks' activations; use overlap_p2p_comm"
        yield "batch_p2p_comm", True, f"False with pp 2 and vpp {chunks}", why
    if tp > 1 and values.get("sequence_parallel") is False:
        why = "each rank would have all rows of its samples; Megatron-core trains MoE layers with it only"
        yield "sequence_parallel", False, f"True with tp {tp}", why
