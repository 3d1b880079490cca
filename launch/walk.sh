#!/usr/bin/env bash
# Walks a launcher of a real model on one GPU, or without one: the same script, flags and checks, on a checkpoint with random weights that has
# the model's widths and fewer layers (without a GPU also smaller widths), for two steps of short samples, and goes on with that run for a third.
#
#   MODEL=qwen3-30b-a3b launch/walk.sh [FLAG...]
#
# MODEL: qwen3-30b-a3b (the default) or qwen3-235b-a22b. LAYERS: default 4. PYTHON: an interpreter that has the package and its engines.
set -euo pipefail
cd "$(dirname "$0")/.."
MODEL=${MODEL:-qwen3-30b-a3b} LAYERS=${LAYERS:-4}
export PYTHON=${PYTHON:-.venv/bin/python}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

gpus=0.5
nvidia-smi -L >/dev/null 2>&1 || gpus=0
ONE_GPU=(
    --tensor-model-parallel-size 1
    --pipeline-model-parallel-size 1
    --context-parallel-size 1
    --expert-model-parallel-size 1
    --data-parallel-size 1
    --rollout-num-engines 1
    --rollout-tp-size 1
    --gpus-per-rank "$gpus"
    --rollout-batch-size 4
    --n-samples-per-prompt 4
    --rollout-max-prompt-len 32
    --rollout-max-response-len 64
    --sglang-args '{"max_total_tokens": 8192, "max_running_requests": 16}'
)
! grep -q -- --pipeline-model-parallel-layout "launch/$MODEL.sh" || ONE_GPU+=(--pipeline-model-parallel-layout "Et*${LAYERS}L")

"$PYTHON" launch/walk.py "launch/configs/$MODEL.json" "$folder/model" --layers "$LAYERS"
for steps in 2 3; do
    DRY_RUN=0 HF_CHECKPOINT=$folder/model RUN_DIR=$folder/run RAY_ADDRESS='' \
        "launch/$MODEL.sh" "${ONE_GPU[@]}" --num-rollout "$steps" "$@"
done
