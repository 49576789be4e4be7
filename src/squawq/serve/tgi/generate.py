"""TGI's own routes: /, /generate, /generate_stream, /tokenize and /info. Turns bodies into engine requests, with TGI's
rules and error messages, and their outputs into replies and stream events.

A token's text is what it adds to the generated text, which is the texts of all tokens that are not special, joined. The
first tokens of a character add nothing, the last one adds all of it. A special token's text is its name.

Differences from TGI: unsupported fields (watermark, adapters) are refused; all of max_new_tokens counts against the
context, where TGI counts 1024 at most and lets the rest fail later; log probabilities are the raw model's, before
penalties and temperature.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Annotated, Any, Literal

from pydantic import Field

from squawq import __version__
from squawq.engine.request import FinishReason, Grammar, Output, Request, SamplingParams, TokenLogprob
from squawq.errors import ConfigError
from squawq.serve.errors import ApiError
from squawq.serve.fields import Body, Many, validate
from squawq.serve.http import LazyList, finite_logprob
from squawq.serve.metrics import Timing
from squawq.serve.model import Served
from squawq.serve.runtime import Reply
from squawq.serve.settings import ServerSettings
from squawq.serve.tools.grammar import tgi_grammar
from squawq.text.tokenizer import TextStream

FAILED = (FinishReason.ABORT, FinishReason.ERROR)


class Parameters(Body):
    """TGI's generation parameters. Decoding is greedy unless do_sample, a temperature other than 1, top_k, top_p or
    typical_p asks for sampling.

    Attributes:
        max_new_tokens: Without it, up to the context length.
        truncate: Keep this many tokens at the end of the inputs.
        stop: Strings that end the text, and stay in it.
    """

    best_of: int | None = None
    temperature: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    typical_p: float | None = None
    do_sample: bool = False
    max_new_tokens: int | None = None
    return_full_text: bool | None = None
    stop: Many[str] = Field(default_factory=list)
    truncate: int | None = None
    watermark: Literal[False] = False
    details: bool = False
    decoder_input_details: bool = False
    seed: Annotated[int, Field(ge=0, le=2**64 - 1)] | None = None
    top_n_tokens: int | None = None
    grammar: dict[str, Any] | None = None

    @property
    def sampled(self) -> bool:
        narrowed = any(value is not None for value in (self.top_k, self.top_p, self.typical_p))
        return self.do_sample or self.temperature not in (None, 1.0) or narrowed

    @property
    def detailed(self) -> bool:
        return self.details or self.decoder_input_details


class GenerateBody(Body):
    """The body of /, /generate, /generate_stream and /tokenize. Without parameters, tokens are sampled.

    Only / reads `stream`.
    """

    inputs: str
    parameters: Parameters = Parameters(do_sample=True)
    stream: bool = False


def generate(raw: Mapping[str, Any], served: Served, tenant: str = "", *, stream: bool, compat: bool) -> GenerateCall:
    """Parse a generate request. Raises ApiError.

    stream: whether the route streams. compat: for /: the body says whether to stream, a reply is a list of one, and the
    text begins with the inputs unless return_full_text is false.
    """
    body = validate(GenerateBody, raw, strict=served.settings.strict_fields)
    parameters = body.parameters
    if body.stream and not (compat or stream):
        raise refused("`stream` is true; use /generate_stream")
    stream = body.stream if compat else stream
    _check_parameters(parameters, served.settings, stream)
    if not body.inputs:
        raise refused("`inputs` cannot be empty")
    ids = _prompt(body, served)
    seeds = _seeds(parameters, served.engine.draw_seed)
    shown = stream or parameters.detailed
    limit = served.limit_by_logprobs(
        len(ids) * len(seeds) if parameters.decoder_input_details else 0,
        len(seeds) * ((parameters.top_n_tokens or 0) + 1) if shown else 0,
        _max_new_tokens(len(ids), parameters.max_new_tokens, served),
        asked=parameters.max_new_tokens is not None,
    )
    name, requests = f"tgi-{uuid.uuid4().hex}", []
    for number, seed in enumerate(seeds):
        scored = parameters.decoder_input_details and number == 0
        params = _sampling(parameters, limit, seed, shown=shown, scored=scored)
        requests.append(Request(f"{name}-{number}", ids, params, tenant))
    if params.grammar is not None and not served.settings.grammar_support:
        raise refused("grammar is not supported")
    return GenerateCall(body, served, requests, seeds, stream=stream, compat=compat)


def tokens(raw: Mapping[str, Any], served: Served) -> list[dict[str, Any]]:
    """The reply of /tokenize: the inputs' tokens, truncated, with their byte offsets in the inputs' UTF-8.

    Raises ApiError.
    """
    body = validate(GenerateBody, raw, strict=served.settings.strict_fields)
    keep = _truncate(body.parameters, served)
    return _places(body.inputs, served, special=True)[-keep if keep else 0 :]


def chat_tokens(text: str, served: Served) -> list[dict[str, Any]]:
    """`tokens` for a rendered chat, whose template has written the special tokens."""
    return _places(text, served, special=False)


def info(served: Served) -> dict[str, Any]:
    settings = served.settings
    return {
        "model_id": served.name,
        "model_sha": None,
        "model_pipeline_tag": "text-generation",
        "max_concurrent_requests": settings.max_concurrent,
        "max_best_of": settings.max_best_of,
        "max_stop_sequences": settings.max_stop_sequences,
        "max_input_tokens": served.max_input,
        "max_total_tokens": served.max_len,
        "validation_workers": settings.validation_workers,
        "max_client_batch_size": settings.max_client_batch,
        "router": "text-generation-router",  # TGI's name: what tells clients that these routes are there
        "version": __version__,
        "sha": None,
        "docker_label": None,
    }


def _above(value: float | None, least: float) -> bool:
    return value is None or value > least


def _inside(value: float | None) -> bool:
    return value is None or 0 < value < 1


def _check_parameters(given: Parameters, settings: ServerSettings, stream: bool) -> None:
    """Raise ApiError for the first of TGI's rules that is broken, except those on lengths."""
    best_of = 1 if given.best_of is None else given.best_of
    top_n, stops = given.top_n_tokens or 0, len(given.stop)
    most_best, most_stops, most_top = settings.max_best_of, settings.max_stop_sequences, settings.max_top_n_tokens
    several = best_of > 1
    rules = (
        (best_of == 1 or most_best > 1, "`best_of` != 1 is not allowed for this endpoint"),
        (0 < best_of <= most_best, f"`best_of` must be > 0 and <= {most_best}. Given: {best_of}"),
        (not (several and stream), "`best_of` != 1 is not supported when streaming tokens"),
        (
            not (given.decoder_input_details and stream),
            "`decoder_input_details` == true is not supported when streaming tokens",
        ),
        (not several or given.sampled, "you must use sampling when `best_of` is > 1"),
        (_above(given.temperature, 0), "`temperature` must be strictly positive"),
        (_above(given.repetition_penalty, 0), "`repetition_penalty` must be strictly positive"),
        (-2 <= (given.frequency_penalty or 0) <= 2, "`frequency_penalty` must be >= -2.0 and <= 2.0"),
        (_inside(given.top_p), "`top_p` must be > 0.0 and < 1.0"),
        (_inside(given.typical_p), "`typical_p` must be > 0.0 and < 1.0"),
        (_above(given.top_k, 0), "`top_k` must be strictly positive"),
        (_above(given.max_new_tokens, 0), "`max_new_tokens` must be strictly positive"),
        (stops <= most_stops, f"`stop` supports up to {most_stops} stop sequences. Given: {stops}"),
        (not several or given.seed is None, "`seed` must not be set when `best_of` > 1"),
        (0 <= top_n <= most_top, f"`top_n_tokens` must be >= 0 and <= {most_top}. Given: {top_n}"),
    )
    for holds, rule in rules:
        if not holds:
            raise refused(rule)


def _truncate(given: Parameters, served: Served) -> int | None:
    """The number of tokens to keep of the inputs; None for all."""
    keep = given.truncate
    if keep is not None and not 0 < keep <= served.max_input:
        raise refused(f"`truncate` must be strictly positive and less than {served.max_input}. Given: {keep}")
    return keep


def _prompt(body: GenerateBody, served: Served) -> list[int]:
    """Token ids of the inputs, truncated; a begin token counts."""
    keep = _truncate(body.parameters, served)
    if not keep:
        served.prompt_limits.check_text(body.inputs, "inputs")
    return served.encode(body.inputs)[-keep if keep else 0 :]


def _max_new_tokens(count: int, wanted: int | None, served: Served) -> int:
    """The largest number of new tokens after `count` tokens of inputs."""
    if wanted is not None and count + wanted > served.max_len:
        raise refused(
            f"`inputs` tokens + `max_new_tokens` must be <= {served.max_len}. "
            f"Given: {count} `inputs` tokens and {wanted} `max_new_tokens`"
        )
    if count > served.max_input:
        raise refused(f"`inputs` must have less than {served.max_input} tokens. Given: {count}")
    return served.max_len - count if wanted is None else wanted


def _seeds(given: Parameters, draw: Callable[[], int]) -> list[int | None]:
    """The seed of each of best_of sequences; None for greedy decoding."""
    if not given.sampled:
        return [None]
    return [draw() if given.seed is None else given.seed for _ in range(given.best_of or 1)]


def _sampling(given: Parameters, max_tokens: int, seed: int | None, *, shown: bool, scored: bool) -> SamplingParams:
    """Sampling parameters of one sequence. shown: the reply lists tokens; scored: it lists the prompt's as well."""
    best_of = given.best_of or 1
    top_n = (given.top_n_tokens or 0) if shown else 0
    try:
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=(given.temperature or 1.0) if given.sampled else 0.0,
            top_k=given.top_k or 0,
            top_p=given.top_p or 1.0,
            typical_p=given.typical_p or 1.0,
            repetition_penalty=given.repetition_penalty or 1.0,
            frequency_penalty=given.frequency_penalty or 0.0,
            seed=None if seed is None else seed & (2**63 - 1),
            stop=given.stop,
            include_stop=True,
            logprobs=top_n if shown or best_of > 1 else None,
            prompt_logprobs=0 if scored else None,
            grammar=_grammar(given.grammar),
        )
    except ConfigError as error:
        raise refused(str(error)) from error


def _grammar(value: Mapping[str, Any] | None) -> Grammar | None:
    try:
        return None if value is None else tgi_grammar(value)
    except ApiError as error:
        raise refused(f"grammar is not valid: {error.message}") from error


def _places(text: str, served: Served, special: bool) -> list[dict[str, Any]]:
    """Tokens with their place in the text. A token of a part of a character has the whole character's."""
    served.check_listed(len(served.encode(text, special)))  # counting takes a tenth of what places take
    places = served.tokenizer.places(text, special)
    at = list(accumulate((len(character.encode()) for character in text), initial=0))
    return [
        {"id": token, "text": text[start:stop], "start": at[start], "stop": at[stop]} for token, (start, stop) in places
    ]


class GenerateCall:
    """A request on TGI's routes (runtime.Call).

    Each of best_of sequences is a request of its own, with its seed; None for greedy decoding. compat: see `generate`.
    """

    def __init__(
        self,
        body: GenerateBody,
        served: Served,
        requests: Sequence[Request],
        seeds: Sequence[int | None],
        *,
        stream: bool,
        compat: bool,
    ) -> None:
        self.requests = requests
        self.stream = stream
        self.headers: Mapping[str, str] = {
            "x-compute-type": served.settings.device,
            "x-compute-characters": str(len(body.inputs)),
        }
        self._request = request = requests[0]
        self._served, self._seeds, self._listed = served, seeds, compat
        full = body.parameters.return_full_text
        self._before = body.inputs if (compat if full is None else full) else ""
        self._detailed = body.parameters.detailed
        self._top = bool(request.params.logprobs)
        self._texts: list[str] = []
        self._count = 0

    def invalid(self, error: ConfigError) -> ApiError:
        """The engine's message, in TGI's form."""
        return refused(f"grammar is not valid: {error}" if self._request.params.grammar else str(error))

    def push(self, output: Output) -> Sequence[object]:
        """One event per token. The last has the whole text, and details if the client asked for them."""
        if output.finish in FAILED:
            return self.fail(_incomplete())
        self._texts.append(output.text)
        texts = [*[""] * (len(output.ids) - 1), output.text]
        events = [self._event(*token) for token in zip(output.ids, texts, output.logprobs or (), strict=True)]
        if output.finish:
            events[-1]["generated_text"] = self._before + "".join(self._texts)
            if self._detailed:
                events[-1]["details"] = {
                    "finish_reason": _reason(output),
                    "generated_tokens": self._count,
                    "seed": self._seeds[0],
                    "input_length": len(self._request.prompt),
                }
        return events

    def end(self) -> Sequence[object]:
        """Nothing: TGI's own streams have no end mark."""
        return []

    def fail(self, error: ApiError) -> Sequence[object]:
        return [error.body(tgi=True)]

    def reply(self, outputs: Sequence[Sequence[Output]], timing: Timing, /) -> Reply:
        """The sequence with the highest mean log probability; the others are in its details."""
        sequences = [output for (output,) in outputs]
        if any(output.finish in FAILED for output in sequences):
            raise _incomplete()
        best = max(sequences, key=_mean_logprob) if len(sequences) > 1 else sequences[0]
        body: dict[str, Any] = {"generated_text": self._before + best.text}
        if self._detailed:
            body["details"] = self._details(best, sequences)
        return Reply([body] if self._listed else body, self._headers(len(best.ids), timing))

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
            self._token(token, "", logprob) | {"text": tokenizer.token_text(token)} for token, logprob in scored.top
        ]

    def _details(self, best: Output, sequences: Sequence[Output]) -> dict[str, Any]:
        prefill = self._prefill(sequences[0].prompt_logprobs or ())
        pairs = [*zip(sequences, self._seeds, strict=True)]
        details, *_ = (self._sequence_details(output, seed, prefill) for output, seed in pairs if output is best)
        if len(sequences) > 1:
            details["best_of_sequences"] = [
                {"generated_text": self._before + other.text, **self._sequence_details(other, seed, prefill)}
                for other, seed in pairs
                if other is not best
            ]
        return details

    def _sequence_details(self, output: Output, seed: int | None, prefill: LazyList[Any]) -> dict[str, Any]:
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

    def _headers(self, generated: int, timing: Timing) -> dict[str, str]:
        """TGI's headers, times in whole milliseconds but x-compute-time, which is in seconds.

        x-queue-time is left out: when a request's turn came is not known, so x-inference-time holds its waiting too.
        """
        total, inference = timing.ended - timing.arrived, timing.ended - (timing.validated or timing.ended)
        return {
            **self.headers,
            "x-compute-time": f"{total:.6f}",
            "x-total-time": _milliseconds(total),
            "x-validation-time": _milliseconds(total - inference),
            "x-inference-time": _milliseconds(inference),
            "x-time-per-token": _milliseconds(inference / generated),
            "x-prompt-tokens": str(len(self._request.prompt)),
            "x-generated-tokens": str(generated),
        }


def refused(rule: str) -> ApiError:
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
