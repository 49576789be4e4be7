"""Coverage-guided fuzzing (atheris) of every reader of a model folder, until it is stopped or finds something.

python tools/fuzz.py [FILE OF A FOLDER] [options of atheris, such as -max_total_time=600 -rss_limit_mb=4096]
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import atheris

TESTS = Path(__file__).parents[1] / "tests"
sys.path += [str(TESTS), str(TESTS / "fuzz")]

with atheris.instrument_imports(include=["squawq"]):
    from readers import COMMANDS, quantized_folder, read


def main() -> None:
    given = [argument for argument in sys.argv[1:] if argument in COMMANDS]
    place = Path(tempfile.mkdtemp(prefix="squawq-fuzz-"))
    if child := os.fork():  # Fuzz() does not return and ends its process without cleanup
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        shutil.rmtree(place, ignore_errors=True)
        sys.exit(code)
    names = given or list(COMMANDS)
    folder, seeds = quantized_folder(place / "model"), place / "seeds"
    seeds.mkdir()
    for index, name in enumerate(names):
        good = (folder / name).read_bytes() if (folder / name).exists() else json.dumps({}).encode()
        (seeds / name).write_bytes(bytes([index]) + good)

    def one(data: bytes) -> None:
        if data:
            read(folder, names[data[0] % len(names)], data[1:])

    options = [argument for argument in sys.argv if argument not in COMMANDS]
    atheris.Setup([*options, "-timeout=120", "-max_len=150000", str(seeds)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
