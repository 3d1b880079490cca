#!/usr/bin/env bash
# Trains a Qwen3-MoE on recorded rollouts in megatron.training's own loop; without a GPU too.
#   launch/pretrain_r3.sh TRACES CHECKPOINT --r3 [ARGUMENT...]
# TRACES: folder that launch/grpo.sh --save-rollouts or r3_adapter.rollout.save_samples wrote. CHECKPOINT: the Hugging Face folder that they
# were rolled out with, which says the model's shape.
# --r3 replays the rollouts' experts; without it routers select. ARGUMENTs go to launch/pretrain_r3.py behind the ones below, which they
# override: parallel sizes, --save, --load, --train-iters, --tensorboard-dir ...
# WORLD_SIZE: number of ranks, on this machine; the default is 2.
# PYTHON: an interpreter that has the package and megatron.training. Default: that of .venv-3.12, which PYTHON=python3.12 launch/test.sh makes.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=${PYTHON:-$root/.venv-3.12/bin/python}
WORLD_SIZE=${WORLD_SIZE:-2}

refuse() {
    echo "pretrain_r3: $*" >&2
    exit 2
}

source "$root/launch/help.sh"
r3_help "" "$@"
[ $# -ge 2 ] && [[ $1 != -* && $2 != -* ]] || refuse "wants two folders: launch/pretrain_r3.sh TRACES CHECKPOINT --r3 [ARGUMENT...]"
[[ $WORLD_SIZE =~ ^[1-9][0-9]*$ ]] || refuse "WORLD_SIZE '$WORLD_SIZE' is no number of ranks"
command -v "$PYTHON" >/dev/null || refuse "no interpreter $PYTHON: set PYTHON, or make .venv-3.12 with PYTHON=python3.12 launch/test.sh"
"$PYTHON" -c 'import sys, importlib.util; sys.exit(importlib.util.find_spec("r3_adapter") is None)' 2>/dev/null \
    || refuse "$PYTHON has no package r3_adapter: set PYTHON to the interpreter of an environment that has it"
traces=$1 checkpoint=$2
shift 2
flags=$("$PYTHON" -W ignore -m r3_adapter.megatron.pretrain_flags "$traces" "$checkpoint") || exit 2
mapfile -t MODEL_ARGS <<<"$flags"

MOE_ARGS=(
    --moe-router-dtype fp32
    --moe-router-load-balancing-type none
    --moe-token-dispatcher-type alltoall
)
TRAINING_ARGS=(
    --seq-length 128
    --micro-batch-size 2
    --global-batch-size 16
    --train-iters 10
    --lr 1e-4 --lr-decay-style constant --weight-decay 0 --clip-grad 1.0
    --calculate-per-token-loss
    --eval-iters 0 --eval-interval 1000
    --log-interval 1 --log-throughput
    --sequence-parallel
    --attention-dropout 0 --hidden-dropout 0
)
DATA_ARGS=(
    --r3-traces "$traces"
    --r3-hf-checkpoint "$checkpoint"
)
if nvidia-smi -L >/dev/null 2>&1; then
    DEVICE_ARGS=(--bf16)
else
    DEVICE_ARGS=(
        --distributed-backend gloo
        --transformer-impl local
        --use-cpu-initialization
        --num-workers 0
        --no-masked-softmax-fusion --no-bias-swiglu-fusion --no-bias-dropout-fusion --no-rope-fusion
        --no-persist-layer-norm --no-gradient-accumulation-fusion
    )
    export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo} OMP_NUM_THREADS=1
fi

# Megatron wants one hardware queue for tensor and context parallelism on GPUs before Blackwell.
export CUDA_DEVICE_MAX_CONNECTIONS=1
# One process a rank; if one ends, so do the others.
exec "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$WORLD_SIZE" "$root/launch/pretrain_r3.py" \
    "${MODEL_ARGS[@]}" "${MOE_ARGS[@]}" "${TRAINING_ARGS[@]}" "${DATA_ARGS[@]}" "${DEVICE_ARGS[@]}" "$@"
