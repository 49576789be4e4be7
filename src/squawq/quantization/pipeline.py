"""squawq.quantize: the loop over decoder layers. Each is loaded, quantized (`layer`), written, and dropped.

A layer is written, and the next one read ahead, in threads beside the work. Peak memory: one decoder layer in float32,
its statistics, the packed tensors of the layer before it, and the calibration's hidden states (twice blocks x tokens x
hidden_size x 4 bytes, and a record of the layer's inputs) as far as they are kept in memory.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from squawq import __version__
from squawq.compatibility import compatible_engines, engines_line
from squawq.config import CODE, without
from squawq.distributed import Ranks
from squawq.errors import ConfigError
from squawq.format.files import copy_file, read_json, write_json
from squawq.format.shards import write_index
from squawq.layerwise.plan import as_stored
from squawq.layerwise.tensor_names import read_finite, weight_count
from squawq.memory import measured
from squawq.progress import LayerProgress, console
from squawq.quant_config import QuantConfig
from squawq.quantization.calibration import Calibration
from squawq.quantization.check import DTYPE_TOKENS, DtypeCheck, ReadBack, Rows
from squawq.quantization.job import Job
from squawq.quantization.layer import LayerResult, quantize_layer, round_layer
from squawq.quantization.precision import float32_products
from squawq.quantization.prepare import Work, default_dtype, prepare
from squawq.quantization.states import Streams, default_states_memory
from squawq.quantization.token_weights import token_weights
from squawq.quantization.tuning import tune
from squawq.report.files import REPORT, write_report
from squawq.report.schema import Report
from squawq.showing import Record


class Observer(Protocol):
    """Callbacks of a run, on each rank. An exception in one stops all ranks."""

    def generating(self, what: str, done: int, total: int) -> None:
        """Called on rank 0 while the model generates calibration text or weights its tokens.

        Args:
            what: What is done, as a line for people.
            done: Tokens so far.
            total: All tokens.
        """

    def start(self, layers: int, tokens: int, resumed: int, runs_in: str) -> None:
        """Called before the first layer, unless all was done before.

        Args:
            layers: How many layers the model has.
            tokens: How many calibration tokens there are.
            resumed: Layers that an earlier run has quantized.
            runs_in: A line that says which engines will run the result.
        """

    def layer(self, record: Mapping[str, Any]) -> None:
        """Called after each layer with its row of the report."""

    def tuning(self, step: int, steps: int) -> None:
        """Called on rank 0 after each step of tuning with its number, from 1 on, and the count of all."""

    def read_back(self, layers: int) -> None:
        """Called on rank 0 after each layer of the finished folder that was read back, with their number so far."""


class _Silent:
    def generating(self, what: str, done: int, total: int) -> None: ...
    def start(self, layers: int, tokens: int, resumed: int, runs_in: str) -> None: ...
    def layer(self, record: Mapping[str, Any]) -> None: ...
    def tuning(self, step: int, steps: int) -> None: ...
    def read_back(self, layers: int) -> None: ...


class _Checks:
    """Rank 0's checks of the result, on the same few rows of text."""

    def __init__(self, work: Work, job: Job) -> None:
        rows = Rows.of(work)
        self.dtype = DtypeCheck(work, job, rows.ids[:, :DTYPE_TOKENS])
        self.read_back = ReadBack(work, job, rows)


def quantize(
    model: str | Path,
    out: str | Path,
    config: QuantConfig | None = None,
    *,
    calibration: Calibration = None,
    device: str = "cpu",
    stream: bool = False,
    observer: Observer | None = None,
    progress: bool = True,
    ranks: Ranks | None = None,
    states_memory: float | None = None,
) -> dict[str, Any]:
    """Quantize a 16-bit checkpoint to AWQ INT4.

    Args:
        model: A folder or a Hub id.
        out: A folder that does not exist, is empty, or holds this very job. A run that was killed resumes where it
            stopped and ends with the same weights. Never left half-written.
        config: How to quantize.
        calibration: See `calibration.token_blocks`; or "self": text that the 16-bit model generates itself, at
            temperature 1 (`self_calibration`); or "self+builtin": up to half of it from the built-in set, which is the
            default on an NVIDIA GPU that holds the 16-bit model; "builtin": that set alone, the default elsewhere.
        device: "cpu", "cuda", "cuda:1" ... or "mps"; a single one: only the command line starts more processes.
        stream: Keep only a few of a Hub model's weight files on disk at a time, see `stream.open_streamed`.
        observer: Callbacks, instead of progress on stderr.
        progress: Show progress on stderr: a bar on a terminal, else a line a layer.
        ranks: The processes that share the calibration and each make this call (`distributed.torchrun_ranks`); rank 0
            writes.
        states_memory: GiB of hidden states kept in memory; larger ones go to a file beside `out`. None: 1, or a quarter
            of an NVIDIA GPU's free memory.

    Returns:
        The report, which is also in `out`: squawq_report.json, and report.html for people.

    Raises:
        SquawqError: Before work starts, for anything that cannot work.
    """
    ranks = ranks or Ranks()
    shown = LayerProgress() if observer is None and progress and ranks.first else None
    with shown or nullcontext(), ranks.session():
        if stream and ranks.size > 1:
            raise ConfigError(f"{ranks.size} processes cannot stream: each would fetch all files; leave out --stream")
        work = prepare(model, out, config or QuantConfig(), calibration, ranks.device(device), stream)
        share = None if work.calibration_blocks is None else ranks.share(work.calibration_blocks)
        ranks.check_same(work.identity)
        with ranks.on_first(lambda: Job(work.out, work.identity, len(work.plans))) as job:
            report = ranks.broadcast(lambda: _begin(work, job))
            if report is None:
                watching, streams = shown or observer or _Silent(), None
                rows = None
                if work.generated is not None:
                    rows = ranks.broadcast(partial(_generated, work, job, watching))
                    work = replace(work, tokens=rows[: work.generated.calibration_rows])
                if work.tokens is not None and share is not None:
                    sequential, folder = work.config.sequential, work.out.parent
                    memory = default_states_memory(work.blocks.device) if states_memory is None else states_memory
                    weights = ranks.broadcast(partial(_token_weights, work, job, watching))
                    streams = Streams.embedded(work.blocks, work.tokens, share, sequential, folder, memory)
                    streams = replace(streams, weights=weights and {key: w[share] for key, w in weights.items()})
                checks = _Checks(work, job) if ranks.first else None
                _quantize_layers(work, streams, job, watching, ranks, checks)
                streams = None  # large
                if rows is not None and work.config.tune:
                    ranks.broadcast(partial(_tune, work, rows, job, checks, watching))
                report = ranks.broadcast(partial(_finish, work, job, checks, watching))
    if shown is not None and not shown.started:
        console.print(already_done(out))
    return Record(report)


def already_done(out: str | Path) -> str:
    """What to say where there was nothing to do."""
    return f"already done: {out} holds the result of this model, settings and calibration; nothing was changed"


def _begin(work: Work, job: Job) -> dict[str, Any] | None:
    """The report of a job that is done; otherwise write what is outside the layers."""
    if job.finished:
        return read_json(job.out / REPORT)
    job.require_room(work.size, work.blocks.checkpoint.shards.room())
    _write_outer(work, job)
    return None


def _generated(work: Work, job: Job, observer: Observer) -> Tensor:
    """Calibration blocks and rows for tuning, see `SelfCalibration.tokens`, of this run or of the one it resumes."""
    plan, blocks = work.generated, work.blocks
    assert plan is not None
    return job.generated_tokens(plan.shape, lambda: plan.tokens(blocks.checkpoint, blocks.device, observer.generating))


def _token_weights(work: Work, job: Job, observer: Observer) -> dict[str, Tensor] | None:
    """Weights of the calibration tokens, of this run or of the one it resumes; None: they have none."""
    blocks, tokens, seed = work.blocks, work.tokens, work.config.seed
    if not work.config.token_weights or tokens is None:
        return None
    given = blocks.checkpoint, blocks.device, work.plans, tokens, seed, observer.generating
    return job.token_weights((len(tokens), tokens.shape[1]), lambda: token_weights(*given))


def _write_outer(work: Work, job: Job) -> None:
    """Write the embedding, and the final norm and head, first of all, so that errors in them show at once.

    Parts of the checkpoint beside the text model are stored with the head.
    """
    blocks, dtype = work.blocks, getattr(torch, work.config.dtype)
    checkpoint, names = blocks.checkpoint, blocks.names
    embedding = f"{blocks.family.embedding}.weight"
    head = [names.stored_name(name) for name in blocks.meta_model.outer if name != embedding]
    for part, own in ((0, [names.stored_name(embedding)]), (job.layers + 1, [*head, *names.other_tensors])):
        if job.record(part) is None:
            job.commit(part, {n: as_stored(read_finite(checkpoint, n), dtype, n) for n in own}, {})


def _quantize_layers(
    work: Work, streams: Streams | None, job: Job, observer: Observer, ranks: Ranks, checks: _Checks | None
) -> None:
    layers, tokens = len(work.blocks.layers), 0 if work.tokens is None else work.tokens.numel()
    done = ranks.broadcast(lambda: [job.record(part) for part in range(1, layers + 1)])
    runs_in = engines_line(work.blocks.checkpoint.config, work.config)
    if ranks.first and None in done:
        job.forget_tuning()
    observer.start(layers, tokens, sum(r is not None for r in done), runs_in)
    for index, record in enumerate(done):
        if record is None:
            record = _quantize_layer(work, index, streams, job, ranks, checks)
        else:
            _skip_layer(work, index, None if all(done[index:]) else streams, job, ranks, checks)
        if checks is not None:
            checks.dtype.layer(index)
        observer.layer(record)


def _skip_layer(
    work: Work, index: int, streams: Streams | None, job: Job, ranks: Ranks, checks: _Checks | None
) -> None:
    """Run hidden states through a layer that an earlier run quantized. streams: None if no later layer needs them."""
    advances = streams is not None and streams.quantized is not None
    stored = ranks.broadcast(lambda: job.tensors(index + 1)) if advances else {}
    if streams is None and checks is None:
        return
    with work.blocks.open(index) as block:
        if checks is not None:
            checks.read_back.layer(block)
        if streams is not None:
            with float32_products(work.blocks.device, exact=False):  # as when the layer was quantized
                streams.skip(block, stored)


def _quantize_layer(
    work: Work, index: int, streams: Streams | None, job: Job, ranks: Ranks, checks: _Checks | None
) -> dict[str, Any]:
    """Quantize a layer and begin to write it; returns its row of the report."""
    blocks, began = work.blocks, time.perf_counter()
    goes_on = streams is not None and streams.quantized is not None and index + 1 < len(blocks.layers)
    with blocks.open(index) as block:
        if checks is not None:
            checks.read_back.layer(block)

        def commit(result: LayerResult) -> tuple[dict[str, Any], dict[str, Tensor]]:
            record, stored = result.record | measured(began, blocks.device), block.stored(result.tensors)
            job.commit(index + 1, stored, record, behind=True)
            return record, stored if goes_on else {}

        if streams is None:
            return ranks.broadcast(lambda: commit(round_layer(block, work.plans[index]))[0])
        with float32_products(blocks.device, exact=False):
            return quantize_layer(block, work.plans[index], streams, ranks, commit)


def _tune(work: Work, rows: Tensor, job: Job, checks: _Checks | None, observer: Observer) -> None:
    """Tune the scales of all layers on these rows of text, and write them, unless an earlier run has."""
    if job.tuning() is None:
        assert work.generated is not None
        assert checks is not None  # they are the first rank's
        fresh, logits_error = work.generated.tuning_rows, checks.dtype.head()
        scales, row = tune(work.blocks, rows, fresh, lambda index: job.tensors(index + 1), observer.tuning)
        job.commit_tuning(scales, {**row.to_dict(), "logits_error": logits_error})  # a resumed run cannot find it again


def _finish(work: Work, job: Job, checks: _Checks | None, observer: Observer) -> dict[str, Any]:
    """Write the small files, the index and config.json, read all back, write the report, rename OUT.partial to OUT."""
    assert checks is not None  # they are the first rank's
    for part in range(job.layers + 2):
        job.verify(part)
    tuning = job.tuning()
    logits_error = checks.dtype.head() if tuning is None else tuning.pop("logits_error")
    blocks, config, tokens = work.blocks, work.config, work.tokens
    checkpoint = blocks.checkpoint
    for path in checkpoint.companions():
        copy_file(path, job.partial / path.name)
    size = write_index(job.partial)
    records = [job.record(part) or {} for part in range(1, job.layers + 1)]
    kept = [
        {"name": blocks.names.stored_module(f"{record['name']}.{row['name']}"), "reason": row["kept_in_16_bits"]}
        for record in records
        for row in record["linears"]
        if "kept_in_16_bits" in row
    ]
    outer = [blocks.names.stored_module(name) for name in blocks.meta_model.outer_linears]
    kept += [{"name": name, "reason": "outside the layers"} for name in outer]
    kept += [{"name": name, "reason": "beside the text model"} for name in blocks.names.other_parts]
    notes = [f"{record['name']}: {note}" for record in records for note in record["notes"]]
    raw: dict[str, Any] = without(checkpoint.config.raw, ("dtype", "torch_dtype", *CODE))
    raw["torch_dtype"] = config.dtype
    raw["quantization_config"] = config.to_quantization_config([row["name"] for row in kept])
    write_json(job.partial / "config.json", raw)
    read_back = checks.read_back.compare(observer.read_back)
    report = {
        "squawq": __version__,
        "model": work.name,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "runs_in": compatible_engines(checkpoint.config, config),
        "method": config.method,
        "source_bytes": checkpoint.nbytes(),
        "bytes": size,
        "parameters": sum(weight_count(checkpoint, name) for name in checkpoint.tensors),
        "embedding_bytes": math.prod(blocks.meta_model.outer[f"{blocks.family.embedding}.weight"]) * 2,
        "calibration": work.calibration,
        "calibration_tokens": 0 if tokens is None else tokens.numel(),
        "kept_in_16_bits": kept,
        "notes": notes,
        "stored_dtype": {
            "dtype": config.dtype,
            "by_default": default_dtype(blocks),
            "logits_error": round(logits_error, 6),
        },
        "read_back": read_back.to_dict(),
        "layers": records,
        "tuning": tuning,
        "job": job.identity,
    }
    report = Report.read(report).to_dict()
    write_report(job.partial, report, work.out.name)
    job.finish()
    return report
