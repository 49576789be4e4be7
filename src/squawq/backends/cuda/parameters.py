"""Sampling parameters as the sampling kernels read them, and which of them those know."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from squawq.backends.cuda import sampling as kernels
from squawq.backends.sampling import GREEDY_BELOW, Sampling

MOST_COUNTED = 2**15 - 1  # of one token in the output
IN_PROMPT = -(2**15)  # the sign bit


def samples(sampling: Sampling) -> bool:
    """Whether the kernels sample a sequence; otherwise the host does."""
    params = sampling.params
    return (
        sampling.grammar is None
        and not params.logit_bias
        and params.allowed_ids is None
        and not params.bad_ids
        and params.typical_p == 1
        and params.top_k <= kernels.LISTED.value
        and (not params.min_tokens or len(list(sampling.ending)) <= kernels.ENDINGS)
    )


def parameters(sampling: Sampling) -> tuple[list[float], list[int], bool]:
    """A row of `floats`, one of `ints` (see sampling.py), and whether `counts` are needed."""
    params = sampling.params
    greedy = params.temperature < GREEDY_BELOW or params.top_k == 1  # the first of equal logits
    temperature = 0.0 if greedy else params.temperature
    penalties = params.repetition_penalty, params.frequency_penalty, params.presence_penalty
    ending = list(sampling.ending) if params.min_tokens else []
    low, high = np.array([sampling.seed], np.uint64).view(np.int32).tolist()
    penalized = penalties != (1, 0, 0)
    min_tokens = min(params.min_tokens, 2**31 - 1)
    whole = [params.top_k, low, high, sampling.index, len(sampling.prompt), min_tokens, int(penalized), len(ending)]
    return [temperature, params.top_p, params.min_p, *penalties], [*whole, *ending], penalized


def counts(sampling: Sampling, vocab: int) -> NDArray[np.int16]:
    """int16 [vocab]: how often each token is in the output; the sign bit says that it is in the prompt."""
    prompt = len(sampling.prompt)
    output = np.asarray(sampling.tokens[prompt:], dtype=np.int64)
    found = np.minimum(np.bincount(output, minlength=vocab), MOST_COUNTED).astype(np.int16)
    found[np.asarray(sampling.prompt, dtype=np.int64)] |= np.int16(IN_PROMPT)
    return found
