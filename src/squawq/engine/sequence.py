"""A request under way: each of its sequences turns rows of logits into tokens, text and log probabilities, and knows
when it ends. Knows settings and its own history; knows no pages, steps or threads.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable
from collections.abc import Sequence as Tokens
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from squawq.engine.detokenizer import Decoder, StopStrings, TextStream
from squawq.engine.grammar import Matcher
from squawq.engine.pages import root
from squawq.engine.request import FinishReason, Output, Request, Sink, TokenLogprob
from squawq.engine.sampler import Sampler, token_logprob
from squawq.engine.scheduler import Sequence


class Generation:
    """One sequence of a request. `place` is its tokens and pages, which the scheduler plans with."""

    def __init__(
        self,
        request: Request,
        index: int,
        place: Sequence,
        sampler: Sampler,
        matcher: Matcher | None,
        tokenizer: Decoder | None,
        eos_ids: frozenset[int],
    ) -> None:
        params = request.params
        self.index = index
        self.place = place
        self.finish: FinishReason | None = None
        self._request = request
        self._sampler = sampler
        self._matcher = matcher
        self._text = None if tokenizer is None else TextStream(tokenizer, request.prompt, params.skip_special_tokens)
        self._stops = StopStrings(params.stop, params.include_stop)
        self._ending = eos_ids
        self._wants_logprobs = params.logprobs is not None or params.sequences > params.n
        self._logprobs: list[float] = []
        self._prompt_logprobs: list[TokenLogprob | None] = [None]

    @property
    def mean_logprob(self) -> float:
        """What best_of ranks by; minus infinity for a sequence without tokens or one that failed."""
        failed = self.finish in (FinishReason.ABORT, FinishReason.ERROR)
        return -math.inf if failed or not self._logprobs else sum(self._logprobs) / len(self._logprobs)

    def score(self, start: int, rows: NDArray[np.float32]) -> None:
        """Take the prompt's log probabilities from the logits [tokens, vocab] after its tokens from `start` on.

        After a preemption rows come again; those that are known are left aside.
        """
        prompt, top = self._request.prompt, self._request.params.prompt_logprobs
        for position, row in enumerate(rows, start + 1):
            if position == len(self._prompt_logprobs) < len(prompt):
                self._prompt_logprobs.append(token_logprob(row, prompt[position], top or 0))
        self.place.score = len(self._prompt_logprobs) < len(prompt)

    def step(self, row: NDArray[np.float32]) -> Output:
        """Choose the next token from its logits [vocab]."""
        matcher, params = self._matcher, self._request.params
        if matcher is None:
            token = self._sampler.choose(row)
        else:
            token = self._sampler.choose(row, matcher.allowed(), matcher.complete)
        logprob = token_logprob(row, token, params.logprobs or 0) if self._wants_logprobs else None
        if logprob is not None:
            self._logprobs.append(logprob.logprob)
        first = len(self.place.tokens) == len(self._request.prompt)
        self.place.tokens.append(token)
        ends = token in self._ending
        if matcher is not None and not ends:
            matcher.consume(token)
        text, stop = self._say(token, ends)
        finish = FinishReason.STOP if ends or stop is not None else None
        if finish is None and len(self.place.tokens) >= self.place.limit:
            finish = FinishReason.LENGTH
        if finish and stop is None:
            text += self._rest()
        if finish:
            self._matcher = None  # its process ends, though others of the request go on
        self.finish = finish  # last, so that a sequence that failed on the way is still to be ended
        return Output(
            request=self._request.id,
            index=self.index,
            ids=(token,),
            text=text,
            logprobs=(logprob,) if logprob is not None and params.logprobs is not None else None,
            prompt_logprobs=self._prompt_scores() if first else None,
            finish=finish,
            stop_reason=token if ends else stop,
        )

    def end(self, reason: FinishReason, why: str | None = None) -> Output:
        """End before its time; text that was held back is given out."""
        self.finish = reason
        self._matcher = None
        return Output(self._request.id, self.index, text=self._rest(), finish=reason, stop_reason=why)

    def _say(self, token: int, ends: bool) -> tuple[str, str | None]:
        """What a token adds to the text, and the stop string that it completed."""
        params = self._request.params
        if self._text is None or (ends and not params.include_stop):
            return "", None
        text = self._text.push(token)
        generated = len(self.place.tokens) - len(self._request.prompt)
        return self._stops.push(text, ending=generated >= params.min_tokens)

    def _rest(self) -> str:
        if self._text is None:
            return ""
        text, stop = self._stops.push(self._text.finish())
        return text if stop is not None else text + self._stops.finish()

    def _prompt_scores(self) -> tuple[TokenLogprob | None, ...] | None:
        wanted = self._request.params.prompt_logprobs is not None and self.index == 0
        return tuple(self._prompt_logprobs) if wanted else None


class Job:
    """A request and its sequences. Gives the sink every sequence as it goes, or with best_of the best at the end."""

    def __init__(self, request: Request, sink: Sink, generations: list[Generation]) -> None:
        self.request = request
        self.generations = generations
        self.started = False
        self.sink = sink
        self._kept: list[list[Output]] | None = None
        if len(generations) > request.params.n:
            self._kept = [[] for _ in generations]

    @property
    def ended(self) -> bool:
        """Whether all sequences have ended."""
        return all(generation.finish for generation in self.generations)

    def give(self, output: Output) -> None:
        """Pass an output on to the sink, or keep it until the last sequence has ended. Raises what the sink raises."""
        if self._kept is None:
            self.sink(output)
            return
        self._kept[output.index].append(output)
        if self.ended:
            ranked = sorted(self.generations, key=lambda g: -g.mean_logprob)
            scores = self._kept[0][0].prompt_logprobs
            for index, generation in enumerate(ranked[: self.request.params.n]):
                whole = join(self._kept[generation.index])
                self.sink(replace(whole, index=index, prompt_logprobs=scores if index == 0 else None))


def join(outputs: Tokens[Output]) -> Output:
    """A sequence's outputs as one."""
    logprobs = [output.logprobs for output in outputs if output.logprobs is not None]
    scores = [output.prompt_logprobs for output in outputs if output.prompt_logprobs is not None]
    return replace(
        outputs[-1],
        ids=tuple(token for output in outputs for token in output.ids),
        text="".join(output.text for output in outputs),
        logprobs=tuple(item for part in logprobs for item in part) if logprobs else None,
        prompt_logprobs=scores[0] if scores else None,
    )


def new_job(
    request: Request,
    sink: Sink,
    *,
    limit: int,
    matcher: Matcher | None,
    tokenizer: Decoder | None,
    eos_ids: frozenset[int],
    draw_seed: Callable[[], int] | None = None,
) -> Job:
    """A request with its sequences; `draw_seed` gives the seed of a request that has none."""
    params = request.params
    prefix = root(request.tenant, request.cache_salt)
    ending = frozenset(params.stop_ids) | (frozenset() if params.ignore_eos else eos_ids)
    seed = params.seed
    if seed is None:
        seed = secrets.randbits(63) if draw_seed is None else draw_seed()
    generations: list[Generation] = []
    for index in range(params.sequences):
        place = Sequence(
            tokens=list(request.prompt),
            limit=limit,
            tenant=request.tenant,
            group=request.id if request.group is None else request.group,
            root=prefix,
            score=params.prompt_logprobs is not None and index == 0,
        )
        sampler = Sampler(params, request.prompt, sorted(ending), seed, index)
        own = None if matcher is None else matcher.copy()
        generations.append(Generation(request, index, place, sampler, own, tokenizer, ending))
    return Job(request, sink, generations)
