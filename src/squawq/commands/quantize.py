"""`squawq quantize`: flags to a QuantConfig, a run, and what to do next."""

from __future__ import annotations

import shlex
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from squawq.commands.options import DEVICES, Model
from squawq.commands.stopping import StoppableProgress
from squawq.progress import console
from squawq.quant_config import DTYPES, METHODS, Dtype, GroupSize, Method, QuantConfig
from squawq.serve.flags import completed_by


def quantize(
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to create; it appears when the work is done")],
    calibration: Annotated[
        str | None,
        typer.Option(
            help="A .txt or .jsonl file, a Hub data set id, builtin (squawq's own set), self (text that the 16-bit "
            "model generates), or self+builtin; default: self+builtin on a GPU that holds the model, else builtin"
        ),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(help="Calibration sequences; default: up to 128, with self on a GPU up to 1,536")
    ] = None,
    seqlen: Annotated[
        int | None,
        typer.Option(help="Tokens per calibration sequence; default: 512, or the context if shorter"),
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Random seed of --calibration self, --token-weights and --tune", min=0)
    ] = QuantConfig.seed,
    group_size: Annotated[GroupSize, typer.Option(help="Weights per scale; -1: a whole row")] = 128,
    for_tensor_parallel: Annotated[
        int | None,
        typer.Option(
            help="GPUs that will share the result: smaller groups where one would span two GPUs",
            min=1,
        ),
    ] = None,
    symmetric: Annotated[bool, typer.Option("--symmetric", help="Symmetric quantization, without zero points")] = False,
    method: Annotated[
        Method,
        typer.Option(help="squawq: AWQ scales, QEP and GPTQ rounding; awq: AWQ as published; rtn: round to nearest"),
    ] = METHODS[0],
    clip: Annotated[bool, typer.Option(help="Search a clipping range for each group")] = True,
    compensate: Annotated[bool, typer.Option(help="Round with error feedback, as GPTQ does (method squawq)")] = True,
    act_order: Annotated[bool, typer.Option(help="Round columns by descending Hessian diagonal (squawq)")] = True,
    refine: Annotated[
        int, typer.Option(help="Passes of coordinate descent over integers and scales, after rounding (squawq)")
    ] = QuantConfig.refine,
    sequential: Annotated[
        bool, typer.Option(help="Sequential calibration, with QEP's correction for quantized inputs (squawq)")
    ] = True,
    damping: Annotated[
        float,
        typer.Option(help="Hessian damping, as a share of its diagonal; raise it for little text (squawq)"),
    ] = QuantConfig.damping,
    token_weights: Annotated[
        bool | None,
        typer.Option(
            help="Weight calibration tokens by the 16-bit model's gradients; the model must fit in memory (squawq)",
            show_default="on a GPU that holds the model",
        ),
    ] = None,
    tune: Annotated[
        bool | None,
        typer.Option(
            help="After all layers are quantized, train all scales to lower the KL divergence from the 16-bit model",
            show_default="tune on a GPU that holds the model, up to 16e9 parameters",
        ),
    ] = None,
    skip: Annotated[
        list[str] | None, typer.Option(help="Keep linears whose name contains this in 16 bits; repeatable")
    ] = None,
    dtype: Annotated[
        Dtype,
        typer.Option(help="Of tensors that are not quantized; auto: bfloat16 for a bfloat16 source, else float16"),
    ] = DTYPES[0],
    stream: Annotated[
        bool,
        typer.Option("--stream", help="Download a Hub model's files one by one, and keep only those in use"),
    ] = False,
    device: Annotated[
        str,
        typer.Option(
            metavar=f"{DEVICES}|mps",
            help="Device; cuda: all visible GPUs, one process for each",
            autocompletion=completed_by(f"{DEVICES}|mps"),
        ),
    ] = "cpu",
    devices: Annotated[
        int | None,
        typer.Option(help="Processes, which share the calibration; default: one for each GPU of --device cuda, else 1"),
    ] = None,
    states_memory: Annotated[
        float | None,
        typer.Option(
            help="GiB of hidden states to keep in memory; the rest goes to a file beside OUT",
            min=0,
            show_default="1, or a quarter of a GPU's free memory",
        ),
    ] = None,
) -> None:
    """Quantize a 16-bit model to AWQ INT4, one layer in memory at a time. Run it again to resume.

    \b
    Examples:
      squawq quantize Llama-3.1-8B-Instruct Llama-3.1-8B-AWQ
      squawq quantize MODEL OUT --calibration chats.jsonl --samples 128 --device cuda
      squawq quantize MODEL OUT --calibration self --device cuda
      squawq quantize MODEL OUT --device cuda --devices 2
      squawq quantize Qwen2.5-72B-Instruct OUT --for-tensor-parallel 2
    """
    from squawq.compatibility import how_to_run
    from squawq.distributed import torchrun_ranks
    from squawq.format.reader import Checkpoint
    from squawq.local_ranks import local_ranks, rank_count
    from squawq.publish.card import has_template
    from squawq.quantization.pipeline import already_done
    from squawq.quantization.pipeline import quantize as run
    from squawq.quantization.prepare import prepare
    from squawq.report.files import PAGE
    from squawq.report.schema import Report
    from squawq.report.words import read_back, sizes

    config = QuantConfig(
        group_size=group_size,
        zero_point=not symmetric,
        modules_to_not_convert=tuple(skip or ()),
        method=method,
        clip=clip,
        compensate=compensate,
        act_order=act_order,
        refine=refine,
        sequential=sequential,
        damping=damping,
        token_weights=token_weights,
        tune=tune,
        for_tensor_parallel=for_tensor_parallel,
        dtype=dtype,
        samples=samples,
        seqlen=seqlen,
        seed=seed,
    )
    work = partial(
        run,
        model,
        out,
        config,
        calibration=calibration,
        device=device,
        stream=stream,
        progress=False,
        states_memory=states_memory,
    )
    size = rank_count(
        devices, device, stream, lambda: prepare(model, out, config, calibration, device, stream).calibration_blocks
    )
    started = torchrun_ranks(device) if size == 1 else local_ranks(size, device, work)
    with started as ranks, StoppableProgress(ranks.first, ranks.stops_at_once) as observer:
        report = work(observer=observer, ranks=ranks)
    if not ranks.first:
        return
    if observer.started:
        for kept in report["kept_in_16_bits"]:
            console.print(f"{kept['name']} stays in 16 bits: {kept['reason']}")
        found = Report.read(report)
        console.print(sizes(found))
        if found.read_back is not None:
            console.print(read_back(found.read_back))
    else:
        console.print(already_done(out))
    console.print(f"report: {out / PAGE}")
    console.print(f"see what was lost: squawq eval {shlex.quote(str(out))} --reference {shlex.quote(model)}")
    for line in how_to_run(Checkpoint(out).config, out, has_template(out)):
        console.print(line)
    print(out)
