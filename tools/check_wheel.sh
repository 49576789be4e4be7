#!/bin/sh
# Builds the wheels of squawq and squawq-demo, installs them into a new environment, runs `squawq demo` there without the
# Hub, and then the tests against the installed packages. Takes some minutes; `make wheel`.
#
#   tools/check_wheel.sh [PYTHON [TEST FILE]...]     # default: python3, all tests
set -eu
cd "$(dirname "$0")/.."
unset PYTHONPATH
python=${1:-python3}
[ $# -eq 0 ] || shift
build=build/wheel
rm -rf "$build"
"$python" -m venv "$build/venv"
installed=$build/venv/bin/python
pip="$installed -m pip --disable-pip-version-check"

$pip wheel --quiet --no-deps --wheel-dir "$build" ./packages/demo .
ls -l "$build"/*.whl
$pip install --quiet -r constraints.txt
$pip install --quiet -c constraints.txt "$build"/squawq_demo-*.whl "$(echo "$build"/squawq-*.whl)[dev]"
"$installed" - <<'END'
from pathlib import Path

import squawq
import squawq_demo
from squawq.backends.cpu import library

for path in (Path(squawq.__file__), squawq_demo.FOLDER):
    assert "site-packages" in path.parts, path
print(f"squawq {squawq.__version__}, kernels: {library.required() and library.isa()}")
END
HF_HUB_OFFLINE=1 "$build/venv/bin/squawq" demo --out "$build/demo"
"$installed" -m pytest -n auto "$@"
