#!/usr/bin/env bash
# GSPO with routing replay on Qwen3-235B-A22B, on 24 nodes of 8 GPUs with 80 GB: 16 for the trainer, 8 for an engine each.
#
#   DRY_RUN=1 launch/qwen3-235b-a22b.sh                      # no GPU: checks the layout, says what takes how much, prints the command
#
# One Ray cluster over all nodes, then the driver on the head, from a folder that every node has:
#
#   ray start --head --port 6379 --num-gpus 8                # on the first node
#   ray start --address HEAD:6379 --num-gpus 8               # on each of the others
#   RAY_ADDRESS=HEAD:6379 HF_CHECKPOINT=/shared/Qwen3-235B-A22B launch/qwen3-235b-a22b.sh
#
# or from elsewhere, where the cluster's dashboard can be reached:
#
#   ray job submit --address http://HEAD:8265 --working-dir . -- env RAY_ADDRESS=auto launch/qwen3-235b-a22b.sh
#
# More flags of r3_adapter/arguments.py may follow; they win over those below.
set -euo pipefail
source "$(dirname "$0")/start.sh"
r3_model qwen3-235b-a22b /shared/Qwen3-235B-A22B 24 79

# 94 layers on 4 stages: the first and the last have one less, for the embedding and the output layer.
LAYOUT_ARGS=(
    --tensor-model-parallel-size 4
    --pipeline-model-parallel-size 4
    --pipeline-model-parallel-layout "Et*23|t*24|t*24|t*23L"
    --context-parallel-size 2
    --expert-model-parallel-size 16
    --expert-tensor-parallel-size 1
    --data-parallel-size 4
    --micro-batch-size 1
    --recompute-granularity full
    --use-distributed-optimizer
)

ROLLOUT_ARGS=(
    --rollout-num-engines 8
    --rollout-tp-size 8
    --rollout-batch-size 128
    --n-samples-per-prompt 8
    --rollout-max-prompt-len 2048
    --rollout-max-response-len 16384
    --rollout-temperature 1.0
    --sglang-args '{"max_total_tokens": 262144, "max_running_requests": 128, "chunked_prefill_size": 8192, "mem_fraction_static": 0.88}'
)

POLICY_ARGS=(
    --advantage-estimator gspo
    --eps-clip 3e-4
    --eps-clip-high 4e-4
    --num-steps-per-rollout 4
    --num-rollout 1000
    --lr 1e-6
)

# What the plan alone needs: the lengths that the traffic is counted with.
PLAN_ARGS=(
    --mean-prompt-len 512
    --mean-response-len 6144
)

r3_start "$@"
