"""`squawq serve`: vLLM's flags, each read into its setting."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from squawq.errors import ConfigError
from squawq.serve.flags import (
    Flag,
    Flags,
    choice,
    listed,
    only,
    parse,
    read_flags,
    signature,
    to_settings,
    tokens,
    truth,
    whole,
)
from squawq.serve.settings import DIALECTS, LOG_FORMATS, LOG_LEVELS, TOOL_PARSERS, Settings

DTYPES = {"auto": "auto", "half": "float16", "float16": "float16", "bfloat16": "bfloat16"}
AWQ = choice({"awq": "awq", "auto_awq": "awq", "awq_marlin": "awq"})
ONE = only(1, whole(1), "it must be 1: one process serves a model here for now")
NO_CODE = only(False, truth, "no code of a model is ever run; leave it out")
NO_SHARE = only(None, str, "the cache is not a share of a GPU's memory here; use --kv-tokens")
FLAGS: Flags = {
    "Model": [
        Flag("model", "The same as MODEL"),
        Flag("served_model_name", "What replies call the model, then aliases; one or several", "served_names"),
        Flag("strict_model_name", "404 for any other `model`; without it all names are taken", switch=True),
        Flag("strict_fields", "Refuse fields that no route knows; without it they are ignored", switch=True),
        Flag("dialect", f"{' or '.join(DIALECTS)}: whose rules hold on the shared routes"),
        Flag("revision", "A branch, tag or commit of the Hub"),
        Flag("dtype", f"{', '.join(DTYPES)}; weights are run as stored", read=choice(DTYPES)),
        Flag("quantization", "awq, auto_awq, awq_marlin; without it as the checkpoint says", read=AWQ, names=("-q",)),
        Flag("max_model_len", "Tokens of a prompt and its answer: 4096, 4K (4096), 4k (4000), auto", read=tokens),
        Flag("max_input_tokens", "Tokens of a prompt alone", read=tokens),
        Flag("chat_template", "A jinja file in place of the model's own template"),
        Flag("tool_call_parser", ", ".join(TOOL_PARSERS)),
        Flag("enable_auto_tool_choice", "Accepted: it is always on", switch=True),
        Flag("trust_remote_code", "Refused: no code of a model is ever run", read=NO_CODE, switch=True),
    ],
    "Engine": [
        Flag("device", "cpu, cuda, cuda:1"),
        Flag("threads", "Of the CPU kernels; without it the machine's"),
        Flag("exact", "32-bit activations: slower, for comparison", switch=True),
        Flag("head", "The output layer: int8 (without it), int4 or 16-bit (--exact's)"),
        Flag("kv_tokens", "Tokens that the cache holds", read=tokens),
        Flag("kv_cache_dtype", "auto or float16", read=choice({"auto": None, "float16": None})),
        Flag("max_num_seqs", "Sequences under way together"),
        Flag("max_num_batched_tokens", "Tokens of a step", read=tokens),
        Flag("enable_prefix_caching", "Reuse the cache of equal beginnings; on", "prefix_caching", switch="no"),
        Flag("tensor_parallel_size", "1 for now", names=("-tp",)),
        Flag("pipeline_parallel_size", "1 for now", read=ONE, names=("-pp",)),
        Flag("data_parallel_size", "1 for now", read=ONE, names=("-dp",)),
        Flag("enforce_eager", "Accepted: nothing is compiled here", switch=True),
        Flag("gpu_memory_utilization", "Refused: use --kv-tokens", read=NO_SHARE),
    ],
    "Network": [
        Flag("host", "The address to listen on; 0.0.0.0 for all"),
        Flag("port", "0 takes a free one", read=whole(0)),
        Flag("uds", "Listen on this Unix socket instead"),
        Flag("ssl_keyfile", "TLS: the key (PEM)"),
        Flag("ssl_certfile", "TLS: the certificate (PEM)"),
        Flag("api_key", "One or several; or VLLM_API_KEY", "api_keys", variable="VLLM_API_KEY"),
        Flag("allowed_origins", "CORS: origins, or a JSON list of them; without it none", read=listed),
    ],
    "Limits": [
        Flag("max_num_queued_reqs", "Requests that wait for their turn; the next is refused", "max_queued", whole(0)),
        Flag("max_connections", "Connections at once"),
        Flag("max_queue_bytes", "Memory of requests that wait or run; the next is refused"),
        Flag("max_body_bytes", "Of a request's body"),
        Flag("h11_max_incomplete_event_size", "Bytes of a request's head", "max_header_bytes"),
        Flag("h11_max_header_count", "Headers of a request", "max_headers"),
        Flag("header_timeout", "For a request's head to arrive"),
        Flag("body_timeout", "For a request's body to arrive"),
        Flag("min_body_rate", "Bytes a second at which a body of more than 64 KiB has to arrive"),
        Flag("idle_timeout", "A connection without a request is closed after it"),
        Flag("write_timeout", "A client that reads nothing is hung up on after it"),
        Flag("queue_timeout", "For a request to wait for its turn"),
        Flag("generation_timeout", "For an answer to be generated, its waiting included"),
        Flag("template_timeout", "For a chat template to be rendered"),
        Flag("grammar_timeout", "For a grammar to be compiled"),
        Flag("sse_keep_alive_interval", "Between comments in a quiet stream", "keep_alive_interval"),
        Flag("shutdown_timeout", "For requests to finish after a signal; 0 aborts them"),
        Flag("validation_workers", "Requests that are checked and tokenized at once"),
        Flag("max_logprobs", "Largest logprobs and top_logprobs"),
        Flag("max_logprob_entries", "Log probabilities that a reply lists"),
        Flag("max_choices", "Largest n"),
        Flag("max_prompts", "Prompts of a completion request"),
        Flag("max_best_of", "TGI: largest best_of"),
        Flag("max_stop_sequences", "TGI: stop strings of a request"),
        Flag("max_top_n_tokens", "TGI: largest top_n_tokens"),
        Flag("max_client_batch", "TGI: prompts of a completion request"),
    ],
    "Logs": [
        Flag(
            "enable_log_requests",
            "A line for each request, with the first 500 characters of its body",
            "log_requests",
            switch="no",
        ),
        Flag("log_format", " or ".join(LOG_FORMATS)),
        Flag("log_level", ", ".join(LOG_LEVELS), names=("--uvicorn-log-level",)),
    ],
}
MODEL = Annotated[
    str | None, typer.Argument(metavar="MODEL", help="A model folder or a Hub id", rich_help_panel="Model")
]


def serve(path: str | None, **given: Any) -> None:
    """Serve a model: the routes of OpenAI and vLLM and those of TGI on one port. The flags are vLLM's.

    \b
    Examples:
      squawq serve Llama-3.1-8B-AWQ --port 8000
      squawq serve MODEL --served-model-name llama tgi --max-model-len 8K --api-key SECRET
      curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \\
        -d '{"messages": [{"role": "user", "content": "Tell me a story."}]}'
    """
    from squawq.serve.server import run

    raise typer.Exit(run(_settings({"path": path, **given}, os.environ)))


serve.__signature__ = signature(  # type: ignore[attr-defined]
    FLAGS, inspect.Parameter("path", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None, annotation=MODEL)
)


def settings_from(arguments: Sequence[str], environ: Mapping[str, str]) -> Settings:
    """What `squawq serve` with these arguments would serve."""
    return _settings(parse(serve, arguments), environ)


def _settings(given: Mapping[str, Any], environ: Mapping[str, str]) -> Settings:
    path, found = given["path"], read_flags(FLAGS, given, environ)
    model = found.get("model", path)
    if model is None:
        raise ConfigError("no model: squawq serve MODEL (words after --api-key or --served-model-name belong to those)")
    if path not in (None, model):
        raise ConfigError(f"MODEL is {path!r} and --model {model!r}; give one of them")
    return to_settings(FLAGS, found, model=model)
