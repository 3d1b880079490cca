#!/usr/bin/env bash
# Asks a machine with GPUs all that docs/gpu.md lists and that their number allows, each item in a process of its own with a time limit, and
# writes a record with the date: docs/gpu/DATE-GPU.json, and from all records the tables of docs/gpu.md. On one GPU it ends in 10 minutes.
#
#   ./launch/gpu.sh                 sets up first, see launch/setup.sh
#   ./launch/gpu.sh --no-setup      takes what PYTHON has installed, for a machine without a registry; engines may lie on PYTHONPATH
#   ./launch/gpu.sh --rehearse      without a GPU: every item, smaller; nothing is recorded
#   ./launch/gpu.sh --list          what there is, and what this machine cannot run
#   ./launch/gpu.sh --page          writes the tables of docs/gpu.md again, from the records
#
# More flags: --help. SGLANG_ARGS: what SGLang needs on this machine, as JSON, for instance '{"attention_backend": "triton"}'.
set -euo pipefail
cd "$(dirname "$0")/.."
setup=1
for word in "$@"; do
    case $word in --no-setup | --list | --page | --help | -h) setup=0 ;; esac
done
if [ "$setup" = 1 ]; then
    source launch/setup.sh
    r3_setup
    PYTHON=$VENV/bin/python
elif [ -z "${PYTHON:-}" ] && [ -x .venv/bin/python ]; then
    PYTHON=.venv/bin/python
fi
exec "${PYTHON:-python3}" launch/gpu.py "$@"
