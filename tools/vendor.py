"""Copies the web pages' libraries from npm into src/squawq/serve/web/vendor/, unchanged, and records their hashes.

    python tools/vendor.py             # downloads each package with `npm pack`
    python tools/vendor.py FOLDER      # takes FOLDER/NAME-VERSION.tgz where it is there

To update a library, change its version here and run this. A test compares the files with vendor/README.md.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

VENDOR = Path(__file__).parents[1] / "src" / "squawq" / "serve" / "web" / "vendor"
ABOUT = """# Libraries of the web pages

Other projects' files, unchanged, each folder with its licence. `tools/vendor.py` writes this folder from npm's packages
and this file from what it copied; do not edit them by hand.

| file | package | file in the package | licence | SHA-256 |
|-|-|-|-|-|
"""


@dataclass(frozen=True)
class Package:
    """A package of npm and the files that are taken from it: names in the package, by their names here."""

    name: str
    version: str
    licence: str
    files: dict[str, str]

    @property
    def folder(self) -> str:
        """Its folder here: the name without a scope."""
        return self.name.removeprefix("@").replace("/", "-")

    @property
    def archive(self) -> str:
        """What `npm pack` calls it."""
        return f"{self.folder}-{self.version}.tgz"


LANGUAGES = (
    *("bash", "c", "cpp", "csharp", "css", "diff", "dockerfile", "go", "ini", "java", "javascript", "json"),
    *("python", "ruby", "rust", "shell", "sql", "typescript", "xml", "yaml"),
)
PACKAGES = (
    Package("marked", "18.2.1", "MIT", {"marked.esm.js": "lib/marked.esm.js", "LICENSE": "LICENSE"}),
    Package(
        "dompurify",
        "3.5.0",
        "Apache-2.0 or MPL-2.0",
        {"purify.min.js": "dist/purify.min.js", "LICENSE": "LICENSE", "LICENSE-MPL": "LICENSE-MPL"},
    ),
    Package(
        "@highlightjs/cdn-assets",
        "11.12.0",
        "BSD-3-Clause",
        {
            "core.min.js": "es/core.min.js",
            **{f"languages/{name}.min.js": f"es/languages/{name}.min.js" for name in LANGUAGES},
            "LICENSE": "LICENSE",
        },
    ),
    Package(
        "swagger-ui-dist",
        "5.35.0",
        "Apache-2.0",
        {
            "swagger-ui-bundle.js": "swagger-ui-bundle.js",
            "swagger-ui-bundle.js.LICENSE.txt": "swagger-ui-bundle.js.LICENSE.txt",
            "swagger-ui.css": "swagger-ui.css",
            "LICENSE": "LICENSE",
            "NOTICE": "NOTICE",
        },
    ),
)


def archive(package: Package, given: Path | None, downloads: Path) -> Path:
    """The package's archive: the given folder's, or downloaded."""
    if given is not None and (given / package.archive).is_file():
        return given / package.archive
    command = ["npm", "pack", f"{package.name}@{package.version}", "--pack-destination", str(downloads), "--silent"]
    subprocess.run(command, check=True)
    return downloads / package.archive


def copy(package: Package, packed: Path) -> list[str]:
    """Copy the package's files; their rows of the README."""
    rows = []
    with tarfile.open(packed) as opened:
        for name, inside in package.files.items():
            member = opened.extractfile(f"package/{inside}")
            assert member is not None, f"{package.archive} has no file {inside}"
            content = member.read()
            target = VENDOR / package.folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
            digest = hashlib.sha256(content).hexdigest()
            source = f"{package.name} {package.version}"
            rows.append(f"| {package.folder}/{name} | {source} | {inside} | {package.licence} | {digest} |\n")
    return rows


def main(given: Path | None) -> None:
    """Write the folder anew."""
    with tempfile.TemporaryDirectory() as downloads:
        archives = [archive(package, given, Path(downloads)) for package in PACKAGES]
        shutil.rmtree(VENDOR, ignore_errors=True)
        rows = [row for package, packed in zip(PACKAGES, archives, strict=True) for row in copy(package, packed)]
    (VENDOR / "README.md").write_text(ABOUT + "".join(rows), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
