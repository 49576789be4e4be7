"""Tells from a config which engines run the quantized model: squawq, transformers, vLLM, TGI.

The command line, the model card, the report and `inspect` all ask here.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from squawq.config import ModelConfig
from squawq.decoder_support import decoder_declines
from squawq.families import FAMILIES
from squawq.quant_config import QuantConfig

ENGINES = {
    "squawq": "squawq generate, chat, serve and LLM",
    "transformers": "transformers, after import squawq.transformers",
    "vllm": "vLLM",
    "tgi": "Text Generation Inference",
}
TGI_IMAGE = "ghcr.io/huggingface/text-generation-inference"
VLLM_GROUPS = (-1, 32, 64, 128)  # of its Marlin kernels
READ_LAYOUTS = ("gemm", "gptq", "gptq_v2", "pack-quantized")  # by transformers and vLLM
VLLM = (  # families of ours whose architecture is in vLLM's registry
    *("afmoe", "apertus", "arcee", "cohere", "cohere2", "cwm", "deepseek_v2"),
    *("deepseek_v3", "dots1", "ernie4_5", "ernie4_5_moe", "exaone", "exaone4", "flex_olmo"),
    *("gemma", "gemma2", "gemma3_text", "glm", "glm4", "glm4_moe", "granite"),
    *("granitemoe", "hunyuan_v1_dense", "hunyuan_v1_moe", "internlm3", "jais2", "llama", "llama4_text"),
    *("minicpm3", "minimax_m2", "mistral", "mixtral", "nemotron", "olmo", "olmo2"),
    *("olmo3", "olmoe", "phi", "phi3", "phimoe", "qwen2", "qwen2_moe"),
    *("qwen2_5_vl_text", "qwen2_vl_text", "qwen3", "qwen3_moe", "qwen3_next", "qwen3_vl_text"),
    *("seed_oss", "stablelm", "starcoder2"),
)
TGI = (  # those in TGI's list of supported models
    *("cohere", "deepseek_v2", "deepseek_v3", "gemma", "gemma2", "gemma3_text", "granite"),
    *("llama", "llama4_text", "mistral", "mixtral", "phi", "phi3", "phimoe"),
    *("qwen2", "starcoder2"),
)


def compatible_engines(config: ModelConfig, quant: QuantConfig | None = None) -> list[str]:
    """Keys of ENGINES that run this model in 4 bits, ours first. `quant`: how it will be quantized, if it is not."""
    quant = config.quant or quant or QuantConfig()
    family, read = config.model_type, config.layout in READ_LAYOUTS
    found = {
        "squawq": family in FAMILIES,
        "transformers": read and family in FAMILIES,
        "vllm": read and family in VLLM and quant.group_size in VLLM_GROUPS,
        "tgi": (config.quant_method, config.layout) == ("awq", "gemm")
        and quant.group_size in VLLM_GROUPS
        and quant.zero_point
        and family in TGI
        and _dtype(config, quant) == "float16",  # in which it runs AWQ, whatever the folder says
    }
    return [name for name, runs in found.items() if runs]


def _dtype(config: ModelConfig, quant: QuantConfig) -> str:
    """The 16-bit dtype of the result, in which engines compute."""
    if config.quant is None and quant.dtype != "auto":
        return quant.dtype
    raw = {**(config.raw.get("text_config") or {}), **config.raw}
    dtype = raw.get("dtype") or raw.get("torch_dtype")
    return "float16" if config.quant is None and dtype != "bfloat16" else str(dtype)


def may_fuse(config: ModelConfig) -> bool:
    """Whether a fused model in transformers (do_fuse) runs on our decoder."""
    ours = config.model_type in FAMILIES and decoder_declines(config) is None
    return ours and config.delta_rule is None and "text_config" not in config.raw


def tgi_command(model: str, options: str = "") -> str:
    """TGI in its container: `text-generation-launcher` is squawq's own where squawq is installed."""
    docker = f"docker run --gpus all --shm-size 1g -p 8000:80{options and ' ' + options} {TGI_IMAGE}"
    return f"{docker} --model-id {model} --quantize awq"


def how_to_run(config: ModelConfig, out: Path, chats: bool) -> list[str]:
    """A command or a line of code for each engine that runs the folder `out`."""
    place, mounted = shlex.quote(str(out)), shlex.quote(str(out.resolve()))
    talk = f"squawq chat {place}" if chats else f'squawq generate {place} -p "Once upon a time"'
    lines = {
        "squawq": f"run it: {talk}, or squawq serve {place}",
        "transformers": f"in transformers: import squawq.transformers, then from_pretrained({str(out)!r})",
        "vllm": f"in vLLM: vllm serve {place}",
        "tgi": f"in TGI: {tgi_command('/model', f'-v {mounted}:/model')}",
    }
    return [lines[name] for name in compatible_engines(config)]


def engines_line(config: ModelConfig, quant: QuantConfig | None = None) -> str:
    """One line that says which engines run the result."""
    found = "; ".join(ENGINES[name] for name in compatible_engines(config, quant))
    return f"the result runs in: {found or 'no engine that squawq knows'}"
