#!/usr/bin/env bash
# Tests every pin, or those that are named (sglang==0.5.23), one after the other, each in its environment. Writes a JSON line a pin to
# stdout, and a table when all are done; fails where one failed. --quick: patches, a proof and back, without the engines' own tests.
# --record: keeps what was found in patches/results.jsonl, and in the table of patches/README.md.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" launch/pins.py "$@"
