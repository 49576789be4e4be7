"""The public names are pinned: a change to them is a decision, not an accident."""

from __future__ import annotations

import subprocess
import sys

import squawq


def test_public_names() -> None:
    assert squawq.__all__ == [
        "LLM",
        "Grammar",
        "QuantConfig",
        "SamplingParams",
        "SquawqError",
        "__version__",
        "evaluate",
        "quantize",
    ]
    for name in squawq.__all__:
        assert getattr(squawq, name) is not None
    assert dir(squawq) == sorted(squawq.__all__)


def test_import_is_light() -> None:
    code = "import sys, squawq; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
