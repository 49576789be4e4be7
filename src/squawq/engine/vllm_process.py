"""A plugin that vLLM calls in each of its processes: they end with the process in which `engine/vllm.py` runs."""

from __future__ import annotations

import os
import threading
import time

OWNER = "SQUAWQ_VLLM_OWNER"  # the id of the process that started vLLM for our engine
INTERVAL_S = 1.0


def end_with_owner() -> None:
    """End this process when its owner has ended, however it did; nothing in a vLLM that our engine did not start."""
    owner = os.environ.get(OWNER)
    if owner is not None and int(owner) != os.getpid():
        threading.Thread(target=_watch, args=(int(owner),), name="squawq-owner", daemon=True).start()


def _watch(owner: int) -> None:
    while True:
        try:
            os.kill(owner, 0)
        except ProcessLookupError:
            os._exit(1)
        time.sleep(INTERVAL_S)
