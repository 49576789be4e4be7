"""QuantConfig: how to quantize, and its conversion to and from the `quantization_config` of several libraries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field

from squawq.errors import CheckpointError, ConfigError
from squawq.showing import beside_defaults
from squawq.strict import refuse, strict

GroupSize = Literal[16, 32, 64, 128, 256, -1]
GROUP_SIZES: tuple[GroupSize, ...] = get_args(GroupSize)
Method = Literal["squawq", "awq", "rtn"]
METHODS: tuple[Method, ...] = get_args(Method)
Dtype = Literal["auto", "float16", "bfloat16"]
DTYPES: tuple[Dtype, ...] = get_args(Dtype)
AWQ_LAYOUTS = ("gemm", "gemv", "gemv_fast", "llm-awq")


Switch = Annotated[bool, Field(description="true or false")]
Names = Annotated[
    tuple[Annotated[str, Field(min_length=1)], ...],
    BeforeValidator(lambda names: tuple(names) if isinstance(names, list) else names),
    Field(description="a list of module names"),
]


def _choose(choices: tuple[object, ...]) -> Any:
    return Field(description=f"choose one of {', '.join(map(str, choices))}")


def _at_least(least: int) -> Any:
    return Field(ge=least, description=f"a whole number of at least {least}")


@strict()
class QuantConfig:
    """How to quantize. The first four fields are written to `quantization_config`.

    Attributes:
        bits: 4.
        group_size: Weights along in_features that share a scale; -1 for a whole row.
        zero_point: Asymmetric (True) or symmetric around 8 (False).
        modules_to_not_convert: Linears whose full name contains one of these stay in 16 bits.
        method: "awq" (activation-aware scales, Lin et al., arXiv 2306.00978), "squawq" (the same scales, then rounding
            with error feedback) or "rtn" (round to nearest).
        clip: Search a clipping range per group, as AutoAWQ does.
        duo_scaling: Try scales from activations and weights as well as from activations alone.
        n_grid: Steps of the scale search between 0 and 1; None: 10, with "awq" 20.
        compensate: GPTQ error feedback: the columns after a rounded one compensate its error (Frantar et al., arXiv
            2210.17323). "squawq" alone, like the four that follow.
        act_order: Round the columns with the largest Hessian diagonal first.
        refine: Passes of coordinate descent over integers and scales after rounding.
        sequential: Calibrate each linear on the outputs of the quantized layers before it, and correct its weights for
            their error (QEP, arXiv 2504.09629).
        damping: Hessian damping, as a share of its diagonal.
        token_weights: Weight calibration tokens by gradients of the 16-bit model (`quantization.token_weights`), which
            must fit in memory. None: with "squawq" on an NVIDIA GPU that holds the 16-bit model.
        tune: After all layers, tune scales to the 16-bit model's predictions (`quantization.tuning`). None: with
            "squawq" on an NVIDIA GPU that holds the 16-bit model, up to 16e9 parameters.
        for_tensor_parallel: Take the largest group size up to `group_size` with which so many GPUs can share the result
            in every engine: no group may be on two of them.
        dtype: Of the tensors that stay in 16 bits. "auto": bfloat16 for a bfloat16 source, else float16.
        samples: Calibration blocks; None: all there are, up to 128, or where a GPU generates them up to 1,536.
        seqlen: Tokens per block; None: 512, or the model's context if that is shorter.
        seed: Of the sampling, where the model generates text for calibration or tuning, or weights tokens.

    Raises:
        ConfigError: A value is out of range.
    """

    bits: Annotated[int, _choose((4,))] = 4
    group_size: Annotated[int, _choose(GROUP_SIZES)] = 128
    zero_point: Switch = True
    modules_to_not_convert: Names = ()
    method: Annotated[str, _choose(METHODS)] = "squawq"
    clip: Switch = True
    duo_scaling: Switch = True
    n_grid: Annotated[int | None, _at_least(1)] = None
    compensate: Switch = True
    act_order: Switch = True
    refine: Annotated[int, _at_least(0)] = 3
    sequential: Switch = True
    damping: Annotated[float, Field(ge=0, le=10, description="a number from 0 to 10")] = 0.5
    token_weights: Annotated[bool | None, Field(description="true, false or null")] = None
    tune: Annotated[bool | None, Field(description="true, false or null")] = None
    for_tensor_parallel: Annotated[int | None, _at_least(1)] = None
    dtype: Annotated[str, _choose(DTYPES)] = "auto"
    samples: Annotated[int | None, _at_least(1)] = None
    seqlen: Annotated[int | None, _at_least(8)] = None
    seed: Annotated[int, Field(ge=0, le=2**63 - 1, description="a whole number, 0 to 2^63 - 1")] = 0

    __repr__ = beside_defaults

    def __post_init__(self) -> None:
        for name, choices in (("bits", (4,)), ("group_size", GROUP_SIZES), ("method", METHODS), ("dtype", DTYPES)):
            if getattr(self, name) not in choices:
                raise refuse(name, getattr(self, name), f"choose one of {', '.join(map(str, choices))}")
        for name in () if self.method == "squawq" else ("refine", "damping"):
            if (value := getattr(self, name)) not in (0, getattr(QuantConfig, name)):
                raise ConfigError(f"{name} is {value!r}, but method {self.method!r} has none; leave it out")

    @property
    def error_feedback(self) -> bool:
        """Whether rounding uses error feedback or coordinate descent; otherwise it is to nearest."""
        return self.compensate or self.refine > 0

    @property
    def scale_steps(self) -> int:
        """`n_grid`, or what goes with the method."""
        return self.n_grid or (20 if self.method == "awq" else 10)

    def group_of(self, in_features: int) -> int:
        """The group size for a linear with this many inputs."""
        return in_features if self.group_size == -1 else self.group_size

    def skips(self, name: str) -> bool:
        """Whether the linear of this full name stays in 16 bits by `modules_to_not_convert`."""
        return any(part in name for part in self.modules_to_not_convert)

    def to_dict(self) -> dict[str, Any]:
        """Every field, in JSON's types."""
        return {**asdict(self), "modules_to_not_convert": list(self.modules_to_not_convert)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> QuantConfig:
        """From a mapping of field names or AutoAWQ's spellings (w_bit, q_group_size, version); unknown keys raise."""
        values = dict(values)
        for ours, theirs in (("bits", "w_bit"), ("group_size", "q_group_size")):
            if theirs in values:
                values[ours] = values.pop(theirs)
        if (version := values.pop("version", None)) is not None:
            _check_layout(version, ("GEMM",))
        values.pop("quant_method", None)
        if values.get("modules_to_not_convert") is None:
            values.pop("modules_to_not_convert", None)
        known = [f.name for f in fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            raise ConfigError(f"unknown quantization setting {unknown[0]!r}; the settings are {', '.join(known)}")
        return cls(**values)

    def to_quantization_config(self, not_converted: list[str]) -> dict[str, Any]:
        """The `quantization_config` that transformers, vLLM, TGI and SGLang read, key for key AutoAWQ's."""
        return {
            "quant_method": "awq",
            "bits": self.bits,
            "group_size": self.group_size,
            "zero_point": self.zero_point,
            "version": "gemm",
            "modules_to_not_convert": not_converted or None,
        }

    @classmethod
    def from_quantization_config(
        cls, values: Mapping[str, Any], where: str, layouts: tuple[str, ...] = ("gemm",)
    ) -> QuantConfig:
        """From `quantization_config` or a legacy quant_config.json. Other writers add keys; they are left aside.

        Raises CheckpointError naming `where` for another method or size than AWQ of 4 bits, and for a layout that is
        not one of `layouts`.
        """
        method = values.get("quant_method", "awq")
        if method != "awq":
            raise CheckpointError(f"{where}: quant_method is {method!r:.100}; 'awq' is needed here")
        names = ("bits", "w_bit", "group_size", "q_group_size", "zero_point", "modules_to_not_convert")
        try:
            _check_layout(stated_layout(values), layouts)
            return cls.from_dict({k: values[k] for k in names if k in values})
        except (ConfigError, TypeError) as error:
            raise CheckpointError(f"{where}: {error}") from error


def stated_layout(values: Mapping[str, Any]) -> object:
    """The layout that a `quantization_config` names, in whichever of its writers' spellings, in lower case."""
    if values.get("backend") == "llm-awq":  # transformers' older way to say so
        return "llm-awq"
    keys = ("version", "format", "checkpoint_format")  # AutoAWQ and transformers; GPTQModel; its older releases
    stated = next((values[key] for key in keys if values.get(key) is not None), "gemm")
    return stated.lower() if isinstance(stated, str) else stated


def _check_layout(stated: object, layouts: tuple[str, ...]) -> None:
    name = stated.lower() if isinstance(stated, str) else ""
    if name not in map(str.lower, layouts):
        elsewhere = " (squawq.LLM and `squawq serve` read the others)" if name in AWQ_LAYOUTS else ""
        raise ConfigError(f"version is {stated!r}; choose one of {', '.join(map(repr, layouts))}{elsewhere}")
