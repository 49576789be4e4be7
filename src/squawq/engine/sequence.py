"""The state of a request in flight: its sequences turn tokens into text and decide when they are finished."""

from __future__ import annotations

import math
import secrets
from collections import abc
from collections.abc import Callable
from dataclasses import replace

from squawq.backends.sampling import SAMPLED, Chunk, Sampling
from squawq.engine.grammar import Matcher
from squawq.engine.pages import root
from squawq.engine.request import FinishReason, Output, Request, Sink, TokenLogprob
from squawq.engine.scheduler import Sequence
from squawq.text.tokenizer import TextStream, TokenDecoder


class StopStrings:
    """Cuts a text at the stop string that is complete first; of several complete at one character, the longest.

    Text that may begin a stop string is held back, unless `include` keeps it anyway. How `push` calls split the text
    does not matter. Each string has an automaton of Knuth, Morris and Pratt (SIAM J. Comput. 6, 1977).
    """

    def __init__(self, stops: abc.Sequence[str], include: bool = False) -> None:
        self._stops = sorted(stops, key=len, reverse=True)
        self._borders = [_borders(stop) for stop in self._stops]
        self._states = [0] * len(stops)  # how many characters of each string the text ends with
        self._include = include
        self._held = ""

    def push(self, text: str, ending: bool = True) -> tuple[str, str | None]:
        """Add text. Returns what can be output, and the stop string if one was found. After that, push nothing.

        ending: False ignores stop strings that become complete in this text.
        """
        if not self._stops:
            return text, None
        buffer = self._held + text
        for position in range(len(self._held), len(buffer)):
            if (stop := self._advance(buffer[position])) is not None and ending:
                self._held = ""
                return buffer[: position + 1 - (0 if self._include else len(stop))], stop
        ready = len(buffer) if self._include else len(buffer) - max(self._states)
        self._held = buffer[ready:]
        return buffer[:ready], None

    def finish(self) -> str:
        """The text that is still held back."""
        held, self._held = self._held, ""
        return held

    def _advance(self, character: str) -> str | None:
        found = None
        for index, (stop, borders) in enumerate(zip(self._stops, self._borders, strict=True)):
            state = self._states[index]
            while state and stop[state] != character:
                state = borders[state - 1]
            state += stop[state] == character
            if state == len(stop):
                found = found or stop
                state = borders[-1]
            self._states[index] = state
        return found


def _borders(word: str) -> list[int]:
    """KMP's failure function: for each prefix of a word, the longest proper prefix that is also its suffix (length)."""
    borders = [0] * len(word)
    length = 0
    for position in range(1, len(word)):
        while length and word[position] != word[length]:
            length = borders[length - 1]
        length += word[position] == word[length]
        borders[position] = length
    return borders


class SequenceState:
    """Detokenizes and stops one sequence. `sequence` has its tokens and pages, `sampling` its sampling parameters."""

    def __init__(
        self,
        request: Request,
        index: int,
        sequence: Sequence,
        seed: int,
        matcher: Matcher | None,
        tokenizer: TokenDecoder | None,
        end_ids: frozenset[int],
    ) -> None:
        params = request.params
        self.index, self.sequence = index, sequence
        self.finish: FinishReason | None = None
        self._request, self._matcher, self._end_ids = request, matcher, end_ids
        ranked = params.logprobs is not None or params.sequences > params.n  # best_of ranks by log probabilities
        top = (params.logprobs or 0) if ranked else None
        self.sampling = Sampling(
            params, request.prompt, sorted(end_ids), seed, index, top, matcher, tokens=sequence.tokens
        )
        self._text = None if tokenizer is None else TextStream(tokenizer, request.prompt, params.skip_special_tokens)
        self._stops = StopStrings(params.stop, params.include_stop)
        self._logprobs: list[float] = []
        self._prompt_logprobs: list[TokenLogprob | None] = [None]

    @property
    def mean_logprob(self) -> float:
        """Over the new tokens; best_of ranks by this. Minus infinity without tokens or after a failure."""
        failed = self.finish in (FinishReason.ABORT, FinishReason.ERROR)
        return -math.inf if failed or not self._logprobs else sum(self._logprobs) / len(self._logprobs)

    def chunk(self, count: int) -> Chunk:
        """This sequence's part of the next step: its next `count` tokens."""
        sequence, params = self.sequence, self._request.params
        start, end = sequence.computed, sequence.computed + count
        last = count == sequence.left
        again = not last and count == 1 and start >= sequence.prompt
        return Chunk(
            ids=sequence.tokens[start:end] if start < len(sequence.tokens) else [SAMPLED],
            start=start,
            pages=sequence.pages,
            logits=count if sequence.score else int(last),
            sampling=self.sampling if last else None,
            again=self.sampling if again else None,
            targets=sequence.tokens[start + 1 : end + 1] if sequence.score else (),
            top=params.prompt_logprobs or 0,
            slot=sequence.slot,
        )

    def score(self, start: int, found: abc.Sequence[TokenLogprob]) -> None:
        """Add log probabilities of the prompt tokens after position `start`. A preemption repeats some: skip those."""
        self._prompt_logprobs += found[len(self._prompt_logprobs) - start - 1 :]
        self.sequence.score = len(self._prompt_logprobs) < len(self._request.prompt)

    def step(self, token: int, logprob: TokenLogprob | None) -> Output:
        """Append a sampled token; return what it adds to the output."""
        matcher, params = self._matcher, self._request.params
        if logprob is not None:
            self._logprobs.append(logprob.logprob)
        first = len(self.sequence.tokens) == len(self._request.prompt)
        self.sequence.tokens.append(token)
        ends = token in self._end_ids
        if matcher is not None and not ends:
            matcher.consume(token)
        text, stop = self._detokenize(token, ends)
        finish = FinishReason.STOP if ends or stop is not None else None
        if finish is None and len(self.sequence.tokens) >= self.sequence.limit:
            finish = FinishReason.LENGTH
        if finish and stop is None:
            text += self._flush()
        if finish:
            self._drop_grammar()  # frees its process before the request ends
        self.finish = finish  # set last: if a line above raises, `end` must still end the sequence
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
        """End the sequence early; return an output with the text that was held back."""
        self.finish = reason
        self._drop_grammar()
        return Output(self._request.id, self.index, text=self._flush(), finish=reason, stop_reason=why)

    def _drop_grammar(self) -> None:
        self._matcher = self.sampling.grammar = None

    def _detokenize(self, token: int, ends: bool) -> tuple[str, str | None]:
        """What a token adds to the text, and the stop string that it completed."""
        params = self._request.params
        if self._text is None or (ends and not params.include_stop):
            return "", None
        text = self._text.push(token)
        generated = len(self.sequence.tokens) - len(self._request.prompt)
        return self._stops.push(text, ending=generated >= params.min_tokens)

    def _flush(self) -> str:
        if self._text is None:
            return ""
        text, stop = self._stops.push(self._text.finish())
        return text if stop is not None else text + self._stops.finish()

    def _prompt_scores(self) -> tuple[TokenLogprob | None, ...] | None:
        wanted = self._request.params.prompt_logprobs is not None and self.index == 0
        return tuple(self._prompt_logprobs) if wanted else None


class RequestState:
    """A request and its sequences. Sends each output to the sink as it comes; with best_of the best n at the end.

    Args:
        room: Most tokens of a sequence, prompt included.
        matcher: The compiled grammar, if there is one.
        tokenizer: None for token ids only.
        draw_seed: Returns a seed, for a request without one.
    """

    def __init__(
        self,
        request: Request,
        sink: Sink,
        *,
        room: int,
        matcher: Matcher | None,
        tokenizer: TokenDecoder | None,
        eos_ids: frozenset[int],
        draw_seed: Callable[[], int] = lambda: secrets.randbits(63),
    ) -> None:
        self.id, self.request, self.sink, self.started = request.id, request, sink, False
        params, count = request.params, len(request.prompt)
        limit = room if params.max_tokens is None else min(room, count + params.max_tokens)
        group = request.id if request.group is None else request.group
        prefix = root(request.tenant, request.cache_salt)
        end_ids = frozenset(params.stop_ids) | (frozenset() if params.ignore_eos else eos_ids)
        seed = draw_seed() if params.seed is None else params.seed
        self.states: list[SequenceState] = []
        for index in range(params.sequences):
            scored = params.prompt_logprobs is not None and index == 0
            sequence = Sequence(list(request.prompt), limit, request.tenant, group, prefix, scored)
            own = None if matcher is None else matcher.copy()
            self.states.append(SequenceState(request, index, sequence, seed, own, tokenizer, end_ids))
        self._kept: list[list[Output]] | None = [[] for _ in self.states] if params.sequences > params.n else None

    @property
    def ended(self) -> bool:
        return all(state.finish for state in self.states)

    def deliver(self, output: Output) -> None:
        """Send an output to the sink, with best_of once all sequences have finished. Raises what the sink raises."""
        if self._kept is None:
            self.sink(output)
            return
        self._kept[output.index].append(output)
        if self.ended:
            ranked = sorted(self.states, key=lambda state: -state.mean_logprob)
            scores = self._kept[0][0].prompt_logprobs
            for index, state in enumerate(ranked[: self.request.params.n]):
                whole = join(self._kept[state.index])
                self.sink(replace(whole, index=index, prompt_logprobs=scores if index == 0 else None))


def join(outputs: abc.Sequence[Output]) -> Output:
    """Join a sequence's outputs, given in order, into one."""
    logprobs = [output.logprobs for output in outputs if output.logprobs is not None]
    scores = [output.prompt_logprobs for output in outputs if output.prompt_logprobs is not None]
    return replace(
        outputs[-1],
        ids=tuple(token for output in outputs for token in output.ids),
        text="".join(output.text for output in outputs),
        logprobs=tuple(item for part in logprobs for item in part) if logprobs else None,
        prompt_logprobs=scores[0] if scores else None,
    )
