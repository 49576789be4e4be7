"""Both command lines of the server, as far as the settings they lead to: every flag, refusals, precedence, help."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from squawq import cli
from squawq.errors import ConfigError
from squawq.serve import flags as serve_flags
from squawq.serve import launcher, tgi_launcher
from squawq.serve.settings import ServerSettings

Runs = list[ServerSettings]
noted: list[tuple[dict[str, str], bool]] = []  # what the servers of `runs` were to say
FLAGS = {
    "--served-model-name a": ("served_names", ("a",)),
    "--served-model-name a b": ("served_names", ("a", "b")),
    "--served-model-name a --served-model-name=b": ("served_names", ("a", "b")),
    "--strict-model-name": ("strict_model_name", True),
    "--strict-fields": ("strict_fields", True),
    "--dialect tgi": ("dialect", "tgi"),
    "--revision main": ("revision", "main"),
    "--dtype half": ("dtype", "float16"),
    "--dtype bfloat16": ("dtype", "bfloat16"),
    "--quantization awq_marlin": ("quantization", "awq"),
    "-q auto_awq": ("quantization", "awq"),
    "--device cuda:1": ("device", "cuda:1"),
    "--threads 3": ("threads", 3),
    "--exact": ("exact", True),
    "--model-impl transformers": ("model_impl", "transformers"),
    "--head int4": ("head", "int4"),
    "--kv-cache-dtype float16": ("kv_cache_dtype", "float16"),
    "--kv-cache-dtype fp8": ("kv_cache_dtype", "fp8"),
    "--kv-cache-dtype fp8_e4m3": ("kv_cache_dtype", "fp8_e4m3"),
    "--kv-tokens 8K": ("kv_tokens", 8192),
    "--tensor-parallel-size 4": ("tensor_parallel_size", 4),
    "--engine vllm": ("engine", "vllm"),
    "--distributed-executor-backend mp": ("distributed_executor_backend", "mp"),
    "--engine vllm --distributed-executor-backend ray": ("distributed_executor_backend", "ray"),
    "-pp 2 --engine vllm": ("pipeline_parallel_size", 2),
    "--engine vllm --pipeline-parallel-size 3": ("pipeline_parallel_size", 3),
    "--engine vllm --nnodes 2": ("nnodes", 2),
    "-n 2 --engine vllm": ("nnodes", 2),
    "--engine vllm --node-rank 1": ("node_rank", 1),
    "-r 1 --engine vllm": ("node_rank", 1),
    "--engine vllm --master-addr h": ("master_addr", "h"),
    "--engine vllm --master-port 29500": ("master_port", 29500),
    "--engine vllm --node-rank 1 --headless": ("headless", True),
    '--engine vllm --engine-args {"enforce_eager":true}': ("engine_args", {"enforce_eager": True}),
    "--max-model-len 8k": ("max_model_len", 8000),
    "--max-model-len 4K": ("max_model_len", 4096),
    "--max-model-len auto": ("max_model_len", None),
    "--max-model-len -1": ("max_model_len", None),
    "--max-input-tokens 77": ("max_input_tokens", 77),
    "--chat-template x.jinja": ("chat_template", Path("x.jinja")),
    "--tool-call-parser hermes": ("tool_call_parser", "hermes"),
    "--max-num-seqs 5": ("max_num_seqs", 5),
    "--max-num-batched-tokens 1.5k": ("max_num_batched_tokens", 1500),
    "--max-num-queued-reqs 6": ("max_queued", 6),
    "--enable-prefix-caching": ("prefix_caching", True),
    "--no-enable-prefix-caching": ("prefix_caching", False),
    "--host 0.0.0.0": ("host", "0.0.0.0"),
    "--port 0": ("port", 0),
    "--uds /tmp/s": ("uds", Path("/tmp/s")),
    "--ssl-keyfile k --ssl-certfile c": ("ssl_keyfile", Path("k")),
    "--ssl-certfile c --ssl-keyfile k": ("ssl_certfile", Path("c")),
    "--api-key k1 k2 --port 1": ("api_keys", ("k1", "k2")),
    "--api-key=-k": ("api_keys", ("-k",)),
    "--allowed-origins http://a http://b": ("allowed_origins", ("http://a", "http://b")),
    '--allowed-origins ["http://a","*"]': ("allowed_origins", ("http://a", "*")),
    "--web": ("web", True),
    "--no-web": ("web", False),
    "--max-connections 9000": ("max_connections", 9000),
    "--max-queue-bytes 10": ("max_queue_bytes", 10),
    "--min-body-rate 11": ("min_body_rate", 11),
    "--max-logprob-entries 12": ("max_logprob_entries", 12),
    "--queue-timeout 6": ("queue_timeout", 6),
    "--max-body-bytes 10": ("max_body_bytes", 10),
    "--h11-max-incomplete-event-size 11": ("max_header_bytes", 11),
    "--h11-max-header-count 12": ("max_headers", 12),
    "--header-timeout 1.5": ("header_timeout", 1.5),
    "--body-timeout 2": ("body_timeout", 2),
    "--idle-timeout 3": ("idle_timeout", 3),
    "--write-timeout 4": ("write_timeout", 4),
    "--generation-timeout 5": ("generation_timeout", 5),
    "--template-timeout 6": ("template_timeout", 6),
    "--grammar-timeout 7": ("grammar_timeout", 7),
    "--sse-keep-alive-interval 8": ("keep_alive_interval", 8),
    "--shutdown-timeout 0": ("shutdown_timeout", 0),
    "--validation-workers 13": ("validation_workers", 13),
    "--max-logprobs 14": ("max_logprobs", 14),
    "--max-choices 15": ("max_choices", 15),
    "--max-prompts 16": ("max_prompts", 16),
    "--max-best-of 17": ("max_best_of", 17),
    "--max-stop-sequences 13": ("max_stop_sequences", 13),
    "--max-top-n-tokens 19": ("max_top_n_tokens", 19),
    "--max-client-batch 21": ("max_client_batch", 21),
    "--log-format json": ("log_format", "json"),
    "--log-level debug": ("log_level", "debug"),
    "--uvicorn-log-level warning": ("log_level", "warning"),
    "--enable-log-requests": ("log_requests", True),
    "--no-enable-log-requests": ("log_requests", False),
    "--disable-log-requests": ("log_requests", False),
    "--uvicorn-log-level trace": ("log_level", "debug"),
    "--tokenizer t": ("tokenizer", "t"),
    "--generation-config vllm": ("generation_config", "vllm"),
    "--seed 0": ("seed", 0),
    "--gpu-memory-utilization 0.9": ("gpu_memory_utilization", 0.9),
    "--grammar-support": ("grammar_support", True),
    "--no-grammar-support": ("grammar_support", False),
    "--prometheus-port 9000": ("prometheus_port", 9000),
}
NOTED = [  # accepted, and the log says why they change nothing
    "--trust-remote-code",
    "--enforce-eager",
    "--disable-log-stats",
    "--disable-uvicorn-access-log",
    "--enable-request-id-headers",
    "--enable-tokenizer-info-endpoint",
    "--enable-server-load-tracking",
    "--disable-custom-all-reduce",
    "--disable-frontend-multiprocessing",
    "--enable-expert-parallel",
    "--disable-cascade-attn",
    "--disable-hybrid-kv-cache-manager",
    "--use-v2-block-manager",
    "--enable-chunked-prefill",
    "--async-scheduling",
    "--use-tqdm-on-load",
    "--swap-space 4",
    "--cpu-offload-gb 0",
    "--block-size 16",
    "--prefix-caching-hash-algo sha256",
    "--max-seq-len-to-capture 8192",
    '--compilation-config {"level":3}',
    "--attention-backend FLASH_ATTN",
    "--max-num-partial-prefills 1",
    "--max-long-partial-prefills 1",
    "--long-prefill-token-threshold 0",
    "--num-scheduler-steps 1",
    "--max-parallel-loading-workers 4",
    "--safetensors-load-strategy lazy",
    "--code-revision main",
    "--max-log-len 100",
    '--limit-mm-per-prompt {"image":0}',
    "--otlp-traces-endpoint http://x",
    "--collect-detailed-traces all",
    "--guided-decoding-backend xgrammar",
]
ACCEPTED = [
    "--enable-auto-tool-choice",
    "--no-enable-chunked-prefill",
    "--no-async-scheduling",
    "-O3",
    "-O 3",
    "-cc 3",
    "--load-format safetensors",
    "--tokenizer-mode auto",
    "--config-format hf",
    "--runner generate",
    "--convert none",
    "--task auto",
    "--chat-template-content-format string",
    "--response-role assistant",
    "--logprobs-mode raw_logprobs",
    "--scheduling-policy fcfs",
    "--api-server-count 1",
    "-asc 1",
    "--decode-context-parallel-size 1",
    "-dcp 1",
    "--nnodes 1",
    "--download-dir d",
    "--hf-token t",
    "--kv-cache-dtype auto",
    "--pipeline-parallel-size 1",
    "-pp 1",
    "--data-parallel-size 1",
    "-dp 1",
    "-tp 1",
    "--model m",
]
REFUSED = {
    "--config /nowhere.yaml": "the configuration file /nowhere.yaml cannot be read",
    "--dtype float32": "--dtype is 'float32'; choose one of auto, half, float16, bfloat16",
    "--dtype float": "choose one of auto, half",
    "--quantization fp8": "--quantization is 'fp8'; choose one of awq, auto_awq, awq_marlin, gptq",
    "--kv-cache-dtype fp8_e5m2": "choose one of auto, float16, fp8",
    "--dialect openapi": "choose one of openai, tgi",
    "--tool-call-parser mistral": "choose one of auto, llama3_json",
    "--log-level loud": "choose one of debug, info",
    "--log-format xml": "choose one of text, json",
    "-tp 0": "must be a whole number",
    "-pp 2": "pipeline_parallel_size is 2, which needs the engine vllm",
    "--engine other": "choose one of squawq, vllm",
    "--engine vllm --engine-args [1]": "it must be a JSON object",
    "--engine vllm --threads 2": "threads is 2, which needs the engine squawq",
    "-dp 2": "--data-parallel-size is '2'; it must be 1",
    "--gpu-memory-utilization 0": "--gpu-memory-utilization is '0'; it must be a number above 0, at most 1",
    "--gpu-memory-utilization 1.5": "above 0, at most 1",
    "--load-format gguf": "--load-format is 'gguf'; choose one of auto, safetensors",
    "--task embed": "choose one of auto, generate",
    "--runner pooling": "choose one of auto, generate",
    "--response-role tool": "choose one of assistant",
    "--chat-template-content-format openai": "choose one of auto, string",
    "--scheduling-policy priority": "choose one of fcfs",
    "--logprobs-mode processed_logits": "choose one of raw_logprobs",
    "--tokenizer-mode mistral": "choose one of auto, hf, fast",
    "--distributed-executor-backend ray": "distributed_executor_backend is 'ray', which needs the engine vllm",
    "--guided-decoding-backend mine": "choose one of auto, guidance",
    "--api-server-count 2": "it must be 1",
    "--nnodes 2": "nnodes is 2, which needs the engine vllm",
    "--seed -1": "a whole number of at least 0",
    "--prometheus-port 8000": "prometheus_port is 8000; it must be 1 to 65535 and not the server's",
    "--prometheus-port 70000": "1 to 65535",
    "--max-model-len 1.5K": "--max-model-len is '1.5K'; it must be a whole number of at least 1, such as 4096, 4K",
    "--max-model-len 0": "at least 1",
    "--max-num-seqs 0": "--max-num-seqs is '0'; it must be a whole number of at least 1",
    "--h11-max-header-count many": "--h11-max-header-count is 'many'; it must be a whole number",
    "--idle-timeout inf": "--idle-timeout is 'inf'; it must be a number of at least 0",
    "--idle-timeout soon": "--idle-timeout is 'soon'; it must be a number",
    "--port 65536": "port is 65536",
    '--allowed-origins ["x': "a JSON list",
    "--ssl-keyfile k": "TLS needs both",
    "--model other": "MODEL is 'm' and --model 'other'; give one of them",
}
TGI = {
    "MODEL_ID=x": ("model", "x"),
    "REVISION=r": ("revision", "r"),
    "QUANTIZE=awq": ("quantization", "awq"),
    "QUANTIZE=gptq": ("quantization", "gptq"),
    "DTYPE=bfloat16": ("dtype", "bfloat16"),
    "HOSTNAME=10.0.0.1": ("host", "10.0.0.1"),
    "PORT=80": ("port", 80),
    "API_KEY=k, with a comma": ("api_keys", ("k, with a comma",)),
    "CORS_ALLOW_ORIGIN=http://a": ("allowed_origins", ("http://a",)),
    "MAX_INPUT_TOKENS=5": ("max_input_tokens", 5),
    "MAX_INPUT_LENGTH=6": ("max_input_tokens", 6),
    "MAX_TOTAL_TOKENS=7": ("max_model_len", 7),
    "MAX_BATCH_SIZE=8": ("max_num_seqs", 8),
    "MAX_CONCURRENT_REQUESTS=100": ("max_queued", 36),
    "MAX_BATCH_PREFILL_TOKENS=9": ("max_num_batched_tokens", 9),
    "MAX_BATCH_TOTAL_TOKENS=10": ("kv_tokens", 10),
    "MAX_BEST_OF=11": ("max_best_of", 11),
    "MAX_STOP_SEQUENCES=12": ("max_stop_sequences", 12),
    "MAX_TOP_N_TOKENS=13": ("max_top_n_tokens", 13),
    "MAX_CLIENT_BATCH_SIZE=14": ("max_client_batch", 14),
    "VALIDATION_WORKERS=15": ("validation_workers", 15),
    "PAYLOAD_LIMIT=16": ("max_body_bytes", 16),
    "GRACEFUL_TERMINATION_TIMEOUT=17": ("shutdown_timeout", 17),
    "JSON_OUTPUT=true": ("log_format", "json"),
    "LOG_LEVEL=WARN": ("log_level", "warning"),
    "LOG_LEVEL=info,text_generation_router=debug": ("log_level", "debug"),  # TGI's conftest.py
    "LOG_LEVEL=text_generation_router::infer=trace, info": ("log_level", "debug"),
    "LOG_LEVEL=warn,text_generation_launcher=debug": ("log_level", "warning"),
    "LOG_LEVEL=hyper=error": ("log_level", "info"),
    "KV_CACHE_DTYPE=fp8_e4m3fn": ("kv_cache_dtype", "fp8_e4m3"),
    "DEVICE=cuda:1": ("device", "cuda:1"),
    "CUDA_MEMORY_FRACTION=0.5": ("gpu_memory_utilization", 0.5),
    "PROMETHEUS_PORT=9000": ("prometheus_port", 9000),
    "DISABLE_GRAMMAR_SUPPORT=true": ("grammar_support", False),
}
TGI_ACCEPTED = [
    *("WAITING_SERVED_RATIO=1.2", "MAX_WAITING_TOKENS=20", "CUDA_GRAPHS=1,2,4", "SHARD_UDS_PATH=/tmp/x"),
    *("MASTER_ADDR=localhost", "MASTER_PORT=29500", "OTLP_SERVICE_NAME=x", "USAGE_STATS=off", "HF_TOKEN=x"),
    *("ENABLE_PREFILL_LOGPROBS=true", "DISABLE_CUSTOM_KERNELS=1", "HUGGINGFACE_HUB_CACHE=/data"),
    *("OTLP_ENDPOINT=http://x", "WATERMARK_GAMMA=0.5", "WATERMARK_DELTA=2", "TRUST_REMOTE_CODE=true"),
    *("NUM_SHARD=1", "SHARDED=false", "SPECULATE=0", "TRUST_REMOTE_CODE=false", "TRUST_REMOTE_CODE=0"),
    *("DISABLE_GRAMMAR_SUPPORT=0", "REVISION=", "MAX_BATCH_SIZE=", "ROPE_SCALING=", "NGROK=false"),
]
TGI_REFUSED = {
    "NUM_SHARD=0": "is '0'; it must be a whole number",
    "QUANTIZE=eetq": "is 'eetq'; choose one of awq, gptq, compressed-tensors",
    "DTYPE=float32": "choose one of float16, bfloat16",
    "KV_CACHE_DTYPE=fp8_e5m2": "choose one of fp8_e4m3fn",
    "SPECULATE=2": "no speculative decoding",
    "ROPE_SCALING=dynamic": "config.json",
    "ROPE_FACTOR=2.0": "config.json",
    "CUDA_MEMORY_FRACTION=2": "above 0, at most 1",
    "TOKENIZER_CONFIG_PATH=x.json": "squawq serve --chat-template",
    "WEIGHTS_CACHE_OVERRIDE=/w": "MODEL_ID takes a folder",
    "LORA_ADAPTERS=a,b": "no adapters",
    "NGROK_AUTHTOKEN=x": "no tunnel",
    "NGROK_EDGE=x": "no tunnel",
    "MAX_BEST_OF=two": "is 'two'; it must be a whole number of at least 1",
    "PORT=-1": "is '-1'; it must be a whole number of at least 0",
    "LOG_LEVEL=loud": "choose one of trace, debug, info, warn",
    "LOG_LEVEL=info,text_generation_router=loud": "or write TARGET=LEVEL between commas",
    "LOG_LEVEL=info,=debug": "TARGET=LEVEL",
}
TGI_SWITCHES = {"ngrok": "no tunnel"}


def vllm(line: str, **environ: str) -> ServerSettings:
    return launcher.settings_from(["m", *line.split()], environ)


def tgi(line: str = "", *more: str, **environ: str) -> ServerSettings:
    return tgi_launcher.settings_from([*line.split(), *more], {"MODEL_ID": "m", **environ})


def as_flag(assignment: str) -> list[str]:
    """NAME=value as --name=value; a switch without its value."""
    name, _, value = assignment.partition("=")
    flag = "--" + name.lower().replace("_", "-")
    return [flag] if name in ("JSON_OUTPUT", "DISABLE_GRAMMAR_SUPPORT") else [f"{flag}={value}"]


def as_variable(assignment: str) -> dict[str, str]:
    name, _, value = assignment.partition("=")
    return {name: value}


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    """A server that takes its settings down and ends with code 7, and an environment that ends with the test."""
    taken: Runs = []

    def run(settings: ServerSettings, notes: dict[str, str], environment: bool = False) -> int:
        taken.append(settings)
        noted.append((notes, environment))
        return 7

    noted.clear()
    monkeypatch.setitem(sys.modules, "squawq.serve.server", SimpleNamespace(run=run))
    monkeypatch.setattr(os, "environ", {"PATH": os.environ["PATH"]})
    return taken


@pytest.mark.parametrize("line", FLAGS)
def test_a_flag_reaches_its_setting(line: str) -> None:
    setting, expected = FLAGS[line]
    assert getattr(vllm(line), setting) == expected


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])
def test_files_are_read_as_paths_in_every_python(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "__module__", module)
    assert serve_flags.type_name(Path | None) == "Path | None"
    assert serve_flags.KINDS[serve_flags.type_name(Path | None)][0] is Path


def test_every_setting_has_a_flag_and_every_flag_a_case() -> None:
    lines = [*FLAGS, *NOTED, *ACCEPTED, *REFUSED]
    settings = {entry.name for entry in fields(ServerSettings) if entry.init}
    assert {flag.setting for flag in launcher.FLAGS} - {""} == settings
    assert {setting for setting, _ in FLAGS.values()} | {"model"} == settings
    for flag in launcher.FLAGS:
        for name in (flag.name, *flag.names):
            assert any(name in re.split("[ =]", line) for line in lines), name


@pytest.mark.parametrize("line", NOTED)
def test_what_changes_nothing_is_accepted_and_said(line: str, runs: Runs) -> None:
    assert cli.main(["serve", "m", *line.split()]) == 7
    assert runs == [ServerSettings(model="m")]
    ((notes, _),) = noted
    assert list(notes) == [line.split()[0]]
    assert all(notes.values())


def test_what_has_a_meaning_is_not_said_to_have_none(runs: Runs) -> None:
    assert cli.main(["serve", "m", "--seed", "1", "--no-enable-log-requests", "--load-format", "auto"]) == 7
    assert noted == [({}, False)]


def test_a_download_folder_and_a_token_reach_the_hub(runs: Runs) -> None:
    assert cli.main(["serve", "m", "--download-dir", "/d", "--hf-token", "t"]) == 7
    assert (os.environ["HF_HUB_CACHE"], os.environ["HF_TOKEN"]) == ("/d", "t")


def test_the_hubs_folder_is_set_before_the_server_is_imported(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub reads the environment when it is imported."""
    found = []

    class Module:
        @property
        def run(self) -> Callable[..., int]:
            found.append(os.environ.get("HF_HUB_CACHE"))
            return lambda *_, **__: 0

    monkeypatch.setitem(sys.modules, "squawq.serve.server", Module())
    assert cli.main(["serve", "m", "--download-dir", "/d"]) == 0
    del os.environ["HF_HUB_CACHE"]
    assert tgi_launcher.main(["--model-id", "m", "--huggingface-hub-cache", "/e"]) == 0
    assert found == ["/d", "/e"]


@pytest.mark.parametrize("line", ACCEPTED)
def test_what_is_always_so_is_accepted(line: str) -> None:
    assert vllm(line) == ServerSettings(model="m")


@pytest.mark.parametrize("line", REFUSED)
def test_a_refusal_says_the_value_and_the_choices(line: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(REFUSED[line])):
        vllm(line)


def test_the_model_is_given_either_way() -> None:
    assert launcher.settings_from(["--model", "a", "--port", "1"], {}).model == "a"
    assert launcher.settings_from(["--served-model-name", "x", "y", "--port", "1", "a"], {}).model == "a"
    for arguments in ([], ["--api-key", "k", "a"]):  # the last word is a second key, as vLLM takes it
        with pytest.raises(ConfigError, match="no model: squawq serve MODEL"):
            launcher.settings_from(arguments, {})


def test_an_empty_key_does_not_open_the_server() -> None:
    assert vllm("", VLLM_API_KEY="k").api_keys == ("k",)
    assert vllm("--api-key f g", VLLM_API_KEY="k").api_keys == ("f", "g")
    with pytest.raises(ConfigError, match="an API key is empty"):
        vllm("", VLLM_API_KEY="")
    with pytest.raises(ConfigError, match="an API key is empty"):
        tgi(API_KEY="")


@pytest.mark.parametrize("line", [line for line in FLAGS if line.startswith("--") and line.count("--") == 1])
def test_every_flag_is_a_variable_and_a_line_of_a_file(line: str, tmp_path: Path) -> None:
    setting, expected = FLAGS[line]
    name, *values = re.split("[ =]", line.removeprefix("--"), maxsplit=1)
    value = "false" if name.startswith("no-") else values[0] if values else "true"
    name = name.removeprefix("no-")
    repeated = isinstance(expected, tuple) and len(expected) > 1 and not value.startswith("[")
    found = settings_of(tmp_path, {name: value.split() if repeated else value})
    assert getattr(found, setting) == expected
    if not repeated and name != "uvicorn-log-level":
        assert getattr(vllm("", **{f"SQUAWQ_{name.replace('-', '_').upper()}": value}), setting) == expected


def settings_of(folder: Path, values: object, *arguments: str, **environ: str) -> ServerSettings:
    file = folder / "config.yaml"
    file.write_text(json.dumps(values), encoding="utf-8")  # which is YAML
    return launcher.settings_from(["m", "--config", str(file), *arguments], environ)


def test_flags_win_over_variables_and_those_over_the_file(tmp_path: Path) -> None:
    values = {"port": 1, "max_num_seqs": 2, "api-key": ["a", "b"], "model": "n", "seed": None, "max-model-len": "4K"}
    found = settings_of(tmp_path, values, "--port", "3", SQUAWQ_PORT="4", PORT="5", SQUAWQ_MAX_NUM_SEQS="6")
    assert (found.port, found.max_num_seqs, found.api_keys, found.model) == (3, 6, ("a", "b"), "m")
    assert (found.seed, found.max_model_len) == (None, 4096)
    assert vllm("", SQUAWQ_PORT="4", PORT="5").port == 4
    assert launcher.settings_from([], {"SQUAWQ_MODEL": "n"}).model == "n"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max-num-seqs": "x"}, "config.yaml: max_num_seqs is 'x'; it must be a whole number of at least 1"),
        ({"max-num-seqs": [1, 2]}, "give one value"),
        ({"nothing": 1}, "has the key 'nothing', which is no flag"),
        ({"config": "x.yaml"}, "has the key 'config', which is no flag"),
        ([1], "must be a YAML mapping"),
    ],
)
def test_a_wrong_file_is_one_line_of_error(values: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        settings_of(tmp_path, values)


@given(st.integers(1, 10**9))
def test_tokens_are_read_as_vllm_writes_them(count: int) -> None:
    assert serve_flags.tokens(str(count)) == count
    assert serve_flags.tokens(f"{count}k") == count * 1000
    assert serve_flags.tokens(f"{count}K") == count * 1024
    assert serve_flags.tokens(f"{count}.25k") == count * 1000 + 250
    assert serve_flags.tokens(f"{count}M") == count << 20


@given(st.text() | st.from_regex(r"\A-?[0-9]*\.?[0-9]*[kKmMgG]?\Z"))
@example("nan")
@example("1e400")
@example("\N{ARABIC-INDIC DIGIT ONE}")
@example("9" * 5000)
def test_any_text_is_read_or_refused(text: str) -> None:
    readers: list[Callable[[str], object]] = [
        serve_flags.tokens,
        serve_flags.whole(0),
        serve_flags.number,
        serve_flags.listed,
    ]
    for read in readers:
        try:
            value = read(text)
        except ConfigError:
            continue
        assert value is None or isinstance(value, tuple) or float(str(value)) >= 0


@pytest.mark.parametrize("assignment", TGI)
def test_tgi_reads_flags_and_variables(assignment: str) -> None:
    setting, expected = TGI[assignment]
    assert getattr(tgi(**as_variable(assignment)), setting) == expected
    assert getattr(tgi("", *as_flag(assignment)), setting) == expected


@pytest.mark.parametrize("assignment", TGI_REFUSED)
def test_tgi_refusals_name_their_source(assignment: str) -> None:
    name, message = assignment.partition("=")[0], re.escape(TGI_REFUSED[assignment])
    with pytest.raises(ConfigError, match=f"^{name} .*{message}"):
        tgi(**as_variable(assignment))
    with pytest.raises(ConfigError, match=f"^{as_flag(name + '=')[0][:-1]} .*{message}"):
        tgi("", *as_flag(assignment))


@pytest.mark.parametrize("assignment", TGI_ACCEPTED)
def test_tgi_accepts_what_changes_nothing(assignment: str) -> None:
    assert tgi(**as_variable(assignment)) == tgi()


@pytest.mark.parametrize("key", TGI_SWITCHES)
def test_tgi_switches_are_true_or_false(key: str) -> None:
    name = key.upper()
    for line, environ in ((f"--{key.replace('_', '-')}", {}), ("", {name: "true"}), ("", {name: "1"})):
        with pytest.raises(ConfigError, match=TGI_SWITCHES[key]):
            tgi(line, **environ)
    with pytest.raises(ConfigError, match=f"{name} is 'yes'; choose one of true, false, 1, 0"):
        tgi(**{name: "yes"})


def test_every_flag_of_tgi_has_a_case() -> None:
    names = {line.partition("=")[0] for line in (*TGI, *TGI_ACCEPTED, *TGI_REFUSED)}
    assert names - {"HF_TOKEN"} | {key.upper() for key in TGI_SWITCHES} == {
        flag.variables[0] for flag in tgi_launcher.FLAGS
    }


def test_tgi_defaults() -> None:
    found = tgi()
    assert found == ServerSettings(
        model="m", dialect="tgi", host="0.0.0.0", port=3000, max_num_seqs=64, max_queued=64, shutdown_timeout=90
    )
    assert found.max_concurrent == 128
    found = tgi(DEVICE="cuda")
    assert (found.max_num_seqs, found.max_concurrent) == (128, 128)


def test_a_flag_wins_over_its_variable() -> None:
    assert tgi("--port 8080 --model-id f", PORT="80", MODEL_ID="e").port == 8080
    assert tgi("--model-id f", MODEL_ID="e").model == "f"
    assert tgi("--quantize awq", QUANTIZE="gptq").quantization == "awq"
    assert tgi("--json-output", JSON_OUTPUT="false").log_format == "json"


@given(st.integers(1, 10_000), st.integers(1, 10_000))
def test_concurrent_requests_run_or_wait(concurrent: int, batch: int) -> None:
    found = tgi(MAX_CONCURRENT_REQUESTS=str(concurrent), MAX_BATCH_SIZE=str(batch))
    assert found.max_num_seqs == min(concurrent, batch)
    assert found.max_concurrent == concurrent


def test_input_and_total_agree() -> None:
    assert tgi("--max-input-length 5", MAX_INPUT_TOKENS="5").max_input_tokens == 5
    with pytest.raises(ConfigError, match="MAX_INPUT_TOKENS is 5 and MAX_INPUT_LENGTH 6"):
        tgi(MAX_INPUT_TOKENS="5", MAX_INPUT_LENGTH="6")
    for name in ("MAX_INPUT_TOKENS", "MAX_INPUT_LENGTH"):
        with pytest.raises(ConfigError, match="MAX_TOTAL_TOKENS is 9; it must be more than MAX_INPUT_TOKENS"):
            tgi(MAX_TOTAL_TOKENS="9", **{name: "9"})


def test_port_and_host_of_the_environment() -> None:
    found = vllm("", PORT="80", HOST="0.0.0.0")
    assert (found.port, found.host) == (80, "0.0.0.0")
    assert (vllm("--port 81 --host ::1", PORT="80", HOST="0.0.0.0")) == vllm("--port 81 --host ::1")
    with pytest.raises(ConfigError, match=r"^PORT is 'tcp://10\.0\.0\.1:80'; it must be a whole number"):
        vllm("", PORT="tcp://10.0.0.1:80")


def test_the_name_of_the_machine_is_no_address_to_listen_on() -> None:
    name = socket.gethostname()
    assert vllm("", HOST=name).host == "127.0.0.1"  # some shells export it
    assert tgi(HOSTNAME=name).host == "0.0.0.0"
    assert tgi(f"--hostname {name}").host == name
    assert tgi(HOSTNAME="::").host == "::"


CARD = {"MODEL_ID": "m", "NUM_SHARD": "4", "QUANTIZE": "awq", "MAX_INPUT_LENGTH": "4000", "MAX_TOTAL_TOKENS": "4096"}


def test_the_line_of_the_model_card(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    os.environ.update(CARD)
    assert tgi_launcher.main(["--port", "8080"]) == 7
    assert (runs[0].port, runs[0].quantization, runs[0].max_input_tokens) == (8080, "awq", 4000)
    assert (runs[0].max_model_len, runs[0].dialect, runs[0].tensor_parallel_size) == (4096, "tgi", 4)
    os.environ |= {"NUM_SHARD": "1", "SHARDED": "true"}
    assert tgi_launcher.main(["--port", "8080"]) == 2
    output = capsys.readouterr()
    message = "SHARDED is true, which needs NUM_SHARD above 1: the number of processes that share the model\n"
    assert (output.out, output.err) == ("", f"text-generation-launcher: error: {message}")
    assert len(runs) == 1


def test_misuse_of_tgi_is_one_line_and_code_2(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    assert tgi_launcher.main([]) == 2
    assert capsys.readouterr().err.startswith("text-generation-launcher: error: no model: set MODEL_ID")
    assert tgi_launcher.main(["--model-id", "m", "--ngroc"]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r"text-generation-launcher: error: .*--ngroc.*\(see text-generation-launcher --help\)\n", error)
    assert runs == []


def test_the_cache_of_the_hub(runs: Runs) -> None:
    tgi_launcher.main(["--model-id", "m", "--huggingface-hub-cache", "/a"])
    assert os.environ["HF_HUB_CACHE"] == "/a"
    tgi_launcher.main(["--model-id", "m", "--huggingface-hub-cache", "/b"])
    assert os.environ["HF_HUB_CACHE"] == "/a"
    assert len(runs) == 2


def test_serve_runs_and_ends_with_its_code(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    os.environ["VLLM_API_KEY"] = "k"
    assert cli.main(["serve", "m", "--served-model-name", "a", "b", "--port", "1"]) == 7
    assert runs == [ServerSettings(model="m", served_names=("a", "b"), port=1, api_keys=("k",))]


def test_stopped_by_hand_is_code_130(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*_: object, **__: object) -> int:
        raise KeyboardInterrupt

    sys.modules["squawq.serve.server"].run = run  # type: ignore[attr-defined]
    assert cli.main(["serve", "m"]) == 130
    assert capsys.readouterr().err == "squawq: stopped\n"
    assert tgi_launcher.main(["--model-id", "m"]) == 130
    assert capsys.readouterr().err == "text-generation-launcher: stopped\n"


def test_help_lists_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", "--help"]) == 0
    check_help(capsys.readouterr().out, launcher.FLAGS, "squawq serve")
    assert tgi_launcher.main(["--help"]) == 0
    check_help(capsys.readouterr().out, tgi_launcher.FLAGS, "text-generation-launcher")


def check_help(text: str, table: serve_flags.FlagTable, program: str) -> None:
    for section in table.sections:
        assert f"\n{section}:\n" in text
    for flag in table:
        for name in (flag.name, *flag.names, *([f"--no-{flag.name[2:]}"] if flag.switch == "no" else [])):
            assert re.search(rf"(?<=[ ,]){name}\b", text), name
    assert re.search(rf"Examples:\n    {program} .*\n(.*\n)+?    curl localhost:", text)


def test_starting_is_quick_to_import() -> None:
    code = "import sys, squawq.cli, squawq.serve.tgi_launcher; print([m for m in sys.modules if m in sys.argv])"
    heavy = ["torch", "starlette", "uvicorn", "transformers", "huggingface_hub", "prometheus_client", "numpy"]
    done = subprocess.run([sys.executable, "-c", code, *heavy], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_console_script() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["scripts"]["text-generation-launcher"] == f"{tgi_launcher.__name__}:{tgi_launcher.entry.__name__}"


def test_the_start_of_tgis_own_tests(runs: Runs) -> None:
    """As integration-tests/conftest.py starts the launcher, in a process and in a container."""
    os.environ |= {"LOG_LEVEL": "info,text_generation_router=debug", "PREFILL_CHUNKING": "1"}
    common = ["--num-shard", "1", "--dtype", "float16", "--trust-remote-code", "--disable-grammar-support"]
    local = ["--port", "8123", "--master-port", "12345", "--shard-uds-path", "/tmp/tgi-tests-m-1-None-server"]
    assert tgi_launcher.main(["--model-id", "m", *local, *common, "--cuda-graphs", "0"]) == 7
    assert (runs[0].port, runs[0].log_level, runs[0].grammar_support) == (8123, "debug", False)
    assert sorted(noted[0][0]) == ["--cuda-graphs", "--master-port", "--shard-uds-path", "--trust-remote-code"]
    assert tgi_launcher.main(["--model-id", "m", "--env", *common]) == 7
    assert noted[1][1] is True


def test_notes_name_their_source(runs: Runs) -> None:
    os.environ |= {"MASTER_PORT": "29500", "TRUST_REMOTE_CODE": "false"}
    assert tgi_launcher.main(["--model-id", "m"]) == 7
    assert noted == [({"MASTER_PORT": "there are no shards"}, False)]


def test_the_launchers_version(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    assert tgi_launcher.main(["-V"]) == 0
    assert re.fullmatch(r"text-generation-launcher \d+\.\d+\.\d+ \(squawq\)\n", capsys.readouterr().out)
    assert runs == []


@given(st.text())
def test_any_log_level_is_read_or_refused(text: str) -> None:
    try:
        level = tgi_launcher.log_level(text)
    except ConfigError:
        return
    assert level in ("debug", "info", "warning", "error")
