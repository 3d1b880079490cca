#!/usr/bin/env bash
# All tests that need no GPU, the real engines among them. Arguments go to pytest (-m "not engine" for the quick ones; -n 0 for one
# after the other, in this process).
set -euo pipefail
source "$(dirname "$0")/help.sh"
r3_help "" "$@"
source "$(dirname "$0")/setup.sh"
r3_setup
r3_say "format, lint, types"
"$VENV/bin/ruff" format --check .
"$VENV/bin/ruff" check .
"$VENV/bin/mypy"
find cpp -name '*.[ch]pp' -print0 | xargs -0 "$VENV/bin/clang-format" --dry-run -Werror
r3_say "tests"
r3_pytest "$@"
