#!/usr/bin/env bash
# Makes .venv and installs the project into it; quick when nothing has changed. Sourced by demo.sh and test.sh.
#   DIFFOPD_TORCH=cpu|cuda     which torch (default: cuda where an NVIDIA GPU answers, else cpu)
#   DIFFOPD_TORCH_INDEX=URL    an index that serves torch builds of that kind, where the default one serves the other
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
index_file=.venv/.diffopd-torch-index
wanted="$torch_kind $(cat pyproject.toml scripts/constraints.txt | cksum)"
made_for=$(cut -d' ' -f1 "$stamp" 2>/dev/null || true)
index=${DIFFOPD_TORCH_INDEX:+$(echo "$DIFFOPD_TORCH_INDEX" | cksum)}

# pip calls any torch of the right version satisfied, whatever it was built for: another kind or index starts anew.
if [ -n "$made_for" ]; then
    if [ "$made_for" != "$torch_kind" ]; then
        echo "Making .venv anew: it holds what was made for $made_for, and $torch_kind is wanted."
        rm -rf .venv
    elif [ -n "$index" ] && [ "$index" != "$(cat "$index_file" 2>/dev/null || true)" ]; then
        echo "Making .venv anew: DIFFOPD_TORCH_INDEX is another one."
        rm -rf .venv
    fi
fi
if [ "$(cat "$stamp" 2>/dev/null || true)" != "$wanted" ]; then
    echo "Setting up .venv ($torch_kind torch); this takes a few minutes the first time."
    [ -x .venv/bin/python ] || "$(find_python)" -m venv .venv
    echo "$torch_kind unfinished" > "$stamp"
    echo "$index" > "$index_file"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check \
        ${DIFFOPD_TORCH_INDEX:+--index-url "$DIFFOPD_TORCH_INDEX"} "$torch_requirement"
    .venv/bin/python -m pip freeze | grep '^torch==' > .venv/torch-constraint.txt
    .venv/bin/python -m pip install --quiet --disable-pip-version-check \
        -c scripts/constraints.txt -c .venv/torch-constraint.txt -e ".[test]"
    built_for=$(.venv/bin/python -c 'import torch; print("cuda" if torch.version.cuda else "cpu")')
    echo "Installed $(cat .venv/torch-constraint.txt), a $built_for build."
    if [ "$built_for" != "$torch_kind" ]; then
        echo "Wanted was a $torch_kind build. To get one, set DIFFOPD_TORCH_INDEX to an index of $torch_kind builds of" \
            "torch and start again." >&2
        if [ "${DIFFOPD_TORCH:-}" = cuda ]; then
            exit 1
        fi
        echo "Going on with this one: it runs on a CPU as well." >&2
    fi
    echo "$wanted" > "$stamp"
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false
