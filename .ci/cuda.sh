#!/usr/bin/env bash
# The CUDA build of torch, in an environment of its own, also on a machine without a GPU. tests/cuda_check runs in it.
#
#   .ci/cuda.sh [FOLDER]        FOLDER: .venv-cuda if not given
#
# Versions are those of pyproject.toml. A machine that keeps wheels of its own for pip may offer a CPU build under the
# same version. uv reads none of pip's settings, so it is asked first; pip is asked where uv cannot be had.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-.venv-cuda}
wanted=$(sed -n '/^dependencies = \[/,/^\]/s/^ *"\(.*\)",$/\1/p; s/^ *"\(pytest.*\|hypothesis.*\)",$/\1/p' pyproject.toml)
stamp=$folder/.installed-$(cksum <<<"$wanted" | cut -d ' ' -f 1)
[ -e "$stamp" ] && exit 0

python=$(.ci/python.sh 11 13)

echo "Making $folder with $("$python" --version) and the CUDA build of torch (once; 5 GB, a minute with a good connection)"
.ci/venv.sh "$python" "$folder"
mapfile -t packages <<<"$wanted"
pip() { "$folder/bin/python" -m pip --disable-pip-version-check --quiet "$@"; }
is_cuda() { "$folder/bin/python" -c 'import sys, torch, triton; sys.exit(torch.version.cuda is None)' 2>/dev/null; }
if ! { pip install uv && "$folder/bin/uv" pip install --quiet --python "$folder/bin/python" "${packages[@]}" && is_cuda; }; then
  echo "cuda.sh: uv did not install it; trying pip" >&2
  pip install "${packages[@]}"
fi
is_cuda || { echo "cuda.sh: what was installed for torch is not a CUDA build; see 'pip config list' for local wheels" >&2; exit 1; }
touch "$stamp"
