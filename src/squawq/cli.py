"""The command line: parse, call, print.

Results go to stdout, everything else to stderr; a misuse is one line and exit code 2.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from squawq import __version__
from squawq.commands.export import export
from squawq.commands.inspect import inspect
from squawq.commands.push import push
from squawq.config import DTYPES, GROUP_SIZES, METHODS, QuantConfig
from squawq.errors import ConfigError
from squawq.progress import LayerProgress, console, counting
from squawq.serve.flags import Command, finish
from squawq.serve.launcher import serve

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Make Llama-class models small (AWQ INT4), see what is left of them, and run them.",
)
Model = Annotated[str, typer.Argument(help="A model folder, or a Hub id such as meta-llama/Llama-3.1-8B-Instruct")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1")]
Temperature = Annotated[
    float | None, typer.Option(help="0 takes the likeliest token; default: what the model asks for")
]
MaxTokens = Annotated[int, typer.Option(help="At most so many new tokens")]
Seed = Annotated[int | None, typer.Option(help="The same text again")]
Threads = Annotated[int | None, typer.Option(help="Of the CPU kernels; default: the machine's", min=1)]
Head = Annotated[
    str | None,
    typer.Option(help="The output layer: int8 (default), int4 (smaller, less exact) or 16-bit (--exact's)"),
]
Exact = Annotated[bool, typer.Option("--exact", help="32-bit activations: slower, for comparison")]


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version")] = False
) -> None:
    if version:
        print(f"squawq {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def quantize(
    model: Model,
    out: Annotated[Path, typer.Argument(help="The folder to make; it appears when the work is done")],
    calibration: Annotated[
        str | None, typer.Option(help="A .txt or .jsonl file, or a Hub data set id; default: the built-in set")
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Calibration blocks; default: what there is, up to 128")] = None,
    seqlen: Annotated[int | None, typer.Option(help="Tokens in a block; default: 512, or the model's context")] = None,
    group_size: Annotated[
        int, typer.Option(help=f"Weights that share a scale: {', '.join(map(str, GROUP_SIZES))}")
    ] = 128,
    symmetric: Annotated[bool, typer.Option("--symmetric", help="No zero point")] = False,
    method: Annotated[str, typer.Option(help=" or ".join(METHODS))] = "awq",
    clip: Annotated[bool, typer.Option(help="Search a narrower range for each group")] = True,
    skip: Annotated[
        list[str] | None, typer.Option(help="Keep linears with this in their name in 16 bits; repeatable")
    ] = None,
    dtype: Annotated[str, typer.Option(help=f"Of what stays in 16 bits: {' or '.join(DTYPES)}")] = "float16",
    device: Device = "cpu",
) -> None:
    """Quantize a 16-bit model to AWQ INT4, one layer in memory at a time. Run it again to go on after a stop.

    Examples: squawq quantize Llama-3.1-8B-Instruct Llama-3.1-8B-AWQ
    | squawq quantize MODEL OUT --calibration chats.jsonl --samples 128 --device cuda
    """
    from squawq.quantization.pipeline import quantize as run

    config = QuantConfig(
        group_size=group_size,
        zero_point=not symmetric,
        modules_to_not_convert=tuple(skip or ()),
        method=method,
        clip=clip,
        dtype=dtype,
        samples=samples,
        seqlen=seqlen,
    )
    with LayerProgress() as observer:
        report = run(model, out, config, calibration=calibration, device=device, observer=observer)
    for kept in report["kept_in_16_bits"]:
        console.print(f"{kept['name']} stays in 16 bits: {kept['reason']}")
    console.print(f"{report['source_bytes'] / 1e6:,.1f} MB -> {report['bytes'] / 1e6:,.1f} MB")
    console.print(f"See what was lost: squawq eval {out} --reference {model}")
    print(out)


@app.command("eval")
def evaluate(
    model: Model,
    reference: Annotated[
        str | None, typer.Option(help="The 16-bit model to compare with: KL and top-1 agreement")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="A text file; default: the built-in evaluation text")] = None,
    window: Annotated[int | None, typer.Option(help="Tokens of context; default: 1024, or the model's context")] = None,
    stride: Annotated[int | None, typer.Option(help="Tokens between windows; default: half a window")] = None,
    max_tokens: Annotated[int, typer.Option(help="Read at most so many tokens", min=2)] = 32_768,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout instead of the table")] = False,
    plot: Annotated[Path | None, typer.Option(help="Write a PNG: loss per layer, KL per position")] = None,
    device: Device = "cpu",
) -> None:
    """Measure a model: perplexity, and with --reference how far it is from its 16-bit original.

    Examples: squawq eval OUT --reference MODEL
    | squawq eval OUT --reference MODEL --text wiki.txt --window 2048 --json --plot loss.png
    """
    from squawq.evaluation.run import evaluate as run

    if plot is not None:
        from squawq.evaluation.plots import check_plot

        check_plot(plot)
    with counting("evaluating") as progress:
        scores = run(
            model,
            reference,
            text=text,
            window=window,
            stride=stride,
            max_tokens=max_tokens,
            device=device,
            progress=progress,
        )
    if plot is not None:
        from squawq.evaluation.plots import save_plot
        from squawq.format.reader import read_json
        from squawq.hub.download import resolve

        report = resolve(model) / "squawq_report.json"
        save_plot(plot, read_json(report) if report.is_file() else None, scores)
        console.print(f"plot: {plot}")
    if as_json:
        print(json.dumps(allow_nan=False, obj={"model": model, "reference": reference, **scores}))
    else:
        _print_scores(scores)


def _print_scores(scores: dict[str, Any]) -> None:
    table = Table(title=f"{scores['tokens']:,} tokens, window {scores['window']}, stride {scores['stride']}")
    table.add_column("measure")
    table.add_column("value", justify="right")
    table.add_row("perplexity", f"{scores['perplexity']:.4f}")
    if "kl_mean" in scores:
        table.add_row("perplexity of the reference", f"{scores['reference_perplexity']:.4f}")
        table.add_row("KL to the reference, mean (nats)", f"{scores['kl_mean']:.5f}")
        table.add_row("KL to the reference, 99th percentile", f"{scores['kl_p99']:.5f}")
        table.add_row("same likeliest token", f"{scores['top1_agreement']:.2%}")
    from rich.console import Console

    Console().print(table)


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The text to go on from")],
    max_tokens: MaxTokens = 256,
    temperature: Temperature = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus sampling, above 0 to 1")] = None,
    seed: Seed = None,
    device: Device = "cpu",
    threads: Threads = None,
    exact: Exact = False,
    head: Head = None,
) -> None:
    """Continue a text: the continuation on stdout, everything else on stderr.

    Example: squawq generate OUT -p "Once upon a time" --max-tokens 100 --temperature 0
    """
    llm = _load(model, device=device, threads=threads, exact=exact, head=head)
    _write(llm.stream(prompt, _sampling(llm, max_tokens, temperature, top_p, seed)))


@app.command()
def chat(
    model: Model,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus sampling, above 0 to 1")] = None,
    system: Annotated[str | None, typer.Option(help="A system message")] = None,
    seed: Seed = None,
    device: Device = "cpu",
    threads: Threads = None,
    exact: Exact = False,
    head: Head = None,
) -> None:
    """Talk to a model. An empty line is ignored; /new starts over, /exit or Ctrl-D ends.

    Example: squawq chat OUT --system "You are a friendly storyteller."
    """
    llm = _load(model, device=device, threads=threads, exact=exact, head=head)
    sampling = _sampling(llm, max_tokens, temperature, top_p, seed)
    start = [{"role": "system", "content": system}] if system else []
    llm.tokenizer.render([*start, {"role": "user", "content": "hello"}])  # a model without a template ends here
    messages = list(start)
    while True:
        try:
            line = console.input("[bold]> [/bold]").strip()
        except EOFError:
            console.print()
            return
        if line == "/exit":
            return
        if line == "/new":
            messages = list(start)
        elif line:
            question = [*messages, {"role": "user", "content": line}]
            try:
                answer = _write(llm.stream_chat(question, sampling))
            except ConfigError as error:
                console.print(f"{error}; /new starts over", style="red")
                continue
            except KeyboardInterrupt:
                console.print("\n(stopped)")
                continue
            messages = [*question, {"role": "assistant", "content": answer}]


@app.command()
def bench(
    model: Model,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of each prompt")] = 512,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate after it")] = 128,
    streams: Annotated[int, typer.Option(help="Requests at once")] = 1,
    threads: Threads = None,
    exact: Exact = False,
    head: Head = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON instead of the table")] = False,
) -> None:
    """Measure how fast a model runs on this CPU: random token ids, no early stop; it needs no tokenizer.

    Examples: squawq bench OUT
    | squawq bench OUT --prompt-tokens 128 --new-tokens 128 --streams 8 --json
    """
    from squawq.bench import bench as run

    with console.status(f"measuring {model}"):
        found = run(
            model,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            streams=streams,
            threads=threads,
            exact=exact,
            head=head,
        )
    if as_json:
        print(json.dumps(found))
    else:
        _print_speed(found)


def _print_speed(found: dict[str, Any]) -> None:
    from rich.console import Console

    title = f"{found['streams']} x ({found['prompt_tokens']} in, {found['new_tokens']} out), {found['threads']} threads"
    table = Table(title=f"{title}, {found['isa']}")
    table.add_column("measure")
    table.add_column("value", justify="right")
    table.add_row("prefill", f"{found['prefill_tok_s']:,.1f} tokens/s")
    table.add_row("decode, all streams", f"{found['decode_tok_s']:,.1f} tokens/s")
    table.add_row("time to first token", f"{found['ttft_ms']:,.1f} ms")
    table.add_row("between tokens, median", f"{found['itl_ms_p50']:.2f} ms")
    table.add_row("between tokens, 99th percentile", f"{found['itl_ms_p99']:.2f} ms")
    table.add_row("engine's share of the time", f"{found['overhead']:.1%}")
    table.add_row("peak memory", f"{found['peak_rss_bytes'] / 2**30:.2f} GiB")
    table.add_row("load", f"{found['load_s']:.2f} s")
    Console().print(table)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where the quantized demo model goes")] = Path("squawq-demo"),
) -> None:
    """Quantize the bundled demo model, measure it, and let both versions answer the same question.

    Example: squawq demo
    """
    from rich.console import Console

    from squawq.demo import run

    stdout = Console()
    run(out, stdout)
    squawq = "squawq" if shutil.which("squawq") else sys.argv[0]  # as it was called, where it is not on the PATH
    stdout.print(f"The quantized model is in {out}. Talk to it:  {squawq} chat {out}", soft_wrap=True)
    stdout.print(
        f"It is a plain AWQ checkpoint; a server that reads those serves it:  vllm serve {out}", soft_wrap=True
    )


app.command(cls=Command)(serve)
app.command()(export)
app.command()(inspect)
app.command()(push)


def _load(model: str, **options: Any) -> Any:
    from squawq.llm import LLM

    with console.status(f"loading {model}"):
        return LLM(model, **options)


def _sampling(llm: Any, max_tokens: int, temperature: float | None, top_p: float | None, seed: int | None) -> Any:
    from dataclasses import replace

    given = {"temperature": temperature, "top_p": top_p, "seed": seed}
    return replace(llm.sampling_defaults(), max_tokens=max_tokens, **{k: v for k, v in given.items() if v is not None})


def _write(pieces: Generator[str]) -> str:
    """Pieces to stdout as they come; returns the whole. Interrupted, it stops the work behind them."""
    written = []
    with closing(pieces):
        for piece in pieces:
            sys.stdout.write(piece)
            sys.stdout.flush()
            written.append(piece)
    sys.stdout.write("\n")
    return "".join(written)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 1 when the machine fails, 2 for a misuse, 130 when stopped."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    again = "stopped; run the same command again (quantize goes on where it was)"
    return finish(app, "squawq", arguments, stopped=again)


def entry() -> None:
    """The console script."""
    sys.exit(main())
