#!/usr/bin/env bash
# From nothing to a real SGLang rollout replayed in real Megatron-core, with EP 2 on two processes; no GPU needed.
# Arguments go to launch/quickstart.py (--help shows them); results are in quickstart/.
set -euo pipefail
source "$(dirname "$0")/help.sh"
r3_help launch/quickstart.py "$@"
source "$(dirname "$0")/setup.sh"
r3_setup
exec "$VENV/bin/python" launch/quickstart.py "$@"
