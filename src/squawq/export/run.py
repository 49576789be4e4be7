"""squawq export: writes an AWQ folder in another format, shard after shard, and renames it to OUT.

How a linear is stored is up to the format (compressed_tensors.py, dense.py); gguf.py writes its single file itself.
Peak memory: one decoder layer in the new format.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from squawq import __version__
from squawq.errors import CheckpointError, ConfigError
from squawq.export.compressed_tensors import CompressedTensors
from squawq.export.dense import Dense
from squawq.families import Family, family_of
from squawq.format.files import copy_file, has_file, read_json, write_json
from squawq.format.groupwise import GroupwiseTensor
from squawq.format.reader import Checkpoint
from squawq.format.shards import write_index
from squawq.hub.download import resolve
from squawq.nn.loader import layer_shapes
from squawq.quant_config import QuantConfig
from squawq.quantization.job import Job, identity, target_path
from squawq.report.files import REPORT

FORMATS = ("compressed-tensors", "gguf", "dense")
Progress = Callable[[int, int], None]  # done, of how many


class Writer(Protocol):
    """A format of safetensors."""

    def linear(self, name: str, tensor: GroupwiseTensor) -> dict[str, Tensor]:
        """The tensors of one linear by the last part of their names."""

    def config(self, raw: dict[str, Any], kept: Sequence[str], targets: Sequence[str]) -> dict[str, Any]:
        """The new config.json; kept: linears in 16 bits, targets: what is quantized, by class or full name."""


@dataclass(frozen=True)
class _Plan:
    """Layout of the result; `kept` and `targets` as in `Writer.config`."""

    parts: list[list[str]]  # tensor names of each shard: the embedding, every layer, the final norm and head
    shapes: dict[str, tuple[int, int]]  # (out_features, in_features) of every linear by full name
    kept: list[str]
    targets: list[str]


def export(
    model: str | Path,
    out: str | Path,
    format: str,  # noqa: A002 (the flag's name)
    *,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write an AWQ checkpoint in another format.

    Args:
        model: A folder or a Hub id.
        out: Must not exist, or hold this very export; one that was stopped resumes. Never left half-written.
        format: One of FORMATS.
        progress: Called with the parts done and the parts in all.

    Returns:
        The report; for folders, the one in `out`.

    Raises:
        SquawqError: Before work starts, for anything that cannot work.
    """
    if format not in FORMATS:
        raise ConfigError(f"format is {format!r}; choose one of {', '.join(FORMATS)}")
    checkpoint = Checkpoint(resolve(model))
    checkpoint.companions()  # raises now rather than when all else is done
    target = target_path(out, checkpoint.folder)
    if format == "gguf":
        from squawq.export.gguf import export_gguf

        export_gguf(checkpoint.folder, target, progress=progress)
        return {"format": "gguf", "exported_by": __version__, "bytes": target.stat().st_size}
    quant = _quant_of(checkpoint, format)
    family = family_of(checkpoint.config.model_type)
    plan = _plan(checkpoint, family)
    stored = checkpoint.info(f"{family.embedding}.weight").dtype
    writer: Writer = CompressedTensors(quant) if format == "compressed-tensors" else Dense.like(stored)
    made = checkpoint.folder / REPORT  # holds for the same integers in any format
    report = {**(read_json(made) if has_file(made) else {}), "format": format, "exported_by": __version__}
    job = Job(target, {**identity(checkpoint, quant, None, "cpu"), "format": format}, checkpoint.config.num_layers)
    if job.finished:
        return read_json(job.out / REPORT)
    with job:
        _write_parts(checkpoint, plan, writer, job, progress)
        return _finish(checkpoint, plan, writer, job, report)


def _quant_of(checkpoint: Checkpoint, format: str) -> QuantConfig:  # noqa: A002
    if checkpoint.config.quant is not None:
        return checkpoint.config.quant
    if format == "dense":
        raise CheckpointError(f"{checkpoint.folder}: is a 16-bit checkpoint already; use it as it is")
    raise CheckpointError(
        f"{checkpoint.folder}: is a 16-bit checkpoint, and {format} holds 4-bit integers; quantize it first "
        "(squawq quantize MODEL AWQ) and export AWQ"
    )


def _plan(checkpoint: Checkpoint, family: Family) -> _Plan:
    """Lay out the result; only rotary frequencies and a head beside a tied embedding are dropped.

    Raises:
        CheckpointError: A tensor is missing, misshapen or unexpected.
    """
    config = checkpoint.config
    layers = [family.layer(index) for index in range(config.num_layers)]
    shapes = {
        f"{layer}.{name}": shape
        for index, layer in enumerate(layers)
        for name, shape in layer_shapes(config, index).items()
    }
    if not config.tied_embeddings:
        shapes[family.head] = (config.vocab_size, config.hidden_size)
    kept = [name for name in shapes if not checkpoint.is_quantized(name)]
    dense: dict[str, tuple[int, ...]] = {f"{name}.weight": shapes[name] for name in kept}
    dense |= {f"{family.embedding}.weight": (config.vocab_size, config.hidden_size)}
    dense |= {f"{family.norm}.weight": (config.hidden_size,)}
    for name, shape in dense.items():
        if (info := checkpoint.info(name)).shape != shape:
            raise CheckpointError(f"{info.file}: tensor {name!r} has shape {list(info.shape)}; {list(shape)} is needed")
    owners = [(family.embedding,), *((layer,) for layer in layers), (family.norm, family.head)]
    places = {owner: part for part, own in enumerate(owners) for owner in own}
    parts: list[list[str]] = [[] for _ in owners]
    for name, info in checkpoint.tensors.items():
        pieces = name.split(".")
        ancestors = (".".join(pieces[:count]) for count in range(1, len(pieces)))
        owner = next((o for o in ancestors if o in places), None)
        unknown = name.endswith(".qweight") and name.removesuffix(".qweight") not in shapes
        if "rotary_emb" in name or (owner == family.head and config.tied_embeddings):
            continue
        if owner is None or unknown:
            raise CheckpointError(f"{info.file}: tensor {name!r} does not belong to a {family.model_type} model")
        parts[places[owner]].append(name)
    targets = ["Linear", *([family.head] if checkpoint.is_quantized(family.head) and family.head in shapes else [])]
    return _Plan(parts, shapes, [*kept, *([] if family.head in shapes else [family.head])], targets)


def _write_parts(checkpoint: Checkpoint, plan: _Plan, writer: Writer, job: Job, progress: Progress | None) -> None:
    for part, names in enumerate(plan.parts):
        if job.record(part) is None:
            job.commit(part, _convert(checkpoint, plan, writer, names), {})
        if progress is not None:
            progress(part + 1, len(plan.parts))


def _convert(checkpoint: Checkpoint, plan: _Plan, writer: Writer, names: list[str]) -> dict[str, Tensor]:
    """Write linears in the format, everything else as it is stored."""
    tensors = {}
    for name in names:
        linear, _, kind = name.rpartition(".")
        if not checkpoint.is_quantized(linear) or kind == "bias":
            tensors[name] = checkpoint.read(name)
        elif kind == "qweight":
            out, in_ = plan.shapes[linear]
            made = writer.linear(linear, checkpoint.read_quantized(linear, in_, out))
            tensors |= {f"{linear}.{own}": tensor for own, tensor in made.items()}
        elif kind not in ("qzeros", "scaled_zeros", "scales"):
            raise CheckpointError(f"{checkpoint.info(name).file}: tensor {name!r} does not belong to an AWQ linear")
    return tensors


def _finish(checkpoint: Checkpoint, plan: _Plan, writer: Writer, job: Job, report: dict[str, Any]) -> dict[str, Any]:
    """Write the small files, the index, config.json and the report, and rename OUT.partial to OUT."""
    for path in checkpoint.companions():
        copy_file(path, job.partial / path.name)
    report |= {"bytes": write_index(job.partial), "job": job.identity}
    write_json(job.partial / "config.json", writer.config(dict(checkpoint.config.raw), plan.kept, plan.targets))
    write_json(job.partial / REPORT, report)
    job.finish()
    return report
