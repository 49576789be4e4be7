"""`text-generation-launcher`: TGI's flags, environment variables and defaults, for the server of `squawq serve` with
TGI's dialect. A flag wins over its variable. Unsupported values are refused, never ignored.
"""

from __future__ import annotations

import faulthandler
import inspect
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any

import typer

from squawq import __version__
from squawq.engine.config import EngineConfig
from squawq.errors import ConfigError
from squawq.serve.flags import HELP, Choice, Command, Flag, FlagTable, Only, among, finish, parse, share, truth, whole
from squawq.serve.launcher import DEVICE, NO_CODE
from squawq.serve.settings import ServerSettings

LEVELS = {"trace": "debug", "debug": "debug", "info": "info", "warn": "warning", "warning": "warning", "error": "error"}
IGNORED = {
    "the batch takes new requests at every step": ("waiting_served_ratio", "max_waiting_tokens"),
    "no graphs are made": ("cuda_graphs",),
    "there are no shards": ("shard_uds_path", "master_addr", "master_port"),
    "there are no traces": ("otlp_endpoint", "otlp_service_name"),
    "none are sent": ("usage_stats",),
    "requests for a watermark are refused": ("watermark_gamma", "watermark_delta"),
}
NO_TUNNEL = "there is no tunnel"
ABSENT = {
    "positions are scaled as the model's config.json says": ("rope_scaling", "rope_factor"),
    "the chat template is the model's (squawq serve --chat-template takes another)": ("tokenizer_config_path",),
    "MODEL_ID takes a folder": ("weights_cache_override",),
    "there are no adapters": ("lora_adapters",),
    NO_TUNNEL: ("ngrok_authtoken", "ngrok_edge"),
}
QUANTIZED = Choice({method: method for method in ("awq", "gptq", "compressed-tensors")})
OFF = Choice({"true": False, "1": False, "false": True, "0": True})  # of a switch that turns something off


def log_level(text: str) -> str:
    """The level of Rust's directives, as TGI reads LOG_LEVEL: `info`, `info,text_generation_router=debug`.

    A directive for the router, which this server is, wins over a bare level; other targets are ignored.
    """
    level = router = None
    for directive in filter(None, text.split(",")):
        target, equals, name = directive.strip().rpartition("=")
        if name.lower() not in LEVELS or (equals and not target):
            raise ConfigError(f"choose one of {', '.join(LEVELS)}, or write TARGET=LEVEL between commas")
        if not target:
            level = LEVELS[name.lower()]
        elif target.partition("::")[0] == "text_generation_router":
            router = LEVELS[name.lower()]
    return router or level or "info"


TABLE: dict[str, list[Flag]] = {
    "Model": [
        Flag("model_id", "A model folder or a Hub id; it must be given", "model", is_model=True),
        Flag("revision", "A branch, tag or commit of the Hub"),
        Flag("quantize", "Without it as the checkpoint says", "quantization", QUANTIZED),
        Flag(
            "dtype",
            "Activations on CUDA; default: float16",
            read=among(("float16", "bfloat16")),
        ),
        DEVICE,
        Flag("num_shard", "Processes that share the model, on a CPU", "tensor_parallel_size"),
        Flag("sharded", "true needs NUM_SHARD above 1", read=truth),
        Flag("kv_cache_dtype", "fp8_e4m3fn: half the memory; on CUDA", read=Choice({"fp8_e4m3fn": "fp8_e4m3"})),
        Flag("huggingface_hub_cache", "The folder of models from the Hub, where HF_HUB_CACHE names none"),
    ],
    "Network": [
        Flag("hostname", "The address to listen on", "host", default="0.0.0.0"),
        Flag("port", "0 takes a free one", read=whole(0), names=("-p",), default=3000),
        Flag("prometheus_port", "Serve /metrics on this port, too; without it on the server's alone"),
        Flag("api_key", "What requests must carry as a bearer token", "api_keys"),
        Flag("cors_allow_origin", "An origin whose pages may ask, or *; without it none", "allowed_origins"),
    ],
    "Limits": [
        Flag("max_input_tokens", "Tokens of a prompt alone"),
        Flag("max_input_length", "The older name of --max-input-tokens", "max_input_tokens"),
        Flag("max_total_tokens", "Tokens of a prompt and its answer", "max_model_len"),
        Flag(
            "max_concurrent_requests",
            "Requests under way or waiting; more are refused",
            read=whole(1),
            default=128,
            metavar="N",
        ),
        Flag("max_batch_size", "Sequences under way together; 64 on a CPU, 256 on CUDA", read=whole(1), metavar="N"),
        Flag("max_batch_prefill_tokens", "Tokens of a step", "max_num_batched_tokens"),
        Flag("max_batch_total_tokens", "Tokens that the cache holds", "kv_tokens"),
        Flag("max_best_of", "Largest best_of"),
        Flag("max_stop_sequences", "Stop strings of a request"),
        Flag("max_top_n_tokens", "Largest top_n_tokens"),
        Flag("max_client_batch_size", "Prompts of a completion request", "max_client_batch"),
        Flag("validation_workers", "Requests that are checked and tokenized at once"),
        Flag("cuda_memory_fraction", "CUDA: share of the GPU's memory; 0.9", "gpu_memory_utilization", share),
        Flag("disable_grammar_support", "Refuse grammars and tools", "grammar_support", OFF, switch=True),
        Flag("payload_limit", "Bytes of a request's body", "max_body_bytes"),
        Flag("graceful_termination_timeout", "For requests to finish after a signal", "shutdown_timeout", default=90),
    ],
    "Logs": [
        Flag("json_output", "Write JSON", read=truth, switch=True),
        Flag("log_level", "A level, or directives such as info,text_generation_router=debug", read=log_level),
    ],
    "Accepted: they change nothing here": [
        *(Flag(key, why, noted=True) for why, keys in IGNORED.items() for key in keys),
        Flag("trust_remote_code", NO_CODE, read=truth, switch=True, noted=True),
        Flag("enable_prefill_logprobs", "they can always be had", read=truth, switch=True, noted=True),
        Flag("disable_custom_kernels", "none come from elsewhere", read=truth, switch=True, noted=True),
    ],
    "Refused where they ask for what is not here": [
        Flag("speculate", "must be 0", read=Only(0, whole(0), "it must be 0: there is no speculative decoding")),
        Flag("ngrok", NO_TUNNEL, read=Only(False, truth, f"{NO_TUNNEL}; leave it out"), switch=True),
        *(Flag(key, why, read=Only(None, str, f"{why}; leave it out")) for why, keys in ABSENT.items() for key in keys),
    ],
}
FLAGS = FlagTable(
    {section: [replace(flag, variables=(flag.key.upper(),)) for flag in rows] for section, rows in TABLE.items()},
    host="HOSTNAME",  # TGI binds to it all the same
)
app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, context_settings=HELP)


@app.command(cls=Command)
def launch(env: bool, version: bool, **given: Any) -> None:
    """Serve a model as text-generation-inference does: its routes, its defaults, its errors.

    Each flag is an environment variable too, by its name in capitals: MODEL_ID for --model-id. The flag wins. A switch
    is true, false, 1 or 0 there. huggingface_hub reads HF_TOKEN. More limits: squawq serve --dialect tgi.

    \b
    Examples:
      text-generation-launcher --model-id Llama-3.1-8B-AWQ --port 8080
      MODEL_ID=MODEL MAX_INPUT_TOKENS=4000 MAX_TOTAL_TOKENS=4096 text-generation-launcher
      curl localhost:8080/generate -H 'Content-Type: application/json' \\
        -d '{"inputs": "Once upon a time", "parameters": {"max_new_tokens": 20}}'
    """
    if version:
        print(f"text-generation-launcher {__version__} (squawq)")
        raise typer.Exit
    found = FLAGS.read(given, os.environ)
    settings = _settings(found)
    if "huggingface_hub_cache" in found:  # before huggingface_hub, which reads it when it is imported
        os.environ.setdefault("HF_HUB_CACHE", found["huggingface_hub_cache"])
    from squawq.serve.server import run

    raise typer.Exit(run(settings, FLAGS.notes(given, os.environ), environment=env))


ENV = Annotated[bool, typer.Option("--env", "-e", help="Log what runs here, then serve", rich_help_panel="Logs")]
VERSION = Annotated[bool, typer.Option("--version", "-V", help="Print the version and end", rich_help_panel="Logs")]
launch.__signature__ = FLAGS.signature(  # type: ignore[attr-defined]
    inspect.Parameter("env", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=ENV),
    inspect.Parameter("version", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=VERSION),
)


def settings_from(arguments: Sequence[str], environ: Mapping[str, str]) -> ServerSettings:
    """The settings of text-generation-launcher with these arguments and this environment."""
    return _settings(FLAGS.read(parse(launch, arguments), environ))


def _settings(found: Mapping[str, Any]) -> ServerSettings:
    if "model_id" not in found:
        raise ConfigError("no model: set MODEL_ID or --model-id to a model folder or a Hub id")
    tokens, length, total = (found.get(f"max_{key}") for key in ("input_tokens", "input_length", "total_tokens"))
    if None not in (tokens, length) and tokens != length:
        raise ConfigError(f"MAX_INPUT_TOKENS is {tokens} and MAX_INPUT_LENGTH {length}; they mean the same, give one")
    prompt = tokens or length
    if prompt and total and prompt >= total:
        raise ConfigError(f"MAX_TOTAL_TOKENS is {total}; it must be more than MAX_INPUT_TOKENS, which is {prompt}")
    if found.get("sharded") and found.get("num_shard", 1) == 1:
        raise ConfigError(
            "SHARDED is true, which needs NUM_SHARD above 1: the number of processes that share the model"
        )
    most = found.get("max_batch_size") or EngineConfig(device=found.get("device", "auto")).max_num_seqs
    running = min(most, found["max_concurrent_requests"])
    return FLAGS.settings(
        found,
        dialect="tgi",
        max_num_seqs=running,
        max_queued=found["max_concurrent_requests"] - running,
        log_format="json" if found.get("json_output") else "text",
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return finish(app, "text-generation-launcher", arguments)


def entry() -> None:
    faulthandler.enable()  # whatever may kill the process, it does not end without a line
    sys.exit(main())


if __name__ == "__main__":
    entry()
