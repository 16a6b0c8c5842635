#!/usr/bin/env bash
# The main job: three task teachers distilled into one 4-step student. Options go to `diffopd distill together`.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
export HF_HUB_OFFLINE=1
.venv/bin/diffopd distill together "$@"
