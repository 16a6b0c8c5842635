#!/usr/bin/env bash
# The default test suite, a process per core; options go to pytest (`scripts/test.sh -m slow` for the long ones).
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
export HF_HUB_OFFLINE=1
.venv/bin/python -m pytest -n logical --maxprocesses 8 "$@"
