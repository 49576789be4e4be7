"""What goes into vLLM for one sequence, and log probabilities that come out of it, in vLLM's terms and in ours."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from squawq.engine.request import Grammar, SamplingParams, TokenLogprob
from squawq.engine.schema import close_objects
from squawq.engine.sequence import SequenceState


def vllm_params(params: SamplingParams, state: SequenceState, seeded: bool) -> Any:
    """One sequence's parameters for vLLM. Text is made here, so that stop strings are not among them.

    seeded: Requests without a seed have one, too.
    """
    from vllm import SamplingParams as VllmParams
    from vllm.sampling_params import RequestOutputKind

    sampling = state.sampling
    found = VllmParams(
        max_tokens=state.sequence.limit - len(sampling.prompt),
        min_tokens=params.min_tokens,
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        frequency_penalty=params.frequency_penalty,
        presence_penalty=params.presence_penalty,
        logit_bias=None if params.logit_bias is None else dict(params.logit_bias),
        allowed_token_ids=None if params.allowed_ids is None else list(params.allowed_ids),
        seed=(sampling.seed + state.index) % 2**63 if params.seed is not None or seeded else None,
        stop_token_ids=list(sampling.ending),
        ignore_eos=True,  # the end tokens are among stop_token_ids
        logprobs=sampling.logprobs,
        prompt_logprobs=params.prompt_logprobs if state.index == 0 else None,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        structured_outputs=None if params.grammar is None else _structured(params.grammar),
    )
    if params.bad_ids:
        found._bad_words_token_ids = [list(ids) for ids in params.bad_ids]  # vLLM itself makes them of words
    return found


def _structured(grammar: Grammar) -> Any:
    from vllm.sampling_params import StructuredOutputsParams

    if grammar.kind == "json_schema":
        return StructuredOutputsParams(json=json.dumps(close_objects(json.loads(grammar.text))))
    if grammar.kind == "regex":
        return StructuredOutputsParams(regex=grammar.text)
    return StructuredOutputsParams(grammar=grammar.text)


def token_logprob(token: int, found: Mapping[int, Any], top: int) -> TokenLogprob:
    """vLLM's entries {token: log probability and rank}: the token's own, and those of the `top` likeliest."""
    ranked = sorted(found.items(), key=lambda item: item[1].rank)[:top]
    return TokenLogprob(token, float(found[token].logprob), tuple((other, float(one.logprob)) for other, one in ranked))
