"""`squawq inspect`: what a model is, as a table for people or JSON for machines."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from squawq.commands.output import results
from squawq.serve.flags import complete_model


def inspect(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A model folder, a config.json, or a Hub id", autocompletion=complete_model
        ),
    ],
    context: Annotated[
        int | None, typer.Option(help="Sequence length; default: 8192, or the model's positions")
    ] = None,
    batch: Annotated[int, typer.Option(help="Batch size")] = 1,
    device_memory: Annotated[
        str | None,
        typer.Option(
            metavar="BYTES",
            help="How many NVIDIA GPUs with this memory the model needs: 24G (24 * 2^30), or 24g (24 * 10^9)",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout instead of the tables")] = False,
) -> None:
    """See what a model is without loading it: architecture, quantization, sizes, and the memory to run it.

    \b
    Examples:
      squawq inspect OUT
      squawq inspect Llama-3.1-70B/config.json --context 32768 --batch 4 --json
      squawq inspect Llama-3.1-70B/config.json --device-memory 24G
    """
    from squawq.inspection import inspect as run

    found = run(model, context, batch, None if device_memory is None else _bytes(device_memory))
    with results():
        if as_json:
            print(json.dumps(found))
        else:
            _print(found)


def _bytes(text: str) -> int:
    from squawq.errors import ConfigError
    from squawq.serve.flags import scaled

    if (count := scaled(text)) < 1:
        raise ConfigError(f"--device-memory is {text!r}; it must be a number of bytes, such as 24G or 24g")
    return count


def _print(found: dict[str, Any]) -> None:
    from squawq.compatibility import ENGINES
    from squawq.progress import output

    console = output()
    forms = [form for form in ("fp16", "int4") if found["devices"] is not None and found["devices"].get(form)]
    for table in (_model(found), _sizes(found), _memory(found), *(_devices(found, form) for form in forms)):
        console.print(table, soft_wrap=False)
    for gpu in found["gpus"]:
        console.print(f"{gpu['name']}: {size(gpu['free'])} of {size(gpu['total'])} are free")
    if found["kept_in_16_bits"]:
        console.print(f"not quantized: {', '.join(found['kept_in_16_bits'])}")
    runs = "; ".join(ENGINES[name] for name in found["runs_in"]) or "no engine that squawq knows"
    console.print(f"{'runs' if found['quantization'] else 'once quantized it runs'} in: {runs}")
    console.print(_kept_bytes(found))


def _kept_bytes(found: dict[str, Any]) -> str:
    """Why INT4 is not a quarter of 16 bits."""
    kept, weights = 2 * found["vocab_size"] * found["hidden_size"], found["memory"]["int4"]["weights"]
    return f"INT4 weights are {size(weights)}, of which the embedding, which stays in 16 bits, is {size(kept)}"


def _table(title: str, *headings: str) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left")
    return table


def _model(found: dict[str, Any]) -> Any:
    table = _table(found["model"], "model", "")
    quant, tied = found["quantization"], "tied" if found["tied_embeddings"] else "not tied"
    table.add_row("architecture", found["architecture"])
    table.add_row("parameters", f"{found['parameters']:,}")
    table.add_row("layers", str(found["layers"]))
    table.add_row("hidden, inner", f"{found['hidden_size']:,}, {found['intermediate_size']:,}")
    table.add_row("heads, key-value heads, of", f"{found['heads']}, {found['kv_heads']}, {found['head_dim']}")
    table.add_row("vocabulary", f"{found['vocab_size']:,} (head {tied})")
    table.add_row("positions", f"{found['max_positions']:,}")
    for name, label in {"squawq": "squawq", "whole_groups": "vLLM, TGI"}.items():
        if name in found["tensor_parallel"]:
            table.add_row(f"tensor parallel, {label}", ", ".join(map(str, found["tensor_parallel"][name])))
    if quant is None:
        table.add_row("quantization", "none")
    else:
        group = "a row a group" if quant["group_size"] == -1 else f"groups of {quant['group_size']}"
        zero = "zero point" if quant["zero_point"] else "symmetric"
        table.add_row("quantization", f"{quant['method']} {quant['format']}, {quant['bits']} bits, {group}, {zero}")
    return table


def _sizes(found: dict[str, Any]) -> Any:
    from squawq.inspection import KINDS

    origin = "as the files have it" if found["tensors"] == "headers" else "worked out from config.json"
    table = _table(f"size, {origin}", "tensors", "layers", "size")
    for row in found["linears"]:
        forms = ", ".join(f"{count} {form}" for form, count in row["layers"].items())
        table.add_row(f"{row['name']} [{row['out_features']}, {row['in_features']}]", forms, "")
    table.add_section()
    for kind, label in KINDS.items():
        if found["bytes"][kind]:
            table.add_row(label, "", size(found["bytes"][kind]))
    table.add_section()
    table.add_row("all", "", size(found["bytes"]["total"]))
    return table


def _memory(found: dict[str, Any]) -> Any:
    memory = found["memory"]
    table = _table(f"memory to run {memory['batch']} x {memory['context']:,} tokens", "", "16-bit", "INT4")
    for part, label in {"weights": "weights", "kv_cache": "keys and values", "workspace": "workspace"}.items():
        table.add_row(label, size(memory["fp16"][part]), size(memory["int4"][part]))
    table.add_section()
    table.add_row("all", size(memory["fp16"]["total"]), size(memory["int4"]["total"]))
    return table


def _devices(found: dict[str, Any], form: str) -> Any:
    """A row for each number of GPUs that can share the model."""
    from squawq.engine.capacity import gib

    devices, memory, label = found["devices"], found["memory"], {"fp16": "16-bit", "int4": "INT4"}[form]
    rows, wanted = devices[form], f"{memory['batch']} x {memory['context']:,} tokens"
    fewest = next((row["size"] for row in rows if row["fits"]), None)
    need = f"needs {fewest} for {wanted}" if fewest else f"has no room for {wanted}"
    title = f"{label} on GPUs of {size(devices['memory'])}, of which {devices['share']:.0%} are used: {need}"
    table = _table(title, "GPUs", "weights of each", "steps", "keys and values", "tokens", "")
    for row in rows:
        parts = (gib(row[part]) for part in ("weights", "steps", "room"))
        table.add_row(str(row["size"]), *parts, f"{row['tokens']:,}", "the fewest" if row["size"] == fewest else "")
    return table


def size(count: int) -> str:
    """Bytes for people: in GB (10^9, as disks and the Hub count) and GiB (2^30, as memory is counted)."""
    if count < 10**8:
        return f"{count / 1e6:,.1f} MB"
    return f"{count / 1e9:,.1f} GB ({count / 2**30:,.1f} GiB)"
