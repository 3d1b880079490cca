# Sourced by the scripts for real models: r3_start plans (DRY_RUN=1) or starts launch/grpo.py with the script's flags. A plan looks
# at the checkpoint where HF_CHECKPOINT is given, not at the default of a script, which is seldom on the machine that plans.
#
# R3: the r3 command; PYTHON: an interpreter that has the package. Default: those of .venv, which launch/setup.sh makes.

cd "$(dirname "${BASH_SOURCE[0]}")/.."
R3_GIVEN_CHECKPOINT=${HF_CHECKPOINT:-}

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
