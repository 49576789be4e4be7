"""pytest -p sanitized: the tests run on the native library that SQUAWQ_SANITIZED names (tools/sanitize.sh)."""

from __future__ import annotations

import os
from pathlib import Path
from unittest.mock import patch

import torch

from squawq.backends.cpu import library, packed

patch.object(library, "_find", lambda: Path(os.environ["SQUAWQ_SANITIZED"])).start()
# Packed weights lie in a memory map of their own, whose ends the sanitizer does not watch; those of malloc it does.
patch.object(packed, "_buffer", lambda size, dtype: torch.zeros(size, dtype=dtype)).start()
