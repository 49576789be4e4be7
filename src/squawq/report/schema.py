"""The schema of squawq_report.json, for its writer and all its readers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

from squawq.errors import CheckpointError

Count = Annotated[int, Field(ge=0, lt=2**63)]
Size = Annotated[int, Field(gt=0, lt=2**63)]
Number = Annotated[float, Field(ge=0, lt=1e300)]
ReadBackText = Literal["calibration text", "built-in text", "token ids over the whole vocabulary"]
Quantiles = Annotated[list[float], Field(min_length=5, max_length=5)]  # 0, 5, 50, 95 and 100 %


def _measured(value: object) -> object:
    """JSON has neither NaN nor infinity; a loss near 0, the sum of a product with a Hessian, may round to below it."""
    if not isinstance(value, float):
        return value
    return max(0.0, value) if math.isfinite(value) else None


Loss = Annotated[Number | None, BeforeValidator(_measured)]


class Row(BaseModel):
    """Keys of later versions are let through; a key without a default is in every report."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True, allow_inf_nan=False)

    def to_dict(self) -> dict[str, Any]:
        """The keys that were given, in JSON's types."""
        return self.model_dump(exclude_unset=True)


class LinearRow(Row):
    """A linear: why it stays in 16 bits, or mean squared errors of its output and the share of its ranges that is kept.

    Written without what is not known.
    """

    name: str
    out_features: Size
    in_features: Size
    tokens: Count | None = None  # that an expert saw
    kept_in_16_bits: str | None = None
    loss_rounded: Loss = None  # by plain rounding
    loss: Loss = None
    clip: Quantiles | None = None

    @model_serializer(mode="wrap")
    def _known(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in dump(self).items() if value is not None}


class ScaleRow(Row):
    """Scales of linears that share an input."""

    linears: list[str]
    formula: str
    ratio: Number
    quantiles: Quantiles | None = None


class LayerRow(Row):
    """A decoder layer: the method that was kept, and mean squared and relative errors of its output."""

    name: str
    method: str
    loss_rounded: Loss  # by plain rounding
    loss: Loss
    relative_error_rounded: Loss = None
    relative_error: Loss = None
    scales: list[ScaleRow]
    linears: list[LinearRow]
    notes: list[str] = []
    seconds: Number | None = None
    peak_bytes: Count | None = None
    device_peak_bytes: Count | None = None


class Evaluation(Row):
    """What `squawq eval --reference` measured; of an evaluation without a reference, nothing is shown."""

    tokens: Count = 0
    perplexity: Number | None = None
    reference_perplexity: Number | None = None
    kl_mean: Number | None = None
    kl_p99: Number | None = None
    top1_agreement: Number | None = None
    kl_by_position: list[float] = []


class ReadBackRow(Row):
    """The finished folder, read back from disk and compared with the 16-bit model on a few rows of text."""

    text: ReadBackText
    tokens: Count
    kl_mean: Number
    top1_agreement: Annotated[float, Field(ge=0, le=1)]


class KeptRow(Row):
    """A module that stays in 16 bits."""

    name: str
    reason: str


class Settings(Row):
    """QuantConfig's fields that the report shows; earlier reports lack those with a default."""

    bits: Size
    group_size: Annotated[int, Field(ge=-1, lt=2**31)]
    zero_point: bool
    seqlen: Size | None = None
    clip: bool = True
    method: str | None = None
    compensate: bool | None = None
    act_order: bool | None = None
    sequential: bool | None = None
    refine: int | None = None
    damping: float | None = None
    samples: int | None = None
    seed: int = 0
    token_weights: bool | None = None
    tune: bool | None = None
    for_tensor_parallel: int | None = None
    dtype: str | None = None
    modules_to_not_convert: list[str] = []


class JobRow(Row):
    """What makes two runs the same job."""

    config: Settings
    device: str


class TuningRow(Row):
    """How the scales were tuned (`quantization.tuning`): losses are KL divergences on the rows held back, in nats."""

    steps: Count
    rows: Count
    held_back: Count
    loss_before: float
    loss: float
    seconds: float


class Report(Row):
    """squawq_report.json."""

    squawq: str
    model: str | None = None
    date: str | None = None
    runs_in: list[str] = ["squawq"]
    method: str
    source_bytes: Count
    bytes: Count
    parameters: Count | None = None
    embedding_bytes: Count | None = None
    calibration: str | None = None
    calibration_tokens: Count
    kept_in_16_bits: list[KeptRow]
    notes: list[str]
    stored_dtype: dict[str, Any] | None = None
    read_back: ReadBackRow | None = None
    layers: list[LayerRow]
    tuning: TuningRow | None = None
    job: JobRow
    evaluation: Evaluation | None = None

    @classmethod
    def read(cls, report: Mapping[str, Any], where: str = "the report") -> Report:
        """Validate a report. Raises CheckpointError, naming `where` and the first key that is wrong."""
        try:
            return cls.model_validate(report)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            raise CheckpointError(
                f"{where} is not as squawq quantize writes it: {key:.100}: {first['msg']:.100}; write it again, or "
                "remove it"
            ) from error
