"""Reads checkpoint folders: config.json, tensors on demand from the files that shards.py finds and checks.

Only safetensors is read. Tensors are read, not mapped: reading a map of a file that has got shorter kills the process,
and here is an error.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from threading import Event, Thread

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from squawq.config import ModelConfig
from squawq.errors import CheckpointError
from squawq.format.files import MAX_FILE, has_file, read_config, read_json
from squawq.format.groupwise import GroupwiseTensor, from_gemm
from squawq.format.layouts import LAYOUTS, Gemm, Layout, Shapes, gemm_cuts, input_order, regroup
from squawq.format.shards import INDEX, FolderShards, ReadTensor, Shards, TensorInfo, read_tensor

COMPANIONS = re.compile(
    r"tokenizer\.(json|model)|(tokenizer|generation|(video_)?preprocessor|processor)_config\.json|special_tokens_map\.json"
    r"|added_tokens\.json|vocab\.(json|txt)|merges\.txt|chat_template\.(jinja|json)"
    r"|(LICEN[SC]E(-[A-Z]+)?|NOTICE|USE_POLICY)(\.(txt|md))?"
)
AHEAD = 2**20  # bytes read ahead at a time
PIECE = 2**24  # bytes of whole rows, of which some columns are kept
Part = tuple[slice, slice]  # (outputs, inputs) of a linear
WHOLE: Part = slice(None), slice(None)


class Checkpoint:
    """A model folder, opened but not loaded.

    `config` is checked on opening, the header of every shard when `tensors` is first used. Tensors are read one at a
    time. shards: where the weights are, if not in the folder. read_data: how a tensor is read from its open file; by
    default into memory of its own. Raises CheckpointError for anything missing, damaged or unknown.
    """

    def __init__(self, folder: str | Path, shards: Shards | None = None, read_data: ReadTensor = read_tensor) -> None:
        self.folder, self._read_data = Path(folder), read_data
        self.shards = shards or FolderShards(self.folder)
        self.config = ModelConfig.from_dict(read_config(self.folder), str(self.folder / "config.json"))

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """All tensors by name."""
        return read_headers(self.folder, self.shards)

    def info(self, name: str) -> TensorInfo:
        """Raises CheckpointError when there is no such tensor."""
        if name not in self.tensors:
            raise CheckpointError(f"{self.folder}: tensor {name!r} is missing")
        return self.tensors[name]

    def check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Raises CheckpointError for a tensor that is missing or has another shape."""
        info = self.info(name)
        if info.shape != shape:
            raise CheckpointError(f"{info.file}: tensor {name!r} has shape {list(info.shape)}; {list(shape)} is needed")

    def read(self, name: str, shape: tuple[int, ...] | None = None, index: int | None = None) -> Tensor:
        """A tensor in its own dtype, where `read_data` puts it.

        Args:
            shape: Checked, if given.
            index: Read only the part at this index of the first dimension.

        Raises:
            CheckpointError: There is no such tensor, it has another shape, or its file has changed.
        """
        if shape is not None:
            self.check_shape(name, shape)
        info = self.info(name)
        info = info if index is None else info.part(index)
        with self.shards.open(info.file.name) as file:
            return self._read_data(file, info)

    def read_part(self, name: str, shape: tuple[int, ...], rows: slice, columns: slice = slice(None)) -> Tensor:
        """Some rows, and of these some columns, of a tensor of `shape`. Only these rows are read, PIECE by PIECE.

        Raises CheckpointError, see `read`.
        """
        self.check_shape(name, shape)
        info = self.info(name).rows(rows)
        with self.shards.open(info.file.name) as file:
            if len(shape) < 2 or columns.indices(shape[1]) == (0, shape[1], 1):
                return self._read_data(file, info)
            step = max(1, PIECE // max(1, info.nbytes // info.shape[0]))
            pieces = (info.rows(slice(start, start + step)) for start in range(0, info.shape[0], step))
            return torch.cat([self._read_data(file, piece)[:, columns] for piece in pieces])

    @contextmanager
    def reading_ahead(self, names: Iterable[str]) -> Iterator[None]:
        """Bring tensors into the system's cache of files, in a thread, as far as it gets while the context is open.

        It takes a buffer of AHEAD bytes. Errors are left to `read`. Files that the Hub has yet to send wait their turn.
        """
        infos = sorted(map(self.info, names), key=lambda info: (info.file, info.start))
        if not infos or self.shards.room():
            yield
            return
        over = Event()
        thread = Thread(target=self._read_ahead, args=(infos, over), name="squawq reading ahead")
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _read_ahead(self, infos: Iterable[TensorInfo], over: Event) -> None:
        buffer = memoryview(bytearray(AHEAD))
        with suppress(CheckpointError):
            for info in infos:
                end = info.start + info.nbytes
                with self.shards.open(info.file.name) as file:
                    for start in range(info.start, end, AHEAD):
                        if over.is_set():
                            return
                        file.seek(start)
                        file.readinto(buffer[: end - start])

    def mapped(self, name: str) -> Tensor:
        """The same as a memory map of its file: no memory until it is looked at.

        Only for tensors that hardly ever are: where the file has got shorter, looking kills the process (SIGBUS).
        """
        info = self.info(name)
        try:
            with self.shards.open(info.file.name) as file, safe_open(file.name, framework="pt") as handle:
                tensor: Tensor = handle.get_tensor(name)
                return tensor
        except SafetensorError as error:
            raise CheckpointError(f"{info.file}: cannot be read as safetensors: {error}") from error

    @cached_property
    def layout(self) -> Layout:
        """How the quantized linears lie on disk."""
        return LAYOUTS[self.config.layout]

    def is_quantized(self, linear: str) -> bool:
        """Whether this linear (full name) is stored as 4-bit integers."""
        return f"{linear}.{self.layout.integers}" in self.tensors

    def quantized_linears(self) -> dict[str, tuple[int, int]]:
        """(out_features, in_features) of every linear that is stored as 4-bit integers, by full name, from the headers.

        Raises CheckpointError for integers that have not two dimensions.
        """
        found, ending = {}, f".{self.layout.integers}"
        for name, info in self.tensors.items():
            if name.endswith(ending):
                if len(info.shape) != 2:
                    what = f"tensor {name!r} has shape {list(info.shape)}; two dimensions are needed"
                    raise CheckpointError(f"{info.file}: {what}")
                found[name.removesuffix(ending)] = self.layout.features(*info.shape)
        return found

    def group_of(self, in_features: int) -> int:
        """The group size of quantized linears with this many inputs. Raises CheckpointError where none is stated."""
        if self.config.quant is None:
            raise CheckpointError(f"{self.folder}: has quantized tensors, but config.json has no quantization_config")
        return self.config.quant.group_of(in_features)

    def input_order(self, linear: str, in_features: int) -> Tensor | None:
        """The inputs' order in `read_gemm` (activation order), int64 [in]: see `layouts.input_order`; None: their own.

        Raises CheckpointError naming file and tensor for groups that cannot be.
        """
        name = f"{linear}.{self.layout.groups}"
        if not self.layout.groups or name not in self.tensors:
            return None
        self._check_dtype(name, torch.int32)
        groups = self.read(name, (in_features,)).cpu()
        try:
            return input_order(groups, self.group_of(in_features))
        except CheckpointError as error:
            raise CheckpointError(f"{self.info(name).file}: tensor {name!r}: {error}") from error

    def read_gemm(
        self, linear: str, in_features: int, out_features: int, part: Part = WHOLE, *, ordered: bool = False
    ) -> Gemm:
        """qweight, scales and qzeros (None: 8 is meant) of one linear in GEMM's layout, in which they may be stored.

        Args:
            part: Only these (outputs, inputs), in groups of `part_group`; outputs are cut at multiples of 8. Of other
                layouts the whole linear is read.
            ordered: The caller takes inputs in `input_order`; without, a linear that has one is an error.

        Raises:
            CheckpointError: What headers tell before anything is read; names file and tensor.
        """
        group, layout = self.group_of(in_features), self.layout
        if in_features % math.lcm(group, layout.inputs) or out_features % layout.outputs:
            what = f"groups of {group}" if in_features % group else f"the layout {self.config.layout!r}"
            raise CheckpointError(f"{self.folder}: {linear} [{out_features}, {in_features}] cannot have {what}")
        named = self._named(linear, layout.shapes(in_features, out_features, group))
        order = self.input_order(linear, in_features)
        if order is not None and (not ordered or part[1].indices(in_features) != (0, in_features, 1)):
            what = "cannot be cut among processes" if ordered else "is not supported here"
            raise CheckpointError(f"{self.folder}: {linear} has groups in activation order (g_idx), which {what}")
        cuts = gemm_cuts(part, in_features, out_features, group)
        if self.config.layout == "gemm":
            found = [self.read_part(*one, *cut) for one, cut in zip(named, cuts, strict=False)]
        else:
            self._check_sizes(linear, (out_features, in_features))
            qweight, scales, *zeros = [self.read(name, shape) for name, shape in named]
            try:
                whole = layout.to_gemm(qweight, scales, zeros[0] if zeros else None, in_features // group)
            except CheckpointError as error:
                raise CheckpointError(f"{self.info(named[-1][0]).file}: tensor {named[-1][0]!r}: {error}") from error
            found = [tensor[cut] for tensor, cut in zip(whole, cuts, strict=True) if tensor is not None]
        qweight, scales, *zeros = found
        qweight = qweight if order is None else qweight[order.to(qweight.device)]
        return regroup((qweight, scales, zeros[0] if zeros else None), part[1], in_features, group)

    def _named(self, linear: str, shapes: Shapes) -> list[tuple[str, tuple[int, int]]]:
        """Names and shapes of integers, scales and zeros, if there are any. Their dtypes and shapes are checked."""
        layout, quant = self.layout, self.config.quant
        names = [f"{linear}.{part}" for part in (layout.integers, layout.scales, layout.zeros)]
        if not (quant is not None and quant.zero_point) and names[2] not in self.tensors:
            names.pop()
        wanted = layout.words, None, layout.words if layout.packed_zeros else None
        named = list(zip(names, shapes, strict=False))
        for (name, shape), dtype in zip(named, wanted, strict=False):
            self._check_dtype(name, dtype)
            self.check_shape(name, shape)
        return named

    def _check_sizes(self, linear: str, sizes: tuple[int, int]) -> None:
        """Raise CheckpointError where a tensor that repeats [out, in] says otherwise."""
        name = f"{linear}.{self.layout.sizes}"
        if self.layout.sizes and name in self.tensors and self.read(name, (2,)).tolist() != list(sizes):
            raise CheckpointError(f"{self.info(name).file}: tensor {name!r} is not {list(sizes)}, the weight's shape")

    def _check_dtype(self, name: str, dtype: torch.dtype | None) -> None:
        """dtype None: any of floating point."""
        info = self.info(name)
        if info.dtype != dtype and (dtype is not None or not info.dtype.is_floating_point):
            needed = dtype or "floating point"
            raise CheckpointError(f"{info.file}: tensor {name!r} is {info.dtype}; {needed} is needed")

    def read_quantized(
        self, linear: str, in_features: int, out_features: int, part: Part = WHOLE, *, ordered: bool = False
    ) -> GroupwiseTensor:
        """The integers of one linear. ordered: with an `order` where they have one, see `read_gemm`.

        Raises CheckpointError naming file and tensor when they do not fit.
        """
        found = from_gemm(*self.read_gemm(linear, in_features, out_features, part, ordered=ordered))
        order = self.input_order(linear, in_features) if ordered else None
        return found if order is None else replace(found, order=order.to(found.q.device))

    def read_weight(self, linear: str, in_features: int, out_features: int, part: Part = WHOLE) -> Tensor:
        """The dequantized weight of one linear, float32 [out, in]. Raises CheckpointError, see `read_gemm`."""
        return self.read_quantized(linear, in_features, out_features, part, ordered=True).dequantize()

    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in self.tensors.values())

    def companions(self) -> list[Path]:
        """Small files that travel with the weights: tokenizer, chat template, generation config, licence.

        Raises CheckpointError for one that is a link out of the folder.
        """
        named = (path for path in sorted(self.folder.iterdir()) if COMPANIONS.fullmatch(path.name))
        return [path for path in named if has_file(path) and path.stat().st_size <= MAX_FILE]


def read_headers(folder: Path, shards: Shards) -> dict[str, TensorInfo]:
    """All tensors of a checkpoint by name. Raises CheckpointError for files that are missing, damaged or disagree."""
    found: dict[str, TensorInfo] = {}
    files, promised = _listed(folder, shards)
    for file in files:
        header = shards.header(file)
        if twice := next((n for n in header if n in found), None):
            raise CheckpointError(f"{header[twice].file}: tensor {twice!r} is also in {found[twice].file.name}")
        found.update(header)
    for name, shard in promised.items():
        if name not in found or found[name].file.name != shard:
            raise CheckpointError(f"{folder / INDEX}: promises tensor {name!r} in {shard}, where it is not")
    return found


def _listed(folder: Path, shards: Shards) -> tuple[list[str], dict[str, str]]:
    """The names of the safetensors files, and what the index (if any) promises of them."""
    there = shards.names()
    if has_file(folder / INDEX):
        promised = read_json(folder / INDEX).get("weight_map")
        if not isinstance(promised, dict) or not all(isinstance(f, str) for f in promised.values()):
            raise CheckpointError(f"{folder / INDEX}: weight_map must map tensor names to file names")
        names = sorted(set(promised.values()))
    else:
        promised, names = {}, [name for name in there if name.startswith("model")] or there
    if not names:
        other = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".gguf"))
        hint = f" It has {other[0]}, which squawq does not read; convert it to safetensors first." if other else ""
        raise CheckpointError(f"{folder}: has no *.safetensors file.{hint}")
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{folder / INDEX}: {name!r} is not the name of a safetensors file here")
        if name not in there:
            raise CheckpointError(f"{folder / name}: the index names this file, and it is missing")
    return names, promised
