#!/usr/bin/env bash
# The native kernels under sanitizers: AddressSanitizer and UndefinedBehaviorSanitizer below the Python tests (packing,
# products, layers, round_columns), ThreadSanitizer below tools/check_kernels.cpp, since Python and torch are not built
# for it. Needs cmake and gcc. Run as `make sanitize`; takes some minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}

build() {  # name, sanitizers
    cmake -S . -B "build/$1" -DCMAKE_BUILD_TYPE=None -DCMAKE_CXX_COMPILER=g++ -DSQUAWQ_OPTIMIZE=-O1 \
        -DCMAKE_CXX_FLAGS="-g -fno-omit-frame-pointer -fno-sanitize-recover=all -fsanitize=$2"
    cmake --build "build/$1"
}

build sanitize-address address,undefined
build sanitize-thread thread

# libstdc++ too: the sanitizer looks for its functions before anything that needs them is loaded.
runtime="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)"
LD_PRELOAD=$runtime ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 \
    PYTHONPATH=tests PYTHONMALLOC=malloc SQUAWQ_SANITIZED="$PWD/build/sanitize-address/libsquawq.so" \
    "$python" -m pytest -p sanitized -p no:cacheprovider --timeout 0 \
    tests/backends tests/nn/test_decoder.py tests/engine/test_runner.py \
    tests/quantization/test_rounding.py tests/format/test_packing.py

check=build/sanitize-thread/check
g++ -std=c++20 -O1 -g -fsanitize=thread tools/check_kernels.cpp build/sanitize-thread/libsquawq.so \
    -Wl,-rpath,"$PWD/build/sanitize-thread" -pthread -o $check
$check scalar 20
$check "$("$python" -c 'from squawq.backends.cpu import library; print(library.isa())')" 20
