#!/usr/bin/env bash
# GRPO with routing replay on the shape of DeepSeek-V3 (671 B), on 24 nodes of 8 GPUs with 141 GB: 16 for the trainer, 8 for
# four engines on two nodes each.
#
#   DRY_RUN=1 launch/deepseek-v3.sh                          # no GPU: checks the layout, says what takes how much, prints the command
#
# For planning: the trainer's table of weights (r3_adapter/megatron/policy_trainer/weights.py) has no rows for this family's attention yet, so that
# the plan says that it cannot be started (exit code 1) and a start is refused by name. launch/qwen3-235b-a22b.sh says how to start
# on many nodes.
#
# More flags of r3_adapter/arguments.py may follow; they win over those below.
set -euo pipefail
source "$(dirname "$0")/start.sh"
r3_model deepseek-v3 /shared/DeepSeek-V3-bf16 24 139

# 61 layers, the first 3 of them dense, on 4 stages.
LAYOUT_ARGS=(
    --tensor-model-parallel-size 8
    --pipeline-model-parallel-size 4
    --pipeline-model-parallel-layout "Et*16|t*15|t*15|t*15L"
    --context-parallel-size 4
    --expert-model-parallel-size 32
    --expert-tensor-parallel-size 1
    --data-parallel-size 1
    --micro-batch-size 1
    --recompute-granularity full
    --use-distributed-optimizer
)

ROLLOUT_ARGS=(
    --rollout-num-engines 4
    --rollout-tp-size 16
    --rollout-batch-size 128
    --n-samples-per-prompt 8
    --rollout-max-prompt-len 2048
    --rollout-max-response-len 30720
    --rollout-temperature 1.0
    --sglang-args '{"max_total_tokens": 393216, "max_running_requests": 256, "chunked_prefill_size": 8192, "mem_fraction_static": 0.85}'
)

POLICY_ARGS=(
    --advantage-estimator grpo
    --eps-clip 0.2
    --eps-clip-high 0.28
    --num-steps-per-rollout 4
    --num-rollout 1000
    --lr 1e-6
)

# What the plan alone needs: the lengths that the traffic is counted with.
PLAN_ARGS=(
    --mean-prompt-len 512
    --mean-response-len 8192
)

r3_start "$@"
