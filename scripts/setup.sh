#!/usr/bin/env bash
# Makes .venv and installs the project into it; quick when nothing has changed. Sourced by demo.sh and test.sh.
#   DIFFOPD_TORCH=cpu|cuda     which torch (default: cuda where an NVIDIA GPU answers, else cpu)
#   DIFFOPD_TORCH_INDEX=URL    an index that serves CPU builds of torch, where the default one serves CUDA builds
#   DIFFOPD_PYTHON=python3.12  which Python makes the environment (3.11 or newer)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

find_python() {
    for candidate in "${DIFFOPD_PYTHON:-}" python3 python3.11 python3.12 python3.13; do
        if [ -n "$candidate" ] && command -v "$candidate" >/dev/null &&
            "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "diffopd needs Python 3.11 or newer; set DIFFOPD_PYTHON to one." >&2
    return 1
}

torch_kind=${DIFFOPD_TORCH:-cpu}
if [ -z "${DIFFOPD_TORCH:-}" ] && command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then
    torch_kind=cuda
fi
case $torch_kind in
    cpu) torch_requirement="torch==2.13.0" ;;
    cuda) torch_requirement="torch>=2.13" ;;
    *) echo "DIFFOPD_TORCH is '$torch_kind'; allowed are cpu and cuda." >&2; exit 2 ;;
esac

stamp=.venv/.diffopd-installed
wanted="$torch_kind $(cat pyproject.toml scripts/constraints.txt | cksum)"
if [ "$(cat $stamp 2>/dev/null || true)" != "$wanted" ]; then
    echo "Setting up .venv ($torch_kind torch); this takes a few minutes the first time."
    [ -x .venv/bin/python ] || "$(find_python)" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check \
        ${DIFFOPD_TORCH_INDEX:+--index-url "$DIFFOPD_TORCH_INDEX"} "$torch_requirement"
    .venv/bin/python -m pip freeze | grep '^torch==' > .venv/torch-constraint.txt
    .venv/bin/python -m pip install --quiet --disable-pip-version-check \
        -c scripts/constraints.txt -c .venv/torch-constraint.txt -e ".[test]"
    echo "$wanted" > $stamp
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false
