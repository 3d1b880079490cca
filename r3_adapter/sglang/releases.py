"""The SGLang releases whose classes were read, and what differs between these classes.

Each field is in one class of server_argument_names.py, REFUSED or sampling.py, whichever releases have it: a name that
came back with another meaning would need another table.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from r3_adapter.machine import version_of

RELEASES = ("0.5.15.post1", "0.5.20", "0.5.23")
"""Oldest first."""


@dataclass(frozen=True)
class _Change:
    """What a release did to the fields of a class of the release before it here, as words."""

    added: str = ""
    removed: str = ""


_CHANGES: Mapping[str, Mapping[str, _Change]] = {
    "ServerArgs": {
        "0.5.20": _Change(
            added="""
                _radix_eviction_policy_explicitly_set _speculative_draft_quantization_explicitly_set
                allowed_media_domains c128_page_size dcp_comm_backend dcp_replicate_q_proj deepep_v2_mode
                default_chat_template_kwargs disaggregation_decode_retraction_backup dllm_fdfo dsv4_attn_backend
                dsv4_prefill_backend dwdp_size elastic_ep_initial_size elastic_ep_scale_timeout
                enable_cp_decode_attn_tp enable_dense_mlp_attn_tp enable_dsa_cache_layer_split enable_flexkv
                enable_layernorm_sp enable_lean_attention enable_linear_replayssm_spec enable_response_store
                enable_scattered_sconv enable_shared_experts_attn_tp enable_tp_lm_head_all_to_all
                enable_unified_cache_external_linker enable_w4a4_mxfp4_megamoe enable_waterfill ep_join_mode
                ep_join_rank_offset expert_balancedness_report_mode flashinfer_a2a_dispatch_type
                flashinfer_autotune_skip_ops flexkv_config_file fuseep_mode gated_launch_port grpc_port
                grpc_worker_threads hicache_host_memory_mode hicache_storage_prefetch_retry_max_attempts
                hicache_storage_prefetch_retry_poll_interval http2_initial_connection_window_size
                http2_max_concurrent_streams image_processor_backend language_model_only linear_attn_verify_backend
                load_publish_endpoint mamba_max_states_per_path max_ep_size media_url_max_file_size_mb
                mlx_enable_sampling mm_feature_transport mm_global_cache_backend mm_io_worker_num
                mm_preprocess_cache_size_mb mm_processor_worker_num optimistic_prefill_attempts ple_offload_backend
                ple_offload_dir ple_offload_embedding prefill_decode_interval radix_eviction_policy_config
                retraction_policy return_hidden_states_mode return_input_ids return_output_ids
                sampling_mask_max_tokens sidecar sidecar_args smg_grpc_mode smg_http_sidecar_port
                speculative_domino_candidate_pool_size speculative_draft_kv_cache_dtype speculative_dsa_topk_backend
                speculative_dspark_align_verify_tokens_to_graph_tier speculative_dspark_block_size
                speculative_dspark_confidence_sts_path speculative_dspark_sps_table_path startup_weight_load_mode
                trust_mm_content_hashes unified_cache_external_linker_backend uno_lora_path weight_cache_mode
                weight_cache_socket weight_cache_timeout
            """,
            removed="""
                dsa_prefill_cp_mode enable_deepep_waterfill enable_dsa_prefill_context_parallel
                enable_expert_distribution_metrics enable_prefill_context_parallel grpc_http_sidecar_port
                optimistic_prefill_retries prefill_cp_mode torchao_config
            """,
        ),
        "0.5.23": _Change(
            added="""
                _swa_full_tokens_ratio_explicitly_set attn_dp_size aux_hidden_state_capture boundary_reduction
                constrained_json_max_whitespace_cnt cuda_graph_max_seq_len_prefill cuda_graph_prefill_max_context
                disable_aiter_allreduce_fusion_in_decode disable_aiter_allreduce_fusion_in_prefill
                disaggregation_decode_allocation_policy disaggregation_decode_host_receive_threshold
                disaggregation_enable_kv_checksum dsa_triton_union enable_amd_monokernel enable_cp_tp_group_sharing
                enable_decoder_swa_bounded_replay enable_dsa_fused_indexer enable_encoder_swa_bounded_replay
                enable_http_worker_reuseport enable_kv_cache_sharding enable_linker_mla_dedup
                enable_megamoe_for_layernorm_sp enable_nvidia_megakernel enable_paged_experts enable_pd_role_switch
                enable_return_aux_hidden_states enable_watermark grpc_response_timeout_secs
                hicache_host_memory_fraction otlp_service_name paged_experts_num_resident
                prefill_decode_interval_min_bs prefill_kv_cache_dequant_dtype qsa_indexer_dtype
                return_aux_hidden_state_layer_ids shared_experts_tp_size speculative_boundary_reduction
                speculative_draft_sink_size speculative_enable_w4a4_mxfp4_megamoe speculative_use_block_verification
                swa_prefix_tails trust_request_chat_template unified_cache_external_linker_config watermark_config
                watermark_context_window watermark_default_enabled watermark_enforce_all watermark_key
                watermark_key_b watermark_max_probability watermark_mixing_probability
            """,
            removed="cuda_graph_tc_compiler elastic_ep_rejoin keep_mm_feature_on_device speculative_skip_dp_mlp_sync",
        ),
    },
    "SamplingParams": {
        "0.5.20": _Change(added="beam_width ebnf_full_assistant"),
        "0.5.23": _Change(added="watermark"),
    },
}


def installed_release() -> str | None:
    """Return the version of the SGLang that is installed here; None without one."""
    return version_of("sglang")


def absent(struct: str, release: str | None) -> frozenset[str]:
    """Return the fields of a class of SGLang's that are classified and that a release does not have.

    release: None, or one that is not in RELEASES, of which nothing is known: no field, so that SGLang itself decides.
    """
    if release not in RELEASES:
        return frozenset()
    found, at = set[str](), RELEASES.index(release)
    for index, each in enumerate(RELEASES):
        change = _CHANGES[struct].get(each, _Change())
        found |= set((change.removed if index <= at else change.added).split())
    return frozenset(found)
