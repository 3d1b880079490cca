#!/usr/bin/env bash
# GRPO with routing replay on Qwen3-30B-A3B, on one node of 8 GPUs with 80 GB: 4 for the trainer, 4 for two engines.
#
#   DRY_RUN=1 launch/qwen3-30b-a3b.sh                        # no GPU: checks the layout, says what takes how much, prints the command
#   HF_CHECKPOINT=/models/Qwen3-30B-A3B launch/qwen3-30b-a3b.sh
#
# More flags of r3_adapter/arguments.py may follow; they win over those below.
set -euo pipefail
source "$(dirname "$0")/start.sh"
r3_model qwen3-30b-a3b /models/Qwen3-30B-A3B 1 79

# The experts are cut 4 ways, attention 2 ways. Adam's states would be 12 bytes a parameter: they stay on the host.
LAYOUT_ARGS=(
    --tensor-model-parallel-size 2
    --pipeline-model-parallel-size 1
    --context-parallel-size 1
    --expert-model-parallel-size 4
    --expert-tensor-parallel-size 1
    --data-parallel-size 2
    --micro-batch-size 1
    --recompute-granularity full
    --use-distributed-optimizer
    --optimizer-cpu-offload
)

ROLLOUT_ARGS=(
    --rollout-num-engines 2
    --rollout-tp-size 2
    --rollout-batch-size 32
    --n-samples-per-prompt 8
    --rollout-max-prompt-len 2048
    --rollout-max-response-len 8192
    --rollout-temperature 1.0
    --sglang-args '{"max_total_tokens": 524288, "max_running_requests": 256, "chunked_prefill_size": 8192, "mem_fraction_static": 0.8}'
)

POLICY_ARGS=(
    --advantage-estimator grpo
    --eps-clip 0.2
    --eps-clip-high 0.28
    --num-steps-per-rollout 1
    --num-rollout 500
    --lr 1e-6
)

# What the plan alone needs: the lengths that the traffic is counted with.
PLAN_ARGS=(
    --mean-prompt-len 256
    --mean-response-len 3072
)

r3_start "$@"
