"""A model under AutoAWQ's names: opened, quantized by squawq's pipeline into a temporary folder, saved, run.

Knows folders and arguments, no tensors: weights go from file to file one layer at a time.
"""

from __future__ import annotations

import os
import shutil
import weakref
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from awq.models._config import AwqConfig
from awq.models.loading import Opened, check_as_stored, check_count, fuse_layers, open_model, say_once
from awq.models.saving import save
from awq.utils.calib_data import calibration_blocks
from squawq.errors import ConfigError
from squawq.families import family_of
from squawq.format.reader import Checkpoint
from squawq.progress import LayerProgress
from squawq.quantization.calibration import Calibration
from squawq.quantization.self_calibration import SOURCES

PACKED, DENSE = "awq", "dense"  # in the temporary folder


class BaseAWQForCausalLM:
    """What `AutoAWQForCausalLM` gives.

    config: transformers' config. quant_config: AwqConfig. model_type: of config.json. search_result: squawq's report,
    once quantized here. processor: None; squawq knows text models. is_quantized: whether the weights are AWQ.
    """

    def __init__(self, opened: Opened) -> None:
        self._opened, self._model = opened, None
        self._source = opened
        self._work: Path | None = None
        self.quant_config = opened.quantization or AwqConfig()
        self.search_result: dict[str, Any] | None = None
        self.processor = None
        if opened.quantization is not None:
            self._model = opened.load()

    @property
    def is_quantized(self) -> bool:
        return self._work is not None or self._opened.quantization is not None

    @property
    def config(self) -> Any:
        return self._opened.config if self._model is None else self._model.config

    @property
    def model_type(self) -> str:
        return str(self.config.model_type)

    @property
    def model(self) -> Any:
        """transformers' model; a 16-bit one is loaded when this is first read."""
        if self._model is None:
            self._model = self._opened.load()
        return self._model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    __call__ = forward

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers' `generate`, without gradients."""
        import torch

        with torch.inference_mode():
            return self.model.generate(*args, **kwargs)

    def to(self, device: Any) -> Any:
        """Move the model; returns transformers' model, as AutoAWQ does."""
        return self.model.to(device)

    def eval(self) -> BaseAWQForCausalLM:
        """Models are always loaded for inference."""
        return self

    def quantize(
        self,
        tokenizer: Any = None,
        quant_config: Mapping[str, Any] | None = None,
        calib_data: Calibration = None,
        split: str = "train",
        text_column: str = "text",
        duo_scaling: bool = True,
        export_compatible: bool = False,
        apply_clip: bool = True,
        n_parallel_calib_samples: int | None = None,
        max_calib_samples: int = 128,
        max_calib_seq_len: int = 512,
        max_chunk_memory: int = 1024**3,
        quantizer_cls: type | None = None,
    ) -> None:
        """Quantize into a temporary folder (in TMPDIR, of about a third of the model's size) until `save_quantized`.

        quant_config: see AwqConfig. calib_data, split, text_column: see `calibration_blocks`; not given: squawq's
        built-in set; "self" or "self+builtin": text that the model generates, see `squawq.quantize`.
        max_calib_samples: blocks at most. max_calib_seq_len: tokens in each, or the model's context if that is less.
        export_compatible: save the quantized weights as 16-bit floats, until `pack`.
        n_parallel_calib_samples, max_chunk_memory: not needed, memory is one layer's whatever they say.
        Raises TypeError for an unknown key, SquawqError for what cannot work: a model whose settings or weights were
        changed since it was opened, among others.
        """
        from squawq.quantization.pipeline import quantize

        if self.is_quantized:
            raise ConfigError(f"{self._source.folder}: is quantized already; open the 16-bit model again")
        if quantizer_cls is not None:
            raise ConfigError(f"quantizer_cls is {quantizer_cls!r}; squawq has one quantizer, leave it out")
        for name, value in (
            ("max_calib_samples", max_calib_samples),
            ("max_calib_seq_len", max_calib_seq_len),
            ("n_parallel_calib_samples", 1 if n_parallel_calib_samples is None else n_parallel_calib_samples),
            ("max_chunk_memory", max_chunk_memory),
        ):
            check_count(name, value)
        wanted = AwqConfig.from_dict(quant_config)
        checkpoint = Checkpoint(self._source.folder)
        check_as_stored(self.config, self._model, checkpoint)
        settings = wanted.to_quant_config(
            family_of(checkpoint.config.model_type),
            clip=apply_clip,
            duo_scaling=duo_scaling,
            dtype=_stored_dtype(self._source.arguments["dtype"]),
            seqlen=min(max_calib_seq_len, checkpoint.config.max_positions),
        )
        calibration, samples = calib_data, max_calib_samples
        if not isinstance(calib_data, str) or calib_data not in SOURCES:
            rows = calibration_blocks(
                calib_data,
                tokenizer,
                checkpoint.folder,
                split=split,
                text_column=text_column,
                samples=max_calib_samples,
                seqlen=settings.seqlen or 0,
                vocab_size=checkpoint.config.vocab_size,
            )
            calibration, samples = rows, len(rows)
        settings = replace(settings, samples=samples)
        work = Path(mkdtemp(prefix="squawq-")).resolve()
        weakref.finalize(self, _remove, work, os.getpid())  # when this object goes, or at exit
        device = _quantization_device(self._source.arguments["device_map"])
        with LayerProgress() as observer:
            report = quantize(
                checkpoint.folder, work / PACKED, settings, calibration=calibration, device=device, observer=observer
            )
        if export_compatible:
            from squawq.export.run import export

            say_once("export_compatible: the saved floats are the quantized weights' values; pack() gives the integers")
            export(work / PACKED, work / DENSE, "dense")
        self._work, self.search_result, self.quant_config = work, report, wanted
        self._move_to(work / (DENSE if export_compatible else PACKED))

    def pack(self) -> None:
        """After `quantize(..., export_compatible=True)`: integers from now on. Raises ConfigError before `quantize`."""
        if self._work is None:
            raise ConfigError("pack() follows quantize(..., export_compatible=True)")
        if self._opened.quantization is None:
            self._move_to(self._work / PACKED)

    def _move_to(self, folder: Path) -> None:
        """From now on this folder is the model; it is loaded when it is next run."""
        self._model = None
        self._opened = open_model(
            folder.resolve(),
            dtype=self._source.arguments["dtype"],
            trust_remote_code=None,
            safetensors=True,
            device_map=self._source.arguments["device_map"],
            download_kwargs=None,
            settings=self._source.settings,
        )

    def save_quantized(self, save_dir: str | Path, safetensors: bool = True, shard_size: str | int = "5GB") -> None:
        """Weights, config.json, generation config, licence and report into `save_dir`; the tokenizer is the caller's.

        Weights that lie there are replaced. There is one file for each layer: shard_size only bounds them.
        Raises ConfigError before `quantize`, for safetensors=False, and for a shard_size that a layer exceeds.
        """
        if not safetensors:
            raise ConfigError("safetensors is False; only safetensors files are written, since pickles run code")
        if not self.is_quantized:
            raise ConfigError("save_quantized() follows quantize()")
        if Path(save_dir).resolve() == self._source.folder.resolve():
            raise ConfigError(f"{str(save_dir)!r} is the model itself; choose another folder")
        if Path(save_dir).resolve() == self._opened.folder:  # saved there before
            return
        ours = self._work is not None and self._opened.folder.is_relative_to(self._work)
        save(self._opened.folder, Path(save_dir), shard_size, move=ours)
        if ours:
            self._move_to(Path(save_dir))

    @staticmethod
    def fuse_layers(model: Any) -> None:
        """Let transformers' AWQ model (`.model`) run as squawq's fused decoder, in place."""
        fuse_layers(model, getattr(model.config, "max_seq_len", 2048))


def _remove(work: Path, owner: int) -> None:
    """Remove the temporary folder, unless this is a forked child: its parent has it still."""
    if os.getpid() == owner:
        shutil.rmtree(work, ignore_errors=True)


def _stored_dtype(given: Any) -> str:
    """What stays in 16 bits: float16 or bfloat16 if asked for, else the source's, as in AutoAWQ."""
    name = str(given).removeprefix("torch.")
    return name if name in ("float16", "bfloat16") else "auto"


def _quantization_device(device_map: Any) -> str:
    """AutoAWQ takes a GPU where there is one."""
    import torch

    if isinstance(device_map, str) and device_map.partition(":")[0] in ("cpu", "cuda"):
        return device_map
    return "cuda" if torch.cuda.is_available() else "cpu"
