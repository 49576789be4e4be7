"""TGI's replies and stream events from a request's outputs.

A token's text is what it adds to the generated text, which is the texts of all tokens that are not special, joined. The
first tokens of a character add nothing, the last one adds all of it. A special token's text is its name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from squawq.engine.request import FinishReason, Output, Request, TokenLogprob
from squawq.errors import ConfigError
from squawq.serve.call import LazyList, Reply, Times, dump, finite_logprob
from squawq.serve.errors import ApiError
from squawq.serve.model import Served
from squawq.text.tokenizer import TextStream

FAILED = (FinishReason.ABORT, FinishReason.ERROR)


@dataclass(frozen=True)
class ReplyOptions:
    """What the client asked for.

    Attributes:
        listed: The reply is a list of one.
        full_text: The text begins with the inputs.
        seeds: Of each sequence; None for greedy decoding.
    """

    inputs: str
    stream: bool
    listed: bool
    full_text: bool
    details: bool
    seeds: Sequence[int | None]


class GenerateCall:
    """A request on TGI's routes (call.Call)."""

    def __init__(self, served: Served, requests: Sequence[Request], options: ReplyOptions) -> None:
        self.requests = requests  # one for each of best_of sequences
        self.stream = options.stream
        self.headers: Mapping[str, str] = {
            "x-compute-type": served.settings.device,
            "x-compute-characters": str(len(options.inputs)),
        }
        self._request = request = requests[0]
        self._served = served
        self._options = options
        self._before = options.inputs if options.full_text else ""
        self._top = bool(request.params.logprobs)
        self._texts: list[str] = []
        self._count = 0

    def invalid(self, error: ConfigError) -> ApiError:
        """The engine's message, in TGI's form."""
        return refused(f"grammar is not valid: {error}" if self._request.params.grammar else str(error))

    def push(self, output: Output) -> list[str]:
        """One event per token. The last has the whole text, and details if the client asked for them."""
        if output.finish in FAILED:
            return self.fail(_incomplete())
        self._texts.append(output.text)
        texts = [*[""] * (len(output.ids) - 1), output.text]
        events = [self._event(*token) for token in zip(output.ids, texts, output.logprobs or (), strict=True)]
        if output.finish:
            events[-1]["generated_text"] = self._before + "".join(self._texts)
            if self._options.details:
                events[-1]["details"] = {
                    "finish_reason": _reason(output),
                    "generated_tokens": self._count,
                    "seed": self._options.seeds[0],
                    "input_length": len(self._request.prompt),
                }
        return [dump(event) for event in events]

    def end(self) -> list[str]:
        """Nothing: TGI's own streams have no end mark."""
        return []

    def fail(self, error: ApiError) -> list[str]:
        """The error as an event."""
        return [dump(error.body(tgi=True))]

    def reply(self, outputs: Sequence[Sequence[Output]], times: Times, /) -> Reply:
        """The sequence with the highest mean log probability; the others are in its details."""
        sequences = [output for (output,) in outputs]
        if any(output.finish in FAILED for output in sequences):
            raise _incomplete()
        best = max(sequences, key=_mean_logprob) if len(sequences) > 1 else sequences[0]
        body: dict[str, Any] = {"generated_text": self._before + best.text}
        if self._options.details:
            body["details"] = self._details(best, sequences)
        return Reply([body] if self._options.listed else body, self._headers(len(best.ids), times))

    def _event(self, token: int, text: str, scored: TokenLogprob) -> dict[str, Any]:
        self._count += 1
        top = {"top_tokens": self._top_tokens(scored)} if self._top else {}
        shown = {"index": self._count, "token": self._token(token, text, scored.logprob), **top}
        return {**shown, "generated_text": None, "details": None}

    def _token(self, token: int, text: str, logprob: float) -> dict[str, Any]:
        """An end token that releases text which was held back shows that text, not its name."""
        special = token in self._served.tokenizer.special_ids and not text
        text = self._served.tokenizer.token_text(token) if special else text
        return {"id": token, "text": text, "logprob": finite_logprob(logprob), "special": special}

    def _top_tokens(self, scored: TokenLogprob) -> list[dict[str, Any]]:
        tokenizer = self._served.tokenizer
        return [
            {
                "id": token,
                "text": tokenizer.token_text(token),
                "logprob": finite_logprob(logprob),
                "special": token in tokenizer.special_ids,
            }
            for token, logprob in scored.top
        ]

    def _details(self, best: Output, sequences: Sequence[Output]) -> dict[str, Any]:
        prefill = self._prefill(sequences[0].prompt_logprobs or ())
        pairs = [*zip(sequences, self._options.seeds, strict=True)]
        details, *_ = (self._account(output, seed, prefill) for output, seed in pairs if output is best)
        if len(sequences) > 1:
            details["best_of_sequences"] = [
                {"generated_text": self._before + other.text, **self._account(other, seed, prefill)}
                for other, seed in pairs
                if other is not best
            ]
        return details

    def _account(self, output: Output, seed: int | None, prefill: LazyList[Any]) -> dict[str, Any]:
        scores = output.logprobs or ()
        top = {"top_tokens": LazyList(self._top_tokens, scores)} if self._top else {}
        pieces = [*zip(output.ids, self._pieces(output), scores, strict=True)]
        return {
            "finish_reason": _reason(output),
            "generated_tokens": len(output.ids),
            "seed": seed,
            "prefill": prefill,
            "tokens": LazyList(lambda row: self._token(row[0], row[1], row[2].logprob), pieces),
            **top,
        }

    def _prefill(self, scores: Sequence[TokenLogprob | None]) -> LazyList[tuple[int, TokenLogprob | None]]:
        """The prompt's tokens, if their log probabilities were computed."""

        def row(item: tuple[int, TokenLogprob | None]) -> dict[str, Any]:
            token, scored = item
            logprob = None if scored is None else finite_logprob(scored.logprob)
            return {"id": token, "text": self._served.tokenizer.token_text(token), "logprob": logprob}

        return LazyList(row, [*zip(self._request.prompt, scores, strict=False)])

    def _pieces(self, output: Output) -> list[str]:
        """What each token added to the text of its sequence, which a stop string may have cut."""
        stream = TextStream(self._served.tokenizer, self._request.prompt)
        pieces = [stream.push(token) for token in output.ids]
        pieces[-1] += stream.finish()
        left = len(output.text)
        for place, piece in enumerate(pieces):
            pieces[place] = piece[:left]
            left -= len(pieces[place])
        return pieces

    def _headers(self, generated: int, times: Times) -> dict[str, str]:
        """TGI's headers, times in whole milliseconds but x-compute-time, which is in seconds.

        x-queue-time is left out: when a request's turn came is not known, so x-inference-time holds its waiting too.
        """
        inference = times.ended - times.checked
        return {
            **self.headers,
            "x-compute-time": f"{times.ended - times.arrived:.6f}",
            "x-total-time": _milliseconds(times.ended - times.arrived),
            "x-validation-time": _milliseconds(times.checked - times.arrived),
            "x-inference-time": _milliseconds(inference),
            "x-time-per-token": _milliseconds(inference / generated),
            "x-prompt-tokens": str(len(self._request.prompt)),
            "x-generated-tokens": str(generated),
        }


def refused(rule: str) -> ApiError:
    """The error reply for a request that breaks a rule."""
    return ApiError("invalid", f"Input validation error: {rule}")


def _milliseconds(seconds: float) -> str:
    return str(round(1000 * seconds))


def _incomplete() -> ApiError:
    return ApiError("incomplete", "Incomplete generation")


def _reason(output: Output) -> str:
    if output.finish is FinishReason.LENGTH:
        return "length"
    return "stop_sequence" if isinstance(output.stop_reason, str) else "eos_token"


def _mean_logprob(output: Output) -> float:
    scores = output.logprobs or ()
    return sum(scored.logprob for scored in scores) / max(1, len(scores))
