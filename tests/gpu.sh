#!/usr/bin/env bash
# What needs a GPU, in several processes, then small problems under NVIDIA's compute-sanitizer: gpu.sh [PYTEST ARGUMENT...]
# PYTHON names the interpreter; nothing is installed. SHARDS is the number of processes.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
processors=$(nproc)
shards=${SHARDS:-$((processors < 8 ? processors : 8))}
export DFFORMER_REQUIRE=${DFFORMER_REQUIRE-cuda,cufft} OMP_NUM_THREADS=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

logs=build/test-gpu
mkdir -p "$logs" && rm -f "$logs"/*.log
processes=()
for ((i = 0; i < shards; i++)); do
    DFFORMER_TEST_SHARD=$i/$shards "$python" -m pytest -q -m gpu "$@" >"$logs/$i.log" 2>&1 &
    processes+=($!)
done
failed=0
for ((i = 0; i < shards; i++)); do
    wait "${processes[i]}"
    status=$?
    # 5: no test of this shard needs a GPU
    if ((status != 0 && status != 5)); then
        failed=1
        cat "$logs/$i.log"
    fi
    tail -n 1 "$logs/$i.log"
done
((failed == 0)) || exit 1

if command -v compute-sanitizer >/dev/null; then
    PYTHON=$python tests/native/compute_sanitizer.sh
else
    echo "compute-sanitizer is not on PATH, its checks were not made: it comes with the CUDA toolkit"
fi
