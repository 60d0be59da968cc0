#!/usr/bin/env bash
# The suite's core with the oldest and the newest torch, timm and Pillow that pyproject.toml allows: range.sh [oldest|newest]
# Each end has a virtual environment in build/range; pip brings the packages. PYTHON names the interpreter.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}

# What pyproject.toml asks for, with the versions of one end; the extras are what the tests below import.
requirements() {
    "$python" - "$1" <<'PYTHON'
import re, sys, tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
ranges = project["dependencies"]
if sys.argv[1] == "oldest":
    ranges = [re.sub(r"^(torch|timm|pillow)>=", r"\1==", entry) for entry in ranges]
    assert sum("==" in entry for entry in ranges) == 3, ranges
extras = project["optional-dependencies"]
print(*ranges, *extras["train"], *extras["dense"], "hypothesis", "pytest", "pytest-timeout", "pytest-xdist", sep="\n")
PYTHON
}

# test_timm.py asks of a model what the newest timm has.
# The compiled core depends on no torch; what Dynamo and Triton compile does.
tests=(tests/kernels/test_*.py tests/kernels/ops tests/kernels/backend/cufft tests/kernels/graph tests/models tests/inference
    tests/data tests/utils --ignore=tests/models/test_timm.py)

for end in ${1:-oldest newest}; do
    folder=build/range/$end
    [[ -x $folder/bin/python ]] || "$python" -m venv "$folder"
    requirements "$end" > "$folder/requirements.txt"
    "$folder/bin/python" -m pip install --quiet --upgrade --requirement "$folder/requirements.txt"
    make core PYTHON="$folder/bin/python"
    echo "== $end: $("$folder/bin/python" -m pip list 2>/dev/null | grep -iE '^(torch|triton|timm|pillow) ' | tr -s ' ' | tr '\n' ' ')"
    PYTHONPATH=$PWD OMP_NUM_THREADS=1 "$folder/bin/python" -m pytest -q --numprocesses logical --maxprocesses 8 \
        --dist worksteal "${tests[@]}"  # a worker a core, as `make test`
done
