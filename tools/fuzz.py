"""Coverage-guided fuzzing of every reader of a model folder, by atheris, until it is stopped or something is found.

python tools/fuzz.py [FILE OF A FOLDER] [atheris' options, such as -max_total_time=600 -rss_limit_mb=4096]
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

import atheris

TESTS = Path(__file__).parents[1] / "tests"
sys.path += [str(TESTS), str(TESTS / "fuzz")]

with atheris.instrument_imports(include=["squawq"]):
    from readers import COMMANDS, read

    from squawq.demo import demo_model


def main() -> None:
    given = [argument for argument in sys.argv[1:] if argument in COMMANDS]
    names = given or list(COMMANDS)
    folder = Path(tempfile.mkdtemp(prefix="squawq-fuzz-")) / "model"
    shutil.copytree(demo_model(), folder)
    shutil.copyfile(folder / "config.json", folder / "good.json")
    seeds = folder.parent / "seeds"
    seeds.mkdir()
    for index, name in enumerate(names):
        good = (folder / name).read_bytes()[:100_000] if (folder / name).exists() else json.dumps({}).encode()
        (seeds / name).write_bytes(bytes([index]) + good)

    def one(data: bytes) -> None:
        if data:
            read(folder, names[data[0] % len(names)], data[1:])

    options = [argument for argument in sys.argv if argument not in COMMANDS]
    atheris.Setup([*options, "-timeout=60", str(seeds)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
