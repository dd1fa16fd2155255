#!/usr/bin/env bash
# Print the first Python 3.LEAST to 3.MOST: .ci/python.sh LEAST MOST. $PYTHON comes first.
for candidate in ${PYTHON:+"$PYTHON"} python3 python3.11 python3.12 python3.13; do
  if "$candidate" -c 'import sys; a, b = map(int, sys.argv[1:]); sys.exit(not (3, a) <= sys.version_info[:2] <= (3, b))' \
    "$1" "$2" 2>/dev/null; then
    printf '%s\n' "$candidate"
    exit 0
  fi
done
echo "Python 3.$1 to 3.$2 is needed; name one: PYTHON=python3.12 ..." >&2
exit 1
