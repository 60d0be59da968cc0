#!/usr/bin/env bash
# Small problems of the GPU's backends under NVIDIA's compute-sanitizer: compute_sanitizer.sh [BACKEND...]
# PYTHON names the interpreter that dfformer is installed for.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}

command -v compute-sanitizer >/dev/null || {
    echo "compute-sanitizer is missing: it comes with the CUDA toolkit (put its bin folder on PATH)" >&2
    exit 1
}
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
    echo "there is no GPU that $python's torch can use" >&2
    exit 1
}

export PYTHONPATH=$PWD/tests${PYTHONPATH:+:$PYTHONPATH}
# Every tensor an allocation of its own, so that the tools see where it ends and what nobody wrote.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
for tool in memcheck racecheck initcheck; do
    echo "== $tool"
    compute-sanitizer --tool "$tool" --error-exitcode 1 "$python" tests/native/sanitized.py "$@"
    echo "== $tool: passed"
done
