#!/usr/bin/env bash
# GRPO with routing replay on Qwen3-30B-A3B in slime 0.3.1 (docs/frameworks/slime.md), on one node of 8 GPUs with 80 GB.
#
#   DRY_RUN=1 launch/slime-qwen3-30b-a3b.sh                  # no GPU, no slime: checks the flags that replay needs, prints the command
#   SLIME_DIR=~/slime MEGATRON_DIR=~/Megatron-LM launch/slime-qwen3-30b-a3b.sh
#
# PYTHON is the interpreter that has slime, its patched SGLang and Megatron, and r3_adapter. Ray has to run already (`ray start --head`).
# More of slime's flags may follow; they win over those below.
set -euo pipefail
source "$(dirname "$0")/start.sh"

HF_CHECKPOINT=${HF_CHECKPOINT:-/models/Qwen3-30B-A3B}
TORCH_DIST=${TORCH_DIST:-/models/Qwen3-30B-A3B_torch_dist} # made of it by slime's tools/convert_hf_to_torch_dist.py
SAVE=${SAVE:-runs/slime-qwen3-30b-a3b}
PROMPTS=${PROMPTS:-/data/dapo-math-17k.jsonl}
SLIME_DIR=${SLIME_DIR:-$HOME/slime}
MEGATRON_DIR=${MEGATRON_DIR:-$HOME/Megatron-LM}
ENGINES=${ENGINES:-$PWD/launch/slime-engines.json}
PYTHON=${PYTHON:-python3}

R3_ARGS=(
    --custom-generate-function-path r3_adapter.frameworks.slime.generate
    --custom-convert-samples-to-train-data-path r3_adapter.frameworks.slime.convert
    --custom-megatron-init-path r3_adapter.frameworks.slime.init
    # enable_return_routed_experts and routed_experts_format of the engines: slime has no flag for the first one.
    --sglang-config "$ENGINES"
)

MODEL_ARGS=(
    --num-layers 48
    --hidden-size 2048
    --ffn-hidden-size 6144
    --num-attention-heads 32
    --group-query-attention
    --num-query-groups 4
    --kv-channels 128
    --qk-layernorm
    --vocab-size 151936
    --untie-embeddings-and-output-weights
    --normalization RMSNorm
    --norm-epsilon 1e-6
    --swiglu
    --disable-bias-linear
    --position-embedding-type rope
    --rotary-percent 1.0
    --rotary-base 1000000
    --num-experts 128
    --moe-layer-freq 1
    --moe-ffn-hidden-size 768
    --moe-router-topk 8
    --moe-router-score-function softmax
    --moe-router-dtype fp32
    --moe-aux-loss-coeff 0
    --moe-token-dispatcher-type alltoall
    --moe-grouped-gemm
    --moe-permute-fusion
)

LAYOUT_ARGS=(
    --actor-num-nodes 1
    --actor-num-gpus-per-node 8
    --colocate
    --tensor-model-parallel-size 4
    --sequence-parallel
    --pipeline-model-parallel-size 1
    --context-parallel-size 1
    --expert-model-parallel-size 8
    --expert-tensor-parallel-size 1
    --recompute-granularity full
    --recompute-method uniform
    --recompute-num-layers 1
    --use-dynamic-batch-size
    --max-tokens-per-gpu 20480
)

ROLLOUT_ARGS=(
    --prompt-data "$PROMPTS"
    --input-key prompt
    --label-key label
    --apply-chat-template
    --rollout-shuffle
    --rm-type deepscaler
    --num-rollout 3000
    --rollout-batch-size 32
    --n-samples-per-prompt 8
    --rollout-max-response-len 8192
    --rollout-temperature 1
    --global-batch-size 128 # two steps a rollout: slime then computes log-probabilities before the first, of which r3/k3 is
    --balance-data
    --rollout-num-gpus-per-engine 8
    --sglang-mem-fraction-static 0.7
)

POLICY_ARGS=(
    --advantage-estimator grpo
    --kl-coef 0
    --entropy-coef 0
    --eps-clip 0.2
    --eps-clip-high 0.28
    --optimizer adam
    --lr 1e-6
    --lr-decay-style constant
    --weight-decay 0.1
    --adam-beta1 0.9
    --adam-beta2 0.98
    --optimizer-cpu-offload
    --overlap-cpu-optimizer-d2h-h2d
    --use-precision-aware-optimizer
)

OTHER_ARGS=(
    --attention-dropout 0
    --hidden-dropout 0
    --accumulate-allreduce-grads-in-fp32
    --attention-softmax-in-fp32
    --attention-backend flash
)

FLAGS=("${R3_ARGS[@]}" "${MODEL_ARGS[@]}" "${LAYOUT_ARGS[@]}" "${ROLLOUT_ARGS[@]}" "${POLICY_ARGS[@]}" "${OTHER_ARGS[@]}"
    --hf-checkpoint "$HF_CHECKPOINT" --ref-load "$TORCH_DIST" --load "$SAVE" --save "$SAVE" --save-interval 20 "$@")

# A start checks with slime's own interpreter; the dry run needs r3_adapter alone.
[ "${DRY_RUN:-0}" != 1 ] || CHECK_PYTHON=${R3_PYTHON:-.venv/bin/python}
export PYTHONPATH="$MEGATRON_DIR:$SLIME_DIR${PYTHONPATH:+:$PYTHONPATH}" CUDA_DEVICE_MAX_CONNECTIONS=1
r3_framework r3_adapter.frameworks.slime.flags "$SLIME_DIR/train.py"
