"""`squawq serve`: vLLM's flags. Each sets a setting, is refused, or has no effect, and then the log says why.

A value that would change what users get, but is not supported, is refused.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
import yaml

from squawq.engine.config import ModelImpl
from squawq.errors import ConfigError
from squawq.serve.flags import (
    Choice,
    Flag,
    FlagTable,
    FromFile,
    Only,
    among,
    arguments,
    complete_model,
    listed,
    parse,
    share,
    tokens,
    whole,
)
from squawq.serve.settings import DIALECTS, LOG_FORMATS, LOG_LEVELS, TOOL_PARSERS, ServerSettings

DTYPES = {"auto": "auto", "half": "float16", "float16": "float16", "bfloat16": "bfloat16"}
LEVELS = {level: level for level in LOG_LEVELS} | {"critical": "error", "trace": "debug"}  # uvicorn's further ones
METHODS = Choice(
    {
        **dict.fromkeys(("awq", "auto_awq", "awq_marlin"), "awq"),
        **dict.fromkeys(("gptq", "gptq_marlin"), "gptq"),
        **{method: method for method in ("compressed-tensors", "auto-round")},
    }
)
ONE = Only(1, whole(1), "it must be 1: only tensor parallelism is supported")
NO_CODE = "no code of a model is ever run"
STEPS = "every step takes prompts in chunks and running answers together"
CACHE = among(("auto", "float16", "fp8", "fp8_e4m3"))
MODEL_IMPL = Flag(
    "model_impl",
    "Which code runs the model: squawq's decoder, transformers' class (slower), or auto: squawq's where it can",
    read=among(get_args(ModelImpl)),
)
DEVICE = Flag("device", "Where to run; auto: an NVIDIA GPU that can, else the CPU", metavar="auto|cpu|cuda|cuda:N")
SWITCHES = {
    NO_CODE: ("trust_remote_code",),
    "nothing is compiled": ("enforce_eager",),
    "no statistics are logged; /metrics has them": ("disable_log_stats",),
    "--log-level warning leaves out the lines of requests": ("disable_uvicorn_access_log",),
    "replies always carry X-Request-Id": ("enable_request_id_headers",),
    "/tokenizer_info is always there": ("enable_tokenizer_info_endpoint",),
    "/metrics has the load": ("enable_server_load_tracking",),
    "there is one process": ("disable_custom_all_reduce", "disable_frontend_multiprocessing", "enable_expert_parallel"),
    "there is no cascade attention": ("disable_cascade_attn",),
    "there is one kind of cache": ("disable_hybrid_kv_cache_manager",),
    "there is one block manager": ("use_v2_block_manager",),
}
PAIRS = {  # --x and --no-x
    STEPS: ("enable_chunked_prefill", "async_scheduling"),
    "there is no bar": ("use_tqdm_on_load",),
}
VALUES = {
    "nothing is swapped": ("swap_space",),
    "weights are not offloaded": ("cpu_offload_gb",),
    "a page of the cache holds 16 tokens": ("block_size",),
    "the prefix cache has one hash": ("prefix_caching_hash_algo",),
    "a CUDA graph is captured for each batch size": ("max_seq_len_to_capture",),
    "nothing is compiled": ("compilation_config",),
    "there is one": ("attention_backend",),
    STEPS: (
        "max_num_partial_prefills",
        "max_long_partial_prefills",
        "long_prefill_token_threshold",
        "num_scheduler_steps",
    ),
    "layers are loaded one by one": ("max_parallel_loading_workers",),
    "weights are read one by one": ("safetensors_load_strategy",),
    NO_CODE: ("code_revision",),
    "the first 500 characters of a body are logged": ("max_log_len",),
    "text alone is taken": ("limit_mm_per_prompt",),
    "there are no traces": ("otlp_traces_endpoint", "collect_detailed_traces"),
}
BACKENDS = ("auto", "guidance", "xgrammar", "outlines", "lm-format-enforcer")
NAMES = {"compilation_config": ("-O", "-cc")}
ALWAYS = {  # the values that hold here; any other would change what users get
    "load_format": (("auto", "safetensors"), "weights are safetensors"),
    "tokenizer_mode": (("auto", "hf", "fast"), "the tokenizer is tokenizer.json"),
    "config_format": (("auto", "hf"), "the config is config.json"),
    "runner": (("auto", "generate"), "the model generates text"),
    "convert": (("auto", "none"), "the model generates text"),
    "task": (("auto", "generate"), "the model generates text"),
    "chat_template_content_format": (("auto", "string"), "contents are texts"),
    "response_role": (("assistant",), "answers are the assistant's"),
    "logprobs_mode": (("raw_logprobs",), "log probabilities are the raw model's"),
    "scheduling_policy": (("fcfs",), "there are no priorities"),
}
ACCEPTED = [
    *(Flag(key, why, switch=True, noted=True) for why, keys in SWITCHES.items() for key in keys),
    *(Flag(key, why, switch="no", noted=True) for why, keys in PAIRS.items() for key in keys),
    *(Flag(key, why, noted=True, names=NAMES.get(key, ())) for why, keys in VALUES.items() for key in keys),
    Flag("guided_decoding_backend", "llguidance keeps to grammars", read=among(BACKENDS), noted=True),
    *(Flag(key, why, read=among(values)) for key, (values, why) in ALWAYS.items()),
    Flag("api_server_count", "there is one process", read=ONE, names=("-asc",)),
    Flag("decode_context_parallel_size", "there is one process", read=ONE, names=("-dcp",)),
]
TABLE: dict[str, list[Flag]] = {
    "Model": [
        Flag("model", "The same as MODEL", is_model=True),
        Flag("config", "A YAML file with these flags by their names; flags and variables win", metavar="FILE"),
        Flag("served_model_name", "What replies call the model, then aliases; one or several", "served_names"),
        Flag("strict_model_name", "404 for any other `model`; without it all names are taken", switch=True),
        Flag("strict_fields", "Refuse fields that no route knows; without it they are ignored", switch=True),
        Flag("dialect", "Whose rules hold on the shared routes", read=among(DIALECTS)),
        Flag("revision", "A branch, tag or commit of the Hub"),
        Flag("download_dir", "The folder of models from the Hub (HF_HUB_CACHE)", metavar="FOLDER"),
        Flag("hf_token", "The Hub's token; better HF_TOKEN, which no list of processes shows"),
        Flag("tokenizer", "A folder or Hub id whose tokenizer is used in place of the model's"),
        Flag(
            "generation_config",
            "auto: sampling defaults are the model's; vllm: none; or a folder whose generation_config.json has them",
            metavar="auto|vllm|FOLDER",
        ),
        Flag("dtype", "Dtype of activations on CUDA; auto: float16. A CPU takes only auto", read=Choice(DTYPES)),
        Flag("quantization", "Without it as the checkpoint says", read=METHODS, names=("-q",)),
        Flag("max_model_len", "Tokens of a prompt and its answer: 4096, 4K (4096), 4k (4000), auto", read=tokens),
        Flag("max_input_tokens", "Tokens of a prompt alone", read=tokens),
        Flag("chat_template", "A jinja file in place of the model's own template"),
        Flag("tool_call_parser", "How the model writes calls", read=among(TOOL_PARSERS)),
        Flag("grammar_support", "Take schemas, regexes, grammars and tools; on", switch="no"),
        Flag("enable_auto_tool_choice", "Accepted: it is always on", switch=True),
    ],
    "Engine": [
        DEVICE,
        MODEL_IMPL,
        Flag("threads", "Of the CPU kernels; without it the machine's"),
        Flag("exact", "32-bit activations: slower, for comparison", switch=True),
        Flag(
            "head",
            "The output layer; default: int8, on CUDA and with --exact 16-bit",
            metavar="int8|int4|16-bit",
        ),
        Flag("kv_tokens", "Tokens that the cache holds", read=tokens),
        Flag("gpu_memory_utilization", "CUDA: the share of the GPU's memory to use; 0.9", read=share),
        Flag("kv_cache_dtype", "fp8 (or fp8_e4m3): half the memory, CUDA from compute capability 8.9", read=CACHE),
        Flag("seed", "Random seed from which requests without a seed get theirs, in order of arrival", read=whole(0)),
        Flag("max_num_seqs", "Largest number of sequences in one batch; 64 on a CPU, 256 on CUDA"),
        Flag("max_num_batched_tokens", "Tokens of a step; 512 on a CPU, 2048 on CUDA", read=tokens),
        Flag(
            "enable_prefix_caching",
            "Reuse the KV cache of common prefixes; on",
            "prefix_caching",
            switch="no",
        ),
        Flag(
            "tensor_parallel_size",
            "Processes that share the model, each with a GPU, or on a CPU with --threads",
            names=("-tp",),
        ),
        Flag("data_parallel_size", "1 for now", read=ONE, names=("-dp",)),
    ],
    "vLLM as the engine": [
        Flag("engine", "Which engine runs the model; vllm must be installed", read=among(("squawq", "vllm"))),
        Flag("pipeline_parallel_size", "Groups of processes that have some layers each", names=("-pp",)),
        Flag(
            "distributed_executor_backend",
            "How vLLM starts its processes; our engine has its own",
            read=among(("mp", "ray", "uni")),
        ),
        Flag("nnodes", "Hosts that share the model", names=("-n",)),
        Flag("node_rank", "Rank of this host among --nnodes hosts, from 0", read=whole(0), names=("-r",)),
        Flag("master_addr", "The address of host 0"),
        Flag("master_port", "Its port"),
        Flag("headless", "Only run a part of the model, on a host that is not host 0", switch=True),
        Flag(
            "engine_args",
            'Other arguments of vLLM\'s AsyncEngineArgs, as JSON: {"enforce_eager": true}',
            read=arguments,
            metavar="JSON",
        ),
    ],
    "Network": [
        Flag("host", "The address to listen on; 0.0.0.0 for all; or HOST", variables=("HOST",)),
        Flag("port", "0 takes a free one; or PORT", read=whole(0), variables=("PORT",)),
        Flag("uds", "Listen on this Unix socket instead; not beside --prometheus-port"),
        Flag("ssl_keyfile", "TLS: the key (PEM)"),
        Flag("ssl_certfile", "TLS: the certificate (PEM)"),
        Flag("api_key", "One or several; or VLLM_API_KEY", "api_keys", variables=("VLLM_API_KEY",)),
        Flag("allowed_origins", "CORS: origins, or a JSON list of them; without it none", read=listed),
        Flag("web", "Pages for browsers: chat at / and /chat, /status, /docs; on", switch="no"),
        Flag("prometheus_port", "Serve /metrics on this port, too; without it on the server's alone"),
    ],
    "Limits": [
        Flag("max_num_queued_reqs", "Requests that wait for their turn; the next is refused", "max_queued", whole(0)),
        Flag("max_connections", "Connections at once; without it 256 more than there may be requests"),
        Flag("max_queue_bytes", "Memory of requests that wait or run; the next is refused"),
        Flag("max_body_bytes", "Of a request's body"),
        Flag("h11_max_incomplete_event_size", "Bytes of a request's head", "max_header_bytes"),
        Flag("h11_max_header_count", "Headers of a request", "max_headers"),
        Flag("header_timeout", "For a request's head to arrive"),
        Flag("body_timeout", "For a request's body to arrive"),
        Flag("min_body_rate", "Bytes a second at which a body of more than 64 KiB has to arrive"),
        Flag("idle_timeout", "A connection without a request is closed after it"),
        Flag("write_timeout", "Close the connection of a client that reads nothing for this long"),
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
        Flag(
            "disable_log_requests",
            "The older name of --no-enable-log-requests",
            "log_requests",
            Choice({"true": False, "1": False, "false": None, "0": None}),
            switch=True,
        ),
        Flag("log_format", "For people or for machines", read=among(LOG_FORMATS)),
        Flag("log_level", "The least that is logged", read=Choice(LEVELS), names=("--uvicorn-log-level",)),
    ],
    "vLLM's flags that change nothing here": ACCEPTED,
}
FLAGS = FlagTable(
    {
        section: [replace(flag, variables=(f"SQUAWQ_{flag.key.upper()}", *flag.variables)) for flag in rows]
        for section, rows in TABLE.items()
    },
    host="HOST",
)
MODEL = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL", help="A model folder or a Hub id", rich_help_panel="Model", autocompletion=complete_model
    ),
]


def serve(path: str | None, **given: Any) -> None:
    """Serve a model: the routes of OpenAI and vLLM and those of TGI on one port. The flags are vLLM's and squawq's own.

    Each flag is an environment variable too: SQUAWQ_MAX_MODEL_LEN for --max-model-len. Flags win over variables, and
    variables over the file of --config.

    \b
    Examples:
      squawq serve Llama-3.1-8B-AWQ --port 8000
      squawq serve MODEL --served-model-name llama tgi --max-model-len 8K --api-key SECRET
      squawq serve MODEL --device cuda --dtype bfloat16 --kv-cache-dtype fp8
      curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \\
        -d '{"messages": [{"role": "user", "content": "Tell me a story."}]}'
    """
    given = with_config(path, given, os.environ)
    found = FLAGS.read(given, os.environ)
    settings = _settings(path, found)
    for key, variable in (("download_dir", "HF_HUB_CACHE"), ("hf_token", "HF_TOKEN")):
        if key in found:
            os.environ[variable] = found[key]  # before huggingface_hub, which reads it when it is imported
    from squawq.serve.server import run

    raise typer.Exit(run(settings, FLAGS.notes(given, os.environ)))


serve.__signature__ = FLAGS.signature(  # type: ignore[attr-defined]
    inspect.Parameter("path", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None, annotation=MODEL)
)


def settings_from(arguments: Sequence[str], environ: Mapping[str, str]) -> ServerSettings:
    """The settings of `squawq serve` with these arguments and this environment."""
    given = parse(serve, arguments)
    path = given.pop("path")
    return _settings(path, FLAGS.read(with_config(path, given, environ), environ))


def with_config(path: str | None, given: Mapping[str, Any], environ: Mapping[str, str]) -> dict[str, Any]:
    """typer's values by flag, completed by the MODEL argument and the file of --config.

    Raises ConfigError if the file cannot be read, or a key of it is not a flag.
    """
    found = {**given, "model": path if given["model"] is None else given["model"]}
    flags = {name: flag for flag in FLAGS for name in (flag.name, *flag.names)}
    file = flags["--config"].value(given["config"], environ)
    if file is None:
        return found
    try:
        values = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"the configuration file {file} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"the configuration file {file} must be a YAML mapping, such as max-model-len: 4096")
    for name, value in values.items():
        flag = flags.get("--" + str(name).replace("_", "-"))
        if flag is None or flag.key == "config":
            raise ConfigError(f"{file} has the key {name!r:.80}, which is no flag (see squawq serve --help)")
        if found[flag.key] in (None, [], ()) and value is not None:
            found[flag.key] = FromFile(file, [_text(item) for item in (value if isinstance(value, list) else [value])])
    return found


def _text(value: object) -> str:
    """A YAML value as text, as on the command line."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _settings(path: str | None, found: Mapping[str, Any]) -> ServerSettings:
    model = found.get("model", path)
    if model is None:
        raise ConfigError("no model: squawq serve MODEL (words after --api-key or --served-model-name belong to those)")
    if path not in (None, model):
        raise ConfigError(f"MODEL is {path!r} and --model {model!r}; give one of them")
    return FLAGS.settings(found, model=model)
