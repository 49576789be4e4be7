#!/bin/sh
# Builds the library and tools/check_kernels.cpp for aarch64 and runs them under an emulator, on a core with the dot product
# instructions and on one without, which must use plain C++.
#
#   tools/check_neon.sh [BUILD FOLDER]        # default: build/neon
set -eu
cd "$(dirname "$0")/.."
build=${1:-build/neon}
compiler=aarch64-linux-gnu-g++
system=/usr/aarch64-linux-gnu # where Debian's cross compiler keeps the libraries of aarch64

missing=
command -v cmake >/dev/null || missing="$missing cmake"
command -v $compiler >/dev/null || missing="$missing g++-aarch64-linux-gnu"
command -v qemu-aarch64 >/dev/null || missing="$missing qemu-user"
if [ -n "$missing" ]; then
    echo "check_neon: not installed:$missing; on Debian and its kin: apt-get install$missing" >&2
    exit 2
fi

cmake -S . -B "$build" -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=$compiler >/dev/null
cmake --build "$build"
$compiler -std=c++20 -O1 -Wall -Wextra tools/check_kernels.cpp "$build/libsquawq.so" -Wl,-rpath,"$(realpath "$build")" -pthread \
    -o "$build/check"
qemu-aarch64 -L $system -cpu max "$build/check" neon

echo "a core without the dot product:"
status=0
qemu-aarch64 -L $system -cpu cortex-a53 "$build/check" neon || status=$?
if [ $status -ne 2 ]; then
    echo "check_neon: NEON was chosen where it cannot run" >&2
    exit 1
fi
qemu-aarch64 -L $system -cpu cortex-a53 "$build/check" scalar 10
