"""Texts of several kinds for `quality.py --real`: the first part of each is for calibration, the last for tests.

    python benchmarks/texts.py FOLDER [--data ../shared/data]    writes one file per source

The files are for a tool that leaves only the tokens of given texts in a model's vocabulary. Such a folder has no
tokenizer; its rows.json has the texts as token rows: {source: [[token, ...], ...]}. All rows begin with the same token
if the model has one that begins texts.
"""

from __future__ import annotations

import argparse
import json
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from html import unescape
from itertools import chain
from pathlib import Path
from random import Random
from zipfile import ZipFile

from squawq.quantization.calibration import builtin_rows
from squawq.text.tokenizer import Tokenizer

LENGTH = 512  # tokens in a row
CALIBRATION_SHARE = 0.6  # of a source; the rest is for tests
CHARACTERS = 200_000  # of a source in a kind with several
BUILT_IN = "built-in"  # squawq's calibration set; nothing of it is for tests
KINDS: dict[str, tuple[str, ...]] = {  # sources by kind of text
    BUILT_IN: ("built_in",),
    "wiki": ("wiki",),
    "mixture": ("maths", "plays", "stories"),
    "languages": ("finnish", "french", "german", "portuguese"),
    "code": ("code",),
}
TEST_ROWS = {"wiki": 96, "mixture": 56, "languages": 56, "code": 56}
MODULES = (  # of Python's standard library
    *("argparse", "ast", "calendar", "configparser", "difflib", "doctest", "enum", "fractions", "inspect", "ipaddress"),
    *("optparse", "pickle", "random", "shutil", "statistics", "subprocess", "tarfile", "textwrap", "threading"),
)
Rows = list[list[int]]


def built_in() -> str:
    """The built-in calibration set; a chat as "role: content", as for a model without chat template."""
    rows = [[{"content": row}] if isinstance(row, str) else row for row in builtin_rows()]
    return "\n\n".join(": ".join(filter(None, (part.get("role"), part["content"]))) for row in rows for part in row)


def maths(path: Path) -> str:
    """Questions and answers of GSM8K."""
    tasks = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return "\n\n".join(f"{task['question']}\n{task['answer']}" for task in tasks)


def stories(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="ignore").replace("<|endoftext|>", "\n")


def genesis(path: Path, language: str) -> str:
    """The first book of the Bible in a language."""
    with ZipFile(path) as archive:
        raw = archive.read(f"genesis/{language}.txt")
    try:
        return unescape(raw.decode())
    except UnicodeDecodeError:
        return unescape(raw.decode("latin-1"))


def code() -> str:
    """The beginnings of modules of this Python's standard library."""
    library = Path(sysconfig.get_path("stdlib"))
    return "\n\n".join((library / f"{name}.py").read_text(encoding="utf-8")[:24_000] for name in MODULES)


def sources(data: Path) -> dict[str, str]:
    """Texts by source; sources whose file is not in `data` are left out."""
    books = data / "nltk-public-domain" / "genesis.zip"
    files: dict[str, tuple[Path, Callable[[Path], str]]] = {
        "wiki": (data / "wikitext2-valid" / "wiki.valid.raw", Path.read_text),
        "maths": (data / "gsm8k" / "train.jsonl", maths),
        "plays": (data / "tinyshakespeare" / "tinyshakespeare.txt", Path.read_text),
        "stories": (data / "tinystories-text" / "tinystories_train_2MiB.txt", stories),
        **{language: (books, partial(genesis, language=language)) for language in KINDS["languages"]},
    }
    read = {name: reader(path) for name, (path, reader) in files.items() if path.exists()}
    shared = {name for kind in KINDS.values() if len(kind) > 1 for name in kind}
    cut = {name: text[:CHARACTERS] if name in shared else text for name, text in read.items()}
    return {"built_in": built_in(), **cut, "code": code()}


@dataclass(frozen=True)
class Texts:
    """Token streams by source. `first` is what every row begins with: one token, or none."""

    streams: Mapping[str, Sequence[int]]
    first: tuple[int, ...] = ()

    @classmethod
    def of(cls, model: Path, data: Path) -> Texts:
        """From rows.json in the model's folder, else from the texts in `data` by the model's tokenizer."""
        if (packed := model / "rows.json").exists():
            return cls.of_rows(json.loads(packed.read_text()))
        tokenizer = Tokenizer(model)
        letter, marked = tokenizer.encode("a", special=False), tokenizer.encode("a")
        streams = {name: tokenizer.encode(text, special=False) for name, text in sources(data).items()}
        return cls(streams, tuple(marked[: marked.index(letter[0])]))

    @classmethod
    def of_rows(cls, packed: Mapping[str, Rows]) -> Texts:
        """From token rows by source, without their first token if all share it."""
        begins = {row[0] for rows in packed.values() for row in rows}
        first = tuple(begins) if len(begins) == 1 else ()
        return cls({name: [i for row in rows for i in row[len(first) :]] for name, rows in packed.items()}, first)

    def kinds(self) -> list[str]:
        """The kinds of which there is every source."""
        return [kind for kind, names in KINDS.items() if all(name in self.streams for name in names)]

    def calibration(self, kind: str, rows: int, seed: int) -> Rows:
        """Up to `rows` rows. The seed decides where the texts are cut into rows, which are taken, and their order."""
        random = Random(f"{kind} {seed}")
        share = 1.0 if kind == BUILT_IN else CALIBRATION_SHARE
        parts = [self.streams[name] for name in KINDS[kind]]
        begins = [random.randrange(LENGTH) for _ in parts]
        found = [
            row
            for part, begin in zip(parts, begins, strict=True)
            for row in self._cut(part[begin : int(share * len(part))])
        ]
        return random.sample(found, min(rows, len(found)))

    def test(self, kind: str, rows: int) -> Rows:
        """Up to `rows` rows, an equal number of each source, evenly spread over its last part."""
        names = KINDS[kind]
        each = [rows // len(names) + (index < rows % len(names)) for index in range(len(names))]
        parts = [self.streams[name] for name in names]
        cut = [list(self._cut(part[int(CALIBRATION_SHARE * len(part)) :])) for part in parts]
        return list(chain.from_iterable(spread(some, most) for some, most in zip(cut, each, strict=True)))

    def _cut(self, ids: Sequence[int]) -> Iterator[list[int]]:
        step = LENGTH - len(self.first)
        for start in range(0, len(ids) - step + 1, step):
            yield [*self.first, *ids[start : start + step]]


def spread(rows: Rows, most: int) -> Rows:
    """At most so many rows, from the first on at equal distances."""
    return rows if len(rows) <= most else [rows[index * len(rows) // most] for index in range(most)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared" / "data")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    for name, text in sources(args.data).items():
        (args.folder / f"{name}.txt").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
