#!/usr/bin/env bash
# The main job: three task teachers distilled into one 4-step student. Options go to `diffopd distill together`.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
export HF_HUB_OFFLINE=1
processes=1  # a GPU serves one; on a CPU two cores train twice as many pictures in the same ten minutes
if [ "$torch_kind" = cpu ]; then
    processes=$(.venv/bin/python -c 'import os; print(min(2, os.cpu_count() or 1))')
fi
.venv/bin/diffopd distill together --processes "$processes" "$@"
