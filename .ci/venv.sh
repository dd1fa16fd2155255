#!/usr/bin/env bash
# A virtual environment in FOLDER, made anew if an earlier one is incomplete. VENV may be set for something else: a
# folder with anything that this script did not make is refused, because `venv --clear` would empty it.
#
#   .ci/venv.sh PYTHON FOLDER
set -euo pipefail
python=$1 folder=$2
if [ ! -e "$folder/.made-for-seal-nb" ] && ! compgen -G "$folder/.installed*" >/dev/null && [ -n "$(ls -A "$folder" 2>/dev/null)" ]; then
  echo "venv.sh: $folder exists and was not made here; remove it, or name another folder" >&2
  exit 1
fi
"$python" -m venv --clear "$folder"
touch "$folder/.made-for-seal-nb"
