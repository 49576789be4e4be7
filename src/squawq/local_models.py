"""The models on this machine: in the Hub's cache, in squawq's own, and in folders; and what runs each of them.

Nothing is loaded: config.json, the names and sizes of files.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from squawq.compatibility import compatible_engines
from squawq.config import ModelConfig
from squawq.errors import SquawqError
from squawq.families import FAMILIES
from squawq.format.files import read_config, read_json
from squawq.hub.cache import cached_models, cached_names
from squawq.stored_quant import NAMES as METHOD_NAMES

DEPTH = 2  # levels of folders below a given one
WEIGHTS = ("*.safetensors", "*.gguf", "*.bin", "*.pt", "*.pth")
NAMES = {"squawq": "squawq", "transformers": "transformers", "vllm": "vLLM", "tgi": "TGI"}  # of engines
METHODS = {**METHOD_NAMES, "bitsandbytes": "bitsandbytes", "fp8": "FP8", "mxfp4": "MXFP4"}


@dataclass(frozen=True)
class LocalModel:
    """A model on this machine.

    Attributes:
        name: A Hub id or a path: what commands take as MODEL.
        path: Its folder or file.
        family: config.json's model_type; "" where it is unknown.
        format: How its weights are stored, as in "bfloat16" or "AWQ INT4 g128".
        bytes: Of its files of weights.
        runs_in: Names of engines that run it as it is.
        note: What else to do or to know; for a model that nothing runs, why.
        broken: It is damaged or incomplete.
    """

    name: str
    path: str
    family: str
    format: str
    bytes: int
    runs_in: tuple[str, ...] = ()
    note: str = ""
    broken: bool = False


def quantized_models() -> Path:
    """The folder of the models that `squawq run` has quantized (XDG_CACHE_HOME)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "squawq" / "quantized"


def local_models(folders: Iterable[Path]) -> list[LocalModel]:
    """The models of both caches, and those in these folders, two levels deep. Damaged ones are among them.

    An entry of the Hub's cache with neither config.json nor weights is none: a program has read a model card there.
    """
    found = []
    for cached in cached_models():
        if cached.folder is None:
            found.append(LocalModel(cached.name, "", "", "broken", 0, note=cached.problem, broken=True))
        elif (cached.folder / "config.json").exists() or _files(cached.folder):
            found.append(describe(cached.name, cached.folder))
    for folder in (quantized_models(), *folders):
        found += [describe(str(place), place) for place in _model_places(folder, DEPTH)]
    return list({model.path or model.name: model for model in found}.values())


def complete(incomplete: str) -> list[str]:
    """For the shell: Hub ids in the cache, and model folders, that begin with this."""
    parent, _, beginning = incomplete.rpartition("/")
    place = Path(parent or ("/" if incomplete.startswith("/") else "."))
    with suppress(RuntimeError):  # ~NAME of nobody
        place = place.expanduser()
    start = incomplete[: len(incomplete) - len(beginning)]
    inside = [start + path.name for path in _folders(place) if (path / "config.json").exists()]
    return [name for name in (*cached_names(), *inside) if name.startswith(incomplete)]


def describe(name: str, place: Path) -> LocalModel:
    """What a folder or a GGUF file is, and what runs it; never raises for a damaged one."""
    if place.is_file():
        return LocalModel(name, str(place), "", "GGUF", _size([place]), note="llama.cpp runs GGUF")
    files = _files(place)
    size = _size(files)
    family, form = "", ""
    try:
        raw = read_config(place)
        inner = raw.get("text_config")
        text = inner if isinstance(inner, Mapping) else raw
        family, form = str(text.get("model_type") or ""), stored_as(raw)
        if problem := _incomplete(place, files):
            return LocalModel(name, str(place), family, form, size, note=problem, broken=True)
        if not any(file.suffix == ".safetensors" for file in files):
            kinds = ", ".join(sorted({file.suffix for file in files}))
            return LocalModel(name, str(place), family, form, size, note=f"weights are {kinds}, not safetensors")
        config = ModelConfig.from_dict(raw, "config.json")
        return LocalModel(name, str(place), family, form, size, *_runs_in(config))
    except SquawqError as error:
        broken = not form
        note = str(error).replace(f"{place}/", "").replace(f"{place}: ", "")
        return LocalModel(name, str(place), family, form or "broken", size, note=note, broken=broken)


def stored_as(raw: Mapping[str, Any]) -> str:
    """How a model's weights are stored, from its config.json."""
    quant = raw.get("quantization_config")
    if not isinstance(quant, Mapping):
        text = raw.get("text_config")
        inner = text if isinstance(text, Mapping) else {}
        dtype = next((d for part in (raw, inner) for key in ("dtype", "torch_dtype") if (d := part.get(key))), None)
        return str(dtype or "16-bit")
    method = str(quant.get("quant_method", "awq"))
    if method == "compressed-tensors":
        return f"compressed-tensors {quant.get('format', '')}".strip()
    bits = quant.get("bits", quant.get("w_bit"))
    group = quant.get("group_size", quant.get("q_group_size"))
    words = [METHODS.get(method, method), f"INT{bits}" if bits else "", f"g{group}" if group else ""]
    return " ".join(word for word in words if word)


def _runs_in(config: ModelConfig) -> tuple[tuple[str, ...], str]:
    """Engines that run a model as it is, and what to do for others."""
    engines = compatible_engines(config)
    if config.quant is not None:
        return tuple(NAMES[engine] for engine in engines), "" if engines else "no engine that squawq knows"
    if config.model_type in FAMILIES:
        return (NAMES["squawq"], NAMES["transformers"]), ""
    return (), f"squawq does not know the family {config.model_type}"


def _incomplete(place: Path, files: list[Path]) -> str:
    """What of a model's weights is not there; "" if all is."""
    if not files:
        return "has no weights"
    for index in sorted(place.glob("*.safetensors.index.json")):
        named = read_json(index).get("weight_map")
        if not isinstance(named, Mapping):
            return f"{index.name} has no weight_map"
        if lost := sorted({str(file) for file in named.values()} - {file.name for file in files}):
            return f"{len(lost)} of its files are missing, such as {lost[0]}"
    return ""


def _files(place: Path) -> list[Path]:
    """The weight files of a folder; links that lead nowhere are none."""
    try:
        return sorted({file for pattern in WEIGHTS for file in place.glob(pattern) if file.is_file()})
    except OSError:
        return []


def _size(files: Iterable[Path]) -> int:
    total = 0
    for file in files:
        try:
            total += file.stat().st_size
        except OSError:
            continue
    return total


def _model_places(folder: Path, depth: int) -> Iterator[Path]:
    """Model folders and GGUF files at most `depth` levels below a folder, which may be a model itself."""
    if (folder / "config.json").is_file() and (_files(folder) or _names_a_model(folder)):
        yield folder
        return
    yield from sorted(file for file in _files(folder) if file.suffix == ".gguf")
    if depth:
        for inside in _folders(folder):
            yield from _model_places(inside, depth - 1)


def _names_a_model(folder: Path) -> bool:
    """Whether config.json is a model's; other programs have files of that name, too."""
    try:
        return "model_type" in read_json(folder / "config.json")
    except SquawqError:
        return False


def _folders(folder: Path) -> list[Path]:
    """The folders in a folder but hidden ones; none where it cannot be read."""
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith(".") and path.is_dir())
    except OSError:
        return []
