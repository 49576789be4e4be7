"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from squawq.engine import config
from squawq.serve.flags import complete_model, completed_by
from squawq.serve.launcher import MODEL_IMPL

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A model folder, or a Hub id such as meta-llama/Llama-3.1-8B-Instruct",
        autocompletion=complete_model,
    ),
]
DEVICES = "cpu|cuda|cuda:N"
Device = Annotated[
    str,
    typer.Option(
        metavar=f"auto|{DEVICES}",
        help="Where to run; auto: an NVIDIA GPU that can, else the CPU",
        autocompletion=completed_by(f"auto|{DEVICES}"),
    ),
]
Temperature = Annotated[
    float | None, typer.Option(help="Sampling temperature, 0: greedy; default: from generation_config.json")
]
TopP = Annotated[float | None, typer.Option(help="Nucleus sampling, above 0 to 1")]
MaxTokens = Annotated[int, typer.Option(help="Maximum number of new tokens")]
Seed = Annotated[int | None, typer.Option(help="Random seed of sampling")]
ModelImpl = Annotated[config.ModelImpl, typer.Option(help=MODEL_IMPL.help)]
Threads = Annotated[int | None, typer.Option(help="Threads of the CPU kernels; default: all available cores", min=1)]
TensorParallelSize = Annotated[
    int,
    typer.Option(
        "--tensor-parallel-size",
        "-tp",
        help="Processes that share the model; each has a GPU, or --threads of a CPU",
        min=1,
    ),
]
Heads = Literal["int8", "int4", "16-bit"]  # nn.loader.HEADS, without importing torch
Head = Annotated[
    Heads | None,
    typer.Option(
        help="LM head: int8 (default on a CPU), int4 (smaller, less exact) or 16-bit (default on CUDA and with --exact)"
    ),
]
Dtype = Annotated[
    Literal["auto", "float16", "bfloat16"],
    typer.Option(help="Of activations on CUDA; auto: float16. A CPU takes only auto"),
]
KvCacheDtype = Annotated[
    Literal["auto", "float16", "fp8", "fp8_e4m3"],
    typer.Option(help="KV cache; fp8: half the memory, CUDA from compute capability 8.9"),
]
Exact = Annotated[
    bool,
    typer.Option(
        "--exact",
        help="Float32 activations (a GPU: plain torch); slower, for comparison",
    ),
]
