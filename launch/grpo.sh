#!/usr/bin/env bash
# GRPO on Ray: SGLang rolls out, Megatron trains with the routes replayed. A tiny model and this machine by default.
# Flags go to launch/grpo.py (--help says which); without --r3 or --r2 routers select for themselves.
set -euo pipefail
source "$(dirname "$0")/help.sh"
r3_help launch/grpo.py "$@"
source "$(dirname "$0")/setup.sh"
r3_setup
exec "$VENV/bin/python" launch/grpo.py "$@"
