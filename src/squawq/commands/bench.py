"""`squawq bench`: how fast a model runs here, as a table or JSON."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.table import Table

from squawq.commands.options import (
    Device,
    Dtype,
    Exact,
    Head,
    KvCacheDtype,
    Model,
    ModelImpl,
    TensorParallelSize,
    Threads,
)
from squawq.commands.output import results
from squawq.progress import console, output


def bench(
    model: Model,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of each prompt")] = 512,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate after it")] = 128,
    streams: Annotated[int, typer.Option(help="Requests at once")] = 1,
    device: Device = "auto",
    model_impl: ModelImpl = "auto",
    threads: Threads = None,
    exact: Exact = False,
    head: Head = None,
    dtype: Dtype = "auto",
    kv_cache_dtype: KvCacheDtype = "auto",
    tensor_parallel_size: TensorParallelSize = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON instead of the table")] = False,
) -> None:
    """Measure how fast a model runs on this machine: random token ids, no early stop; it needs no tokenizer.

    \b
    Examples:
      squawq bench OUT
      squawq bench OUT --prompt-tokens 128 --new-tokens 128 --streams 8 --json
      squawq bench OUT --device cpu --threads 4
      squawq bench OUT --device cpu --threads 2 --tensor-parallel-size 2
      squawq bench OUT --model-impl transformers
    """
    from squawq.bench import bench as run

    with console.status(f"measuring {model}"):
        found = run(
            model,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            streams=streams,
            device=device,
            model_impl=model_impl,
            threads=threads,
            exact=exact,
            head=head,
            dtype=dtype,
            kv_cache_dtype=kv_cache_dtype,
            tensor_parallel_size=tensor_parallel_size,
        )
    with results():
        if as_json:
            print(json.dumps(found))
        else:
            _print_speed(found)


def _print_speed(found: dict[str, Any]) -> None:
    title = f"{found['streams']} x ({found['prompt_tokens']} in, {found['new_tokens']} out)"
    machine = f"{found['threads']} threads, {found['isa']}" if found["device"] == "cpu" else found["gpu"]
    table = Table(title=f"{title}, {machine}")
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
    output().print(table)
