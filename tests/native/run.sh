#!/usr/bin/env bash
# Builds check_core in one way or another and runs it: run.sh quick | isa | sanitize
set -euo pipefail
cd "$(dirname "$0")/../.."
unset MAKEFLAGS MAKELEVEL     # of the make this may have been called from
export OMP_WAIT_POLICY=passive # more threads than processors: those that wait must not spin

build() { # NAME FLAGS...
    local out=build/native/$1
    make --silent --jobs="$(nproc)" --file=tests/native/build.mk OUT="$out" FLAGS="${*:2}" "$out/check_core"
}

run() { # NAME COMMAND...
    echo "== $1"
    local start=$SECONDS
    "${@:2}"
    echo "== $1: passed, $((SECONDS - start)) s"
}

need() { # COMMAND PACKAGE
    command -v "$1" >/dev/null && return
    echo "installing $2"
    { apt-get update --quiet=2 && apt-get install --quiet=2 --yes "$2"; } >/dev/null || {
        echo "$1 is missing and 'apt-get install $2' failed: install it, or run this as root of a Debian or Ubuntu" >&2
        exit 1
    }
}

# Under an emulator. The first line of the output must be of the instruction set that is expected to be the best.
emulated() { # ISA COMMAND...
    local log=build/native/$1.log
    run "$1, emulated" "${@:2}" --quick 2> >(grep -v "TCG doesn't support" >&2) | tee "$log"
    grep -m 1 checks, "$log" | grep -q "^$1 " || {
        echo "expected $1 to be the best instruction set" >&2
        exit 1
    }
}

check_quick() {
    build quick -O1 -fopenmp
    run quick build/native/quick/check_core --quick
}

check_isa() {
    need qemu-x86_64 qemu-user
    need qemu-aarch64 qemu-user
    need aarch64-linux-gnu-g++ g++-aarch64-linux-gnu
    local version
    version=$(qemu-x86_64 --version | sed -n 's/^qemu-x86_64 version \([0-9.]*\).*/\1/p')

    CXX=aarch64-linux-gnu-g++ build aarch64 -O3 -fopenmp
    emulated neon qemu-aarch64 -L /usr/aarch64-linux-gnu build/native/aarch64/check_core
    if [[ $(uname -m) != x86_64 ]]; then
        echo "== avx2, generic: skipped, this machine does not build for x86-64"
        return
    fi
    build x86_64 -O3 -fopenmp
    emulated generic qemu-x86_64 -cpu Nehalem build/native/x86_64/check_core
    if printf '7.2\n%s\n' "$version" | sort --check=quiet --version-sort; then
        emulated avx2 qemu-x86_64 -cpu Haswell build/native/x86_64/check_core
    else
        echo "== avx2: skipped, qemu $version cannot emulate it (7.2 and later can)"
    fi
}

check_sanitize() {
    build asan -O1 -fsanitize=address -fopenmp
    run "addresses" build/native/asan/check_core
    run "addresses, eight threads" build/native/asan/check_core --threads
    build ubsan -O1 -fsanitize=undefined -fno-sanitize-recover=all -fopenmp
    run "undefined behaviour" build/native/ubsan/check_core
    # gcc's OpenMP runtime is not instrumented: its barriers would be reported as races
    build tsan -O1 -g1 -fsanitize=thread
    run "no OpenMP" build/native/tsan/check_core --quick
    run "races" build/native/tsan/check_core --threads
}

"check_${1:?usage: run.sh quick | isa | sanitize}"
