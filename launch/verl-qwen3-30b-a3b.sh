#!/usr/bin/env bash
# GRPO with routing replay on Qwen3-30B-A3B in verl 0.9.1 (docs/frameworks/verl.md), on one node of 8 GPUs with 80 GB.
#
#   DRY_RUN=1 launch/verl-qwen3-30b-a3b.sh                   # no GPU: composes verl's configuration, checks it, prints the command
#   HF_CHECKPOINT=/models/Qwen3-30B-A3B launch/verl-qwen3-30b-a3b.sh
#
# PYTHON is the interpreter that has verl, patched engines and r3_adapter. More of verl's overrides may follow; they win over those below.
set -euo pipefail
source "$(dirname "$0")/start.sh"

HF_CHECKPOINT=${HF_CHECKPOINT:-/models/Qwen3-30B-A3B}
RUN_DIR=${RUN_DIR:-$PWD/runs/verl-qwen3-30b-a3b}
TRAIN_FILES=${TRAIN_FILES:-/data/gsm8k/train.parquet} # made by verl's examples/data_preprocess
VAL_FILES=${VAL_FILES:-/data/gsm8k/test.parquet}
PYTHON=${PYTHON:-python3}

# Ray hands these on to processes of this host; those of others are given them by its runtime environment.
export VERL_USE_EXTERNAL_MODULES=${VERL_USE_EXTERNAL_MODULES:-r3_adapter.frameworks.verl.plugin}
export R3_VERL_BACKEND=${R3_VERL_BACKEND:-auto} CUDA_DEVICE_MAX_CONNECTIONS=1

ACTOR=actor_rollout_ref.actor ROLLOUT=actor_rollout_ref.rollout REF=actor_rollout_ref.ref
MEGATRON=$ACTOR.megatron.override_transformer_config

R3_ARGS=(
    "$ROLLOUT.enable_rollout_routing_replay=True"
    "+$ROLLOUT.engine_kwargs.sglang.routed_experts_format=exact-flat"
    "$ROLLOUT.calculate_log_probs=True"
    "$ACTOR.megatron.router_replay.mode=disabled"
    "+ray_kwargs.ray_init.runtime_env.env_vars.VERL_USE_EXTERNAL_MODULES=$VERL_USE_EXTERNAL_MODULES"
    "+ray_kwargs.ray_init.runtime_env.env_vars.R3_VERL_BACKEND=$R3_VERL_BACKEND"
)

# The experts are cut 8 ways, attention 2 ways; what a pass does not need stays on the host.
LAYOUT_ARGS=(
    model_engine=megatron
    "$ACTOR.megatron.tensor_model_parallel_size=2"
    "$ACTOR.megatron.pipeline_model_parallel_size=1"
    "$ACTOR.megatron.context_parallel_size=1"
    "$ACTOR.megatron.expert_model_parallel_size=8"
    "$ACTOR.megatron.expert_tensor_parallel_size=1"
    "$ACTOR.megatron.param_offload=True"
    "$ACTOR.megatron.optimizer_offload=True"
    "+$MEGATRON.moe_router_dtype=fp32"
    "+$MEGATRON.recompute_granularity=full"
    "+$MEGATRON.recompute_method=uniform"
    "+$MEGATRON.recompute_num_layers=1"
)

ROLLOUT_ARGS=(
    "data.train_files=$TRAIN_FILES"
    "data.val_files=$VAL_FILES"
    data.train_batch_size=64
    data.max_prompt_length=2048
    data.max_response_length=8192
    data.filter_overlong_prompts=True
    data.truncation=error
    "$ROLLOUT.name=sglang"
    "$ROLLOUT.n=8"
    "$ROLLOUT.tensor_model_parallel_size=4"
    "$ROLLOUT.gpu_memory_utilization=0.65"
    "$ROLLOUT.log_prob_use_dynamic_bsz=True"
    "$ROLLOUT.log_prob_max_token_len_per_gpu=20480"
)

POLICY_ARGS=(
    "actor_rollout_ref.model.path=$HF_CHECKPOINT"
    actor_rollout_ref.model.use_remove_padding=True
    actor_rollout_ref.model.use_fused_kernels=False
    algorithm.adv_estimator=grpo
    algorithm.use_kl_in_reward=False
    "$ACTOR.use_kl_loss=False"
    "$ACTOR.clip_ratio_low=0.2"
    "$ACTOR.clip_ratio_high=0.28"
    "$ACTOR.optim.lr=1e-6"
    "$ACTOR.ppo_mini_batch_size=32"
    "$ACTOR.use_dynamic_bsz=True"
    "$ACTOR.ppo_max_token_len_per_gpu=20480"
    trainer.n_gpus_per_node=8
    trainer.nnodes=1
    trainer.project_name=r3
    trainer.experiment_name=verl-qwen3-30b-a3b
    "trainer.default_local_dir=$RUN_DIR"
    'trainer.logger=["console","tensorboard"]'
    trainer.save_freq=20
    trainer.test_freq=20
    trainer.total_epochs=15
)

FLAGS=("${R3_ARGS[@]}" "${LAYOUT_ARGS[@]}" "${ROLLOUT_ARGS[@]}" "${POLICY_ARGS[@]}" "$@")
r3_framework r3_adapter.frameworks.verl.flags -m verl.trainer.main_ppo
