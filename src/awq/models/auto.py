"""AutoAWQForCausalLM: AutoAWQ's two ways in. Translates arguments; the model itself is base.py's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from awq.models.base import BaseAWQForCausalLM
from awq.models.loading import check_count, open_model, say_once
from squawq.errors import CheckpointError, ConfigError


class AutoAWQForCausalLM:
    """Made by `from_pretrained` or `from_quantized`, never by itself."""

    def __init__(self) -> None:
        raise OSError("use AutoAWQForCausalLM.from_pretrained or AutoAWQForCausalLM.from_quantized")

    @classmethod
    def from_pretrained(
        cls,
        model_path: str | Path,
        torch_dtype: Any = None,
        trust_remote_code: bool | None = None,
        safetensors: bool = True,
        device_map: Any = None,
        download_kwargs: Mapping[str, Any] | None = None,
        low_cpu_mem_usage: bool = True,  # noqa: ARG003 (always)
        use_cache: bool | None = None,
        *,
        dtype: Any = None,
        **model_init_kwargs: Any,
    ) -> BaseAWQForCausalLM:
        """Open a 16-bit model to quantize (it is loaded only if it is run), or load an AWQ one.

        torch_dtype, or dtype: what the model runs in; float16 or bfloat16 is also what stays in 16 bits gets when it
        is quantized ("auto": the checkpoint's). model_init_kwargs: see `open_model`.
        Raises TypeError for an unknown argument, SquawqError for what cannot be read.
        """
        if use_cache is not None:
            model_init_kwargs["use_cache"] = use_cache
        opened = open_model(
            model_path,
            dtype=dtype or torch_dtype or "auto",
            trust_remote_code=trust_remote_code,
            safetensors=safetensors,
            device_map=device_map,
            download_kwargs=download_kwargs,
            settings=model_init_kwargs,
        )
        return BaseAWQForCausalLM(opened)

    @classmethod
    def from_quantized(
        cls,
        quant_path: str | Path,
        quant_filename: str = "",
        max_seq_len: int | None = 2048,
        trust_remote_code: bool | None = None,
        fuse_layers: bool = True,
        use_exllama: bool = False,
        use_exllama_v2: bool = False,
        use_ipex: bool = False,
        batch_size: int = 1,  # noqa: ARG003 (the cache takes any)
        safetensors: bool = True,
        device_map: Any = "balanced",
        max_memory: Mapping[Any, Any] | None = None,
        offload_folder: str | None = None,
        download_kwargs: Mapping[str, Any] | None = None,
        *,
        torch_dtype: Any = "auto",
        dtype: Any = None,
        **config_kwargs: Any,
    ) -> BaseAWQForCausalLM:
        """Load an AWQ model. fuse_layers: run it by squawq's fused decoder, whose cache holds max_seq_len tokens;
        a model that it cannot run keeps its own layers, and a log line says so. torch_dtype: "auto", the checkpoint's.

        Raises CheckpointError for a 16-bit model, ConfigError for a max_seq_len below 1, and as `from_pretrained` does.
        """
        if (older := config_kwargs.pop("max_new_tokens", None)) is not None:
            say_once("max_new_tokens is deprecated; it sets max_seq_len")
            max_seq_len = older
        max_seq_len = 2048 if max_seq_len is None else max_seq_len
        check_count("max_seq_len", max_seq_len)
        if use_exllama or use_exllama_v2 or use_ipex:
            say_once("use_exllama, use_exllama_v2, use_ipex: squawq picks the kernel for the device by itself")
        limits = {"max_memory": max_memory, "offload_folder": offload_folder}
        opened = open_model(
            quant_path,
            dtype=dtype or torch_dtype,
            trust_remote_code=trust_remote_code,
            safetensors=safetensors,
            device_map=device_map,
            download_kwargs=download_kwargs,
            settings={**{k: v for k, v in limits.items() if v is not None}, **config_kwargs},
        )
        if opened.quantization is None:
            raise CheckpointError(f"{opened.folder}: is a 16-bit model; use from_pretrained, and quantize it")
        if quant_filename and [path.name for path in opened.folder.glob("*.safetensors")] != [quant_filename]:
            raise ConfigError(
                f"quant_filename is {quant_filename!r}; leave it out: the folder's index says what is read"
            )
        opened.config.max_seq_len = max_seq_len
        opened.fuse = max_seq_len if fuse_layers else None
        return BaseAWQForCausalLM(opened)
