"""squawq: AWQ INT4 quantization of Llama-class models, fidelity measured, inference, in a laptop's memory.

import squawq

squawq.quantize("Llama-3.2-1B-Instruct", "Llama-3.2-1B-Instruct-AWQ")
squawq.evaluate("Llama-3.2-1B-Instruct-AWQ", reference="Llama-3.2-1B-Instruct")
squawq.LLM("Llama-3.2-1B-Instruct-AWQ").chat([{"role": "user", "content": "Hello!"}])
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from squawq.engine.request import Grammar as Grammar
    from squawq.engine.request import SamplingParams as SamplingParams
    from squawq.errors import SquawqError as SquawqError
    from squawq.evaluation.run import evaluate as evaluate
    from squawq.llm import LLM as LLM
    from squawq.quant_config import QuantConfig as QuantConfig
    from squawq.quantization.pipeline import quantize as quantize

_HOMES = {
    "Grammar": "squawq.engine.request",
    "LLM": "squawq.llm",
    "QuantConfig": "squawq.quant_config",
    "SamplingParams": "squawq.engine.request",
    "SquawqError": "squawq.errors",
    "evaluate": "squawq.evaluation.run",
    "quantize": "squawq.quantization.pipeline",
}
__all__ = ["LLM", "Grammar", "QuantConfig", "SamplingParams", "SquawqError", "__version__", "evaluate", "quantize"]


def __getattr__(name: str) -> Any:
    """Public names are imported on first use: torch takes seconds, and `squawq --help` should not."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'squawq' has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names."""
    return __all__
