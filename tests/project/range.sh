#!/usr/bin/env bash
# The suite's core with the oldest and the newest torch, timm and Pillow that pyproject.toml allows: range.sh [oldest|newest]
# Each end has a virtual environment in build/range; pip brings the packages. PYTHON names the interpreter.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}

declare -A packages=(
    # the oldest Pillow with wheels for Python 3.11
    [oldest]="torch==2.10.0 timm==1.0.26 pillow==9.4.0"
    [newest]="torch timm pillow"
)
# test_timm.py asks of a model what the newest timm has.
tests=(tests/kernels/test_dispatch.py tests/kernels/test_autotune.py tests/kernels/ops tests/models
    --ignore=tests/models/test_timm.py)

for end in ${1:-oldest newest}; do
    folder=build/range/$end
    [[ -x $folder/bin/python ]] || "$python" -m venv "$folder"
    # shellcheck disable=SC2086
    "$folder/bin/python" -m pip install --quiet --upgrade ${packages[$end]} \
        numpy safetensors hypothesis pytest pytest-timeout
    make core PYTHON="$folder/bin/python"
    echo "== $end: $("$folder/bin/python" -m pip list 2>/dev/null | grep -iE '^(torch|timm|pillow) ' | tr -s ' ' | tr '\n' ' ')"
    PYTHONPATH=$PWD "$folder/bin/python" -m pytest -q "${tests[@]}"
done
