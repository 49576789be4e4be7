"""squawq export: writes a 4-bit folder in another format, shard after shard, and renames it to OUT.

How a linear is stored is up to the format (awq.py, gptq.py, compressed_tensors.py, dense.py). gguf.py writes its single
file itself.
Peak memory: one decoder layer in the new format (two where dense stacks experts), or all that is beside the text model.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from squawq import __version__
from squawq.errors import CheckpointError, ConfigError
from squawq.export.awq import Awq
from squawq.export.compressed_tensors import CompressedTensors
from squawq.export.dense import STACKS, Dense, stacked
from squawq.export.gptq import Gptq
from squawq.export.plan import Plan, make_plan
from squawq.families import family_of
from squawq.format.files import copy_file, has_file, read_json, write_json
from squawq.format.groupwise import GroupwiseTensor
from squawq.format.reader import Checkpoint
from squawq.format.shards import write_index
from squawq.hub.download import resolve
from squawq.quant_config import QuantConfig
from squawq.quantization.job import Job, identity, target_path
from squawq.report.files import REPORT

FORMATS = ("awq", "gptq", "compressed-tensors", "gguf", "dense")
Progress = Callable[[int, int], None]  # done, of how many


class Writer(Protocol):
    """A format of safetensors. settings_file: where its engines also look for `quantization_config`, or None."""

    @property
    def settings_file(self) -> str | None: ...

    def linear(self, name: str, tensor: GroupwiseTensor) -> dict[str, Tensor]:
        """The tensors of one linear by the last part of their names."""

    def config(self, raw: dict[str, Any], plan: Plan) -> dict[str, Any]:
        """The new config.json."""


def export(
    model: str | Path,
    out: str | Path,
    format: str,  # noqa: A002 (the flag's name)
    *,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a 4-bit checkpoint in another format.

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
    plan = make_plan(checkpoint)
    writer = _writer(checkpoint, plan, quant, format)
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


def _writer(checkpoint: Checkpoint, plan: Plan, quant: QuantConfig, format: str) -> Writer:  # noqa: A002
    """Raises CheckpointError for what the format cannot store."""
    if format == "dense":
        return Dense.like(checkpoint.info(plan.embedding).dtype)
    ordered = [name for name, (_, in_) in plan.shapes.items() if checkpoint.input_order(name, in_) is not None]
    if format != "gptq" and ordered:  # compressed-tensors 0.19 has dropped it
        raise CheckpointError(
            f"{checkpoint.folder}: {ordered[0]} has its groups in activation order (desc_act), which {format} does not "
            "have; export the model as gptq, or as dense and quantize that"
        )
    if format == "gptq":
        return Gptq(quant, bool(ordered))
    return Awq(quant) if format == "awq" else CompressedTensors(quant)


def _write_parts(checkpoint: Checkpoint, plan: Plan, writer: Writer, job: Job, progress: Progress | None) -> None:
    for part, names in enumerate(plan.parts):
        if job.record(part) is None:
            job.commit(part, _convert(checkpoint, plan, writer, names), {})
        if progress is not None:
            progress(part + 1, len(plan.parts))


def _convert(checkpoint: Checkpoint, plan: Plan, writer: Writer, names: list[str]) -> dict[str, Tensor]:
    """Write linears in the format, everything else as it is stored."""
    tensors = {}
    for name in names:
        linear, _, kind = name.rpartition(".")
        if not checkpoint.is_quantized(linear) or kind == "bias":
            tensors[name] = checkpoint.read(name)
        elif kind == checkpoint.layout.integers:
            out, in_ = plan.shapes[linear]
            made = writer.linear(linear, checkpoint.read_quantized(linear, in_, out, ordered=True))
            tensors |= {f"{linear}.{own}": tensor for own, tensor in made.items()}
        elif kind not in checkpoint.layout.tensors:
            raise CheckpointError(f"{checkpoint.info(name).file}: tensor {name!r} does not belong to a 4-bit linear")
    model_type = checkpoint.config.model_type
    if isinstance(writer, Dense) and model_type in STACKS:
        return stacked(tensors, family_of(model_type).experts, STACKS[model_type])
    return tensors


def _finish(checkpoint: Checkpoint, plan: Plan, writer: Writer, job: Job, report: dict[str, Any]) -> dict[str, Any]:
    """Write the small files, the index, config.json and the report, and rename OUT.partial to OUT."""
    for path in checkpoint.companions():
        copy_file(path, job.partial / path.name)
    report |= {"bytes": write_index(job.partial), "job": job.identity}
    config = writer.config(dict(checkpoint.config.raw), plan)
    write_json(job.partial / "config.json", config)
    if writer.settings_file is not None:
        write_json(job.partial / writer.settings_file, config["quantization_config"])
    write_json(job.partial / REPORT, report)
    job.finish()
    return report
