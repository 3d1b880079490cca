# Sourced by the scripts for real models, which say what a model needs: a layout, rollouts, a policy. What they share is here.
#
# In a script: r3_model first, then LAYOUT_ARGS, ROLLOUT_ARGS, POLICY_ARGS and PLAN_ARGS, then r3_start "$@", which plans (DRY_RUN=1) or
# starts launch/grpo.py. A plan looks at the checkpoint where HF_CHECKPOINT is given, not at the default of a script, which is seldom on the
# machine that plans. Scripts for slime and verl set FLAGS and end with r3_framework.
#
# What may be set in the environment, and what it is otherwise, see r3_model. TASK: "package.module:Class" of your own, see
# r3_adapter/rl/tasks.py:Task; with --prompt-data among the flags it is not used.
# R3: the r3 command; PYTHON: an interpreter that has the package. Default: those of .venv, which launch/setup.sh makes.

source "$(dirname "${BASH_SOURCE[0]}")/help.sh"
r3_help "" "$@"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
R3_GIVEN_CHECKPOINT=${HF_CHECKPOINT:-}

# r3_model NAME CHECKPOINT NODES MEMORY: take what the environment sets, else what this model has: its folder, the nodes and the GiB of a GPU.
r3_model() {
    HF_CHECKPOINT=${HF_CHECKPOINT:-$2}
    RUN_DIR=${RUN_DIR:-runs/$1}
    MODEL_CONFIG=${MODEL_CONFIG:-launch/configs/$1.json}
    TASK=${TASK:-sort}
    NUM_NODES=${NUM_NODES:-$3}
    GPUS_PER_NODE=${GPUS_PER_NODE:-8}
    GPU_MEMORY_GIB=${GPU_MEMORY_GIB:-$4}
    # One node starts a cluster of its own; so does an address that is set and empty.
    [ "$3" = 1 ] || RAY_ADDRESS=${RAY_ADDRESS-auto}
    R3_ARGS=(--r3 --r3-staleness refuse)
}

# Print a command as it can be pasted, one flag a line.
r3_show() {
    local word
    printf '\nwould run:\n\n   '
    for word in "$@"; do
        [[ $word != --* ]] || printf ' \\\n        '
        if [[ $word =~ ^[A-Za-z0-9_./:=-]+$ ]]; then printf ' %s' "$word"; else printf " '%s'" "${word//\'/\'\\\'\'}"; fi
    done
    printf '\n\n'
}

r3_start() {
    local flags=("${R3_ARGS[@]}" "${LAYOUT_ARGS[@]}" "${ROLLOUT_ARGS[@]}" "${POLICY_ARGS[@]}")
    local run=(--save "$RUN_DIR" --task "$TASK" --gpus-per-rank 1)
    [ -z "${RAY_ADDRESS:-}" ] || run+=(--ray-address "$RAY_ADDRESS")
    if [ "${DRY_RUN:-0}" = 1 ]; then
        local plan=(--model-config "$MODEL_CONFIG" --num-nodes "$NUM_NODES" --gpus-per-node "$GPUS_PER_NODE")
        plan+=(--gpu-memory-gib "$GPU_MEMORY_GIB")
        [ -z "$R3_GIVEN_CHECKPOINT" ] || plan+=(--hf-checkpoint "$R3_GIVEN_CHECKPOINT")
        "${R3:-.venv/bin/r3}" plan "${plan[@]}" "${PLAN_ARGS[@]}" "${run[@]}" "${flags[@]}" "$@"
        run=(--hf-checkpoint "$HF_CHECKPOINT" "${run[@]}")
        r3_show "${PYTHON:-.venv/bin/python}" launch/grpo.py "${run[@]}" "${flags[@]}" "$@"
        return
    fi
    run=(--hf-checkpoint "$HF_CHECKPOINT" "${run[@]}")
    if [ -z "${PYTHON:-}" ]; then
        source launch/setup.sh
        r3_setup
    fi
    exec "${PYTHON:-.venv/bin/python}" launch/grpo.py "${run[@]}" "${flags[@]}" "$@"
}

# r3_framework CHECK WORD...: check FLAGS with our module CHECK, run by CHECK_PYTHON; then start PYTHON WORD... with them, or print that
# command (DRY_RUN=1).
r3_framework() {
    local check=$1
    shift
    if ! command -v "${CHECK_PYTHON:-$PYTHON}" >/dev/null; then
        echo "no interpreter ${CHECK_PYTHON:-$PYTHON}: ./launch/quickstart.sh makes .venv; R3_PYTHON or PYTHON names another" >&2
        return 2
    fi
    "${CHECK_PYTHON:-$PYTHON}" -W ignore -m "$check" "${FLAGS[@]}"
    if [ "${DRY_RUN:-0}" = 1 ]; then
        r3_show "$PYTHON" "$@" "${FLAGS[@]}"
        return
    fi
    exec "$PYTHON" "$@" "${FLAGS[@]}"
}
