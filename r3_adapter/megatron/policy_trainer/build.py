"""A Qwen3-MoE GPTModel from a Hugging Face checkpoint, on this rank of a layout."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from r3_adapter.errors import LayoutError, ReplayError, show
from r3_adapter.layout import ParallelLayout
from r3_adapter.megatron.bridge import library as bridge
from r3_adapter.megatron.grouped_experts import group_experts
from r3_adapter.megatron.placed import read_placement, set_placement
from r3_adapter.megatron.policy_trainer.checkpoint import Checkpoint
from r3_adapter.megatron.policy_trainer.options import TrainerOptions
from r3_adapter.megatron.policy_trainer.weights import load_weights

_RECOMPUTE: Mapping[str, Mapping[str, Any]] = {
    "none": {},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "moe": {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
}


def initialize(layout: ParallelLayout, rank: int, rendezvous: str) -> torch.device:
    """Join the process group (NCCL with a GPU, gloo without) and set up Megatron's groups; return the rank's device.

    rendezvous: URL at which all ranks meet: "file://" with a file on this host that does not exist yet, for which no
        port is opened, or "tcp://HOST:PORT" of rank 0's host.

    Raises:
        LayoutError: Megatron gives this rank other coordinates than the layout.
    """
    gpu = torch.cuda.is_available()
    if not gpu:
        from r3_adapter.megatron import cpu

        cpu.install()
        torch.set_num_threads(1)
    if rendezvous.startswith(("file://", "tcp://127.0.0.1:")):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    device = torch.device("cuda", rank % torch.cuda.device_count()) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    torch.distributed.init_process_group(
        "nccl" if gpu else "gloo", init_method=rendezvous, rank=rank, world_size=layout.world_size
    )
    from megatron.core import parallel_state as ps
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    ps.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
    )
    model_parallel_cuda_manual_seed(1234)
    _check_coords(layout, rank)
    return device


def _check_coords(layout: ParallelLayout, rank: int) -> None:
    from megatron.core import parallel_state as ps

    found = {
        "tp_rank": ps.get_tensor_model_parallel_rank(),
        "cp_rank": ps.get_context_parallel_rank(),
        "dp_rank": ps.get_data_parallel_rank(),
        "pp_rank": ps.get_pipeline_model_parallel_rank(),
        "etp_rank": ps.get_expert_tensor_parallel_rank(),
        "ep_rank": ps.get_expert_model_parallel_rank(),
        "edp_rank": ps.get_expert_data_parallel_rank(),
    }
    want = layout.coords(rank)._asdict()
    if found != want:
        raise LayoutError(f"rank {rank}: Megatron's coordinates {found} != {want} of {layout}")


def build_model(folder: Path, layout: ParallelLayout, options: TrainerOptions) -> list[torch.nn.Module]:
    """Build this rank's model chunks (one without VPP) with the checkpoint's weights, in the checkpoint's dtype.

    All ranks must call it. With megatron-bridge the checkpoint may be of any family that it knows, else of Qwen3-MoE.

    Raises:
        LayoutError: a placement of experts that is not this model's.
        ReplayError: a checkpoint of another kind, a tensor of it that no rank has read, or a parameter that none makes.
    """
    with Checkpoint(folder) as checkpoint:
        hf = checkpoint.config
    if bridge.is_installed():
        from r3_adapter.megatron.bridge.models import build_chunks

        chunks = build_chunks(hf, layout, options, run_fields(hf, layout, options))
    else:
        config = transformer_config(hf, layout, options)
        shape = {
            "vocab_size": hf["vocab_size"],
            "max_sequence_length": hf["max_position_embeddings"],
            "rotary_base": rope_of(hf)["rope_theta"],
            "tied": hf["tie_word_embeddings"],
            "contiguous": options.cp_cut == "contiguous" and layout.cp > 1,
        }
        vp_stages = range(layout.vpp) if layout.vpp > 1 else [None]
        chunks = [build_chunk(config, vp_stage=vp_stage, **shape) for vp_stage in vp_stages]
    if not torch.cuda.is_available():
        group_experts(chunks)
    placement = read_placement(options.place)
    set_placement(chunks, placement)
    load_weights(chunks, folder, placement=placement)
    return chunks


def build_chunk(
    config: Any,
    *,
    vocab_size: int,
    max_sequence_length: int,
    rotary_base: int,
    tied: bool,
    vp_stage: int | None,
    contiguous: bool = False,
) -> torch.nn.Module:
    """Build a model chunk of this rank.

    config: Megatron's TransformerConfig. contiguous: for micro-batches that context parallelism cuts contiguously.
    """
    from megatron.core import parallel_state as ps
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import HAVE_TE, get_gpt_decoder_block_spec

    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=HAVE_TE, vp_stage=vp_stage)
    if contiguous or not HAVE_TE:
        from r3_adapter.megatron.attention import LocalAttention, contiguous_attention

        attention = contiguous_attention(rotary_base) if contiguous else LocalAttention
        for layer in spec.layer_specs:
            layer.submodules.self_attention.submodules.core_attention = attention
    model = GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=vocab_size,
        max_sequence_length=max_sequence_length,
        pre_process=ps.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=ps.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        # Megatron's rotary embedding is cut in zigzag, so the other attention turns queries and keys itself.
        position_embedding_type="none" if contiguous else "rope",
        rotary_base=rotary_base,
        share_embeddings_and_output_weights=tied,
        vp_stage=vp_stage,
    )
    return model.to(torch.cuda.current_device())  # type: ignore[no-any-return]


def build_optimizer(
    chunks: Sequence[torch.nn.Module],
    *,
    distributed: bool,
    lr: float = 1e-4,
    min_lr: float = 0.0,
    clip_grad: float = 1.0,
    cpu_offload: bool = False,
) -> tuple[list[torch.nn.Module], Any]:
    """Wrap the chunks in Megatron's data parallelism, and make its Adam; return both.

    cpu_offload: keep the optimizer's state on the host, where it is anyway on a machine without a GPU.
    """
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.utils import get_model_config

    config = get_model_config(chunks[0])
    ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=distributed, grad_reduce_in_fp32=True)
    wrapped = [
        DistributedDataParallel(config=config, ddp_config=ddp_config, module=chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]
    # Megatron's own offloading knows parameters of a GPU alone.
    offload = cpu_offload and next(chunks[0].parameters()).is_cuda
    optimizer_config = OptimizerConfig(
        optimizer="adam",
        lr=lr,
        min_lr=min_lr,
        clip_grad=clip_grad,
        bf16=config.bf16,
        params_dtype=config.params_dtype,
        use_distributed_optimizer=distributed,
        optimizer_cpu_offload=offload,
        optimizer_offload_fraction=1.0 if offload else 0.0,
    )
    optimizer = get_megatron_optimizer(optimizer_config, wrapped)
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    return wrapped, optimizer


def transformer_config(hf: Mapping[str, Any], layout: ParallelLayout, options: TrainerOptions) -> Any:
    """Translate a Qwen3-MoE config.json into Megatron's TransformerConfig.

    Source: transformers/models/qwen3_moe/configuration_qwen3_moe.py, modeling_qwen3_moe.py@5.12.1.

    Raises:
        ReplayError: another kind of model, or a feature of it that is not translated.
    """
    from megatron.core.transformer.transformer_config import TransformerConfig

    check_translated(hf)
    fields = dict(
        num_layers=hf["num_hidden_layers"],
        hidden_size=hf["hidden_size"],
        num_attention_heads=hf["num_attention_heads"],
        num_query_groups=hf["num_key_value_heads"],
        kv_channels=hf["head_dim"],
        ffn_hidden_size=hf["intermediate_size"],
        num_moe_experts=hf.get("num_experts") or hf["num_local_experts"],
        moe_router_topk=hf["num_experts_per_tok"],
        moe_ffn_hidden_size=hf["moe_intermediate_size"],
        moe_layer_freq=layer_pattern(hf),
        moe_router_pre_softmax=not hf["norm_topk_prob"],
        moe_router_load_balancing_type="none",
        moe_aux_loss_coeff=0.0,
        normalization="RMSNorm",
        layernorm_epsilon=hf["rms_norm_eps"],
        qk_layernorm=True,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
    )
    return TransformerConfig(**{**fields, **run_fields(hf, layout, options), **options.megatron_arguments})


def run_fields(hf: Mapping[str, Any], layout: ParallelLayout, options: TrainerOptions) -> dict[str, Any]:
    """Return the fields of TransformerConfig that are the same for models of all kinds.

    Raises:
        ReplayError: a dtype of the checkpoint that is not known.
    """
    dtype = getattr(torch, str(hf.get("dtype") or hf.get("torch_dtype")), None)
    if dtype not in (torch.float32, torch.bfloat16):
        raise ReplayError(f"dtype {show(hf.get('dtype'))} of config.json is none of 'float32', 'bfloat16'")
    return dict(
        moe_router_dtype="fp32",
        moe_token_dispatcher_type=options.dispatcher,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        attention_softmax_in_fp32=True,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        use_cpu_initialization=True,
        tensor_model_parallel_size=layout.tp,
        sequence_parallel=layout.tp > 1,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        calculate_per_token_loss=True,
        variable_seq_lengths=options.qkv_format == "thd",
        pipeline_model_parallel_layout=options.pipeline_model_parallel_layout,
        **_RECOMPUTE[options.recompute],
        # Batched sends to one peer from two chunks at once mix up: interleaving trains wrongly with them.
        overlap_p2p_comm=layout.vpp > 1,
        batch_p2p_comm=layout.vpp == 1,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
    )


def check_translated(hf: Mapping[str, Any]) -> None:
    """Refuse a config.json of another kind of model, or with a feature that is not translated.

    Raises:
        ReplayError: names it.
    """
    if hf.get("model_type") != "qwen3_moe":
        raise ReplayError(f"model_type {hf.get('model_type')!r} != 'qwen3_moe', which has a table of weights")
    rope = rope_of(hf)["rope_type"]
    if rope != "default" or hf["attention_bias"] or hf["use_sliding_window"] or hf["hidden_act"] != "silu":
        raise ReplayError(f"rope {rope!r}, attention_bias, use_sliding_window or hidden_act: not Qwen3-MoE's defaults")


def layer_pattern(hf: Mapping[str, Any]) -> list[int]:
    """Return 1 for each layer of experts, 0 for each dense one."""
    dense, step = set(hf["mlp_only_layers"]), hf["decoder_sparse_step"]
    return [int(i not in dense and (i + 1) % step == 0) for i in range(hf["num_hidden_layers"])]


def rope_of(hf: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return type and base; before transformers 5 they lay in two fields, and do so in published checkpoints."""
    if "rope_parameters" in hf:
        return dict(hf["rope_parameters"])
    scaling = hf.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    return {"rope_type": kind, "rope_theta": hf["rope_theta"]}
