#!/usr/bin/env bash
# Make a virtual environment with vLLM for CPU and this project: tools/setup_venv.sh VENV
# Run by `make`, which keeps a stamp; running it again repairs an environment. $PYTHON names the interpreter, and
# $VLLM_RELEASE one of the releases in tools/releases.toml (with a wheel for CPUs) instead of the reference.
set -euo pipefail

venv=${1:?usage: tools/setup_venv.sh VENV}
cd "$(dirname "$0")/.."

supported() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

find_python() {
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        supported "$PYTHON" && echo "$PYTHON" && return
        echo "PYTHON must be a Python 3.11 to 3.13, got '$PYTHON' ($("$PYTHON" --version 2>&1 | head -n 1 || true))" >&2
        return 1
    fi
    for candidate in python3 python3.12 python3.11 python3.13; do
        if command -v "$candidate" >/dev/null && supported "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    echo "Python 3.11 to 3.13 is needed and none was found; install one, or name it: make PYTHON=/path/to/python3.12 ..." >&2
    return 1
}

if ! supported "$venv/bin/python"; then
    python=$(find_python)
    echo "== creating $venv with $("$python" --version)"
    "$python" -m venv --clear "$venv" || {
        echo "can't create $venv: on Debian and Ubuntu the package python3-venv is needed" >&2
        exit 1
    }
fi
python=$venv/bin/python

vllm=$("$python" tools/vllm_releases.py requirement ${VLLM_RELEASE:+"$VLLM_RELEASE"})
echo "== installing $vllm and glassbox into $venv (a few minutes the first time)"
tools/install_cpu.sh "$python" "$vllm" -e '.[cpu,dev]'
