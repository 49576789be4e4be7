"""A Hub model whose weight files are fetched when they are opened and deleted when others need their room.

Headers are read from the Hub alone. At most two files lie on disk, or as many as the tensors of one layer are spread
over. Files that the Hub's cache holds are used there, and nothing of it is deleted. Knows no order of layers.
"""

from __future__ import annotations

import hashlib
import re
from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from fnmatch import fnmatch
from functools import cached_property
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING

from squawq.errors import CheckpointError
from squawq.format.reader import Checkpoint
from squawq.format.shards import Stamp, TensorInfo, check_header, open_unchanged, read_header, stamp
from squawq.hub.download import OTHER_LAYOUTS, SMALL, WEIGHTS, fetch, hub_errors, hub_id

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

REQUESTS = 8  # headers asked for at once


def open_streamed(model: str | Path, scratch: Path) -> Checkpoint:
    """A checkpoint whose weights come from the Hub as they are read, through the folder `scratch`.

    A model that is a folder is opened as it is. Raises CheckpointError for what cannot be had.
    """
    if Path(model).is_dir():
        return Checkpoint(model)
    from huggingface_hub import HfApi

    name = hub_id(model)
    with hub_errors(name):
        info = HfApi().model_info(name, files_metadata=True)
    assert info.sha is not None
    folder = fetch(name, SMALL, info.sha)
    here = [file for file in info.siblings or [] if "/" not in file.rfilename and fnmatch(file.rfilename, WEIGHTS)]
    files = {f.rfilename: f for f in here if not any(fnmatch(f.rfilename, other) for other in OTHER_LAYOUTS)}
    return Checkpoint(folder, HubShards(name, info.sha, folder, files, scratch))


class HubShards:
    """The safetensors files of one commit of a Hub model (format/shards.py: Shards)."""

    def __init__(self, repo: str, commit: str, cached: Path, files: Mapping[str, RepoSibling], scratch: Path) -> None:
        self.repo, self.commit, self.cached, self.files, self.scratch = repo, commit, cached, files, scratch
        self._fetched: OrderedDict[str, Stamp] = OrderedDict()  # what lies in scratch, the last used last
        self._in_cache = {name: stamp(cached / name) for name in files if (cached / name).is_file()}

    def names(self) -> list[str]:
        return sorted(self.files)

    def header(self, name: str) -> dict[str, TensorInfo]:
        return self._headers[name]

    @cached_property
    def _headers(self) -> dict[str, dict[str, TensorInfo]]:
        with ThreadPoolExecutor(REQUESTS) as pool:
            return dict(zip(self.names(), pool.map(self._read_header, self.names()), strict=True))

    def _read_header(self, name: str) -> dict[str, TensorInfo]:
        if name in self._in_cache:
            return read_header(self.cached / name, Path(self.repo, name))
        from huggingface_hub import HfApi

        with hub_errors(self.repo):
            found = HfApi().parse_safetensors_file_metadata(self.repo, name, revision=self.commit)
        entries = {
            key: {"dtype": info.dtype, "shape": info.shape, "data_offsets": info.data_offsets}
            for key, info in found.tensors.items()
        }
        size = self._size(name)
        data = max((info.data_offsets[1] for info in found.tensors.values()), default=0)
        return check_header(Path(self.repo, name), entries, size - data, size)

    @cached_property
    def most(self) -> int:
        """The most files on disk at a time: two, or as many as one layer is spread over."""
        layers: dict[str, set[str]] = defaultdict(set)
        for name, header in self._headers.items():
            for tensor in header:
                if number := re.search(r"\.(\d+)\.", tensor):
                    layers[number[1]].add(name)
        return max(2, *map(len, layers.values())) if layers else 2

    def open(self, name: str) -> AbstractContextManager[BufferedReader]:
        if name in self._in_cache:
            return open_unchanged(self.cached / name, self._in_cache[name])
        if name not in self._fetched:
            while len(self._fetched) >= self.most:
                oldest, _ = self._fetched.popitem(last=False)
                (self.scratch / oldest).unlink(missing_ok=True)
            self._fetch(name)
        self._fetched.move_to_end(name)
        return open_unchanged(self.scratch / name, self._fetched[name])

    def _fetch(self, name: str) -> None:
        """Bring a file, and see that it is the one that was promised."""
        from huggingface_hub import hf_hub_download

        with hub_errors(self.repo):
            path = Path(hf_hub_download(self.repo, name, revision=self.commit, local_dir=self.scratch))
        self._fetched[name] = stamp(path)
        lfs = self.files[name].lfs
        with path.open("rb") as file:
            whole = lfs is None or hashlib.file_digest(file, "sha256").hexdigest() == lfs.sha256
        if not whole or read_header(path, Path(self.repo, name)) != self._headers[name]:
            del self._fetched[name]
            path.unlink()
            raise CheckpointError(f"{self.repo}/{name}: did not arrive as the Hub has it; run the same again")

    def fingerprint(self, name: str) -> bytes:
        """The Hub's own hash: no file needs to be there."""
        file = self.files[name]
        return f"{name} {self._size(name)} {file.lfs.sha256 if file.lfs else file.blob_id}\n".encode()

    def _size(self, name: str) -> int:
        size = self.files[name].size
        if size is None:
            raise CheckpointError(f"{self.repo}/{name}: the Hub does not say how large it is")
        return size

    def room(self) -> int:
        sizes = sorted((self._size(name) for name in self.files if name not in self._in_cache), reverse=True)
        return sum(sizes[: self.most])
