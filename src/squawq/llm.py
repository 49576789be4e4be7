"""LLM, the Python API for inference: turns texts and chats into engine requests, and outputs into text."""

from __future__ import annotations

import itertools
import operator
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

from squawq.engine.config import EngineConfig
from squawq.engine.loaded_model import LoadedModel
from squawq.engine.protocol import InferenceEngine
from squawq.engine.request import FinishReason, Output, Request, SamplingParams, TokenLogprob
from squawq.engine.sequence import join
from squawq.errors import ConfigError, GenerationError
from squawq.progress import console, counting
from squawq.text.tokenizer import Message

Chat = Sequence[Message]
Texts = list[str] | tuple[str, ...]  # not Sequence[str], which a str is too


class LLM:
    """A loaded model, 16-bit or AWQ.

    `generate` continues texts, `chat` answers messages, `stream` and `stream_chat` yield one text piece by piece, and
    `complete` returns ids, log probabilities and finish reasons too. All are thread-safe. Sampling parameters are
    the model's own (`sampling_defaults`) unless given: max_tokens=5 changes one, SamplingParams replace all.
    `close`, or the end of a `with` block, stops the engine's thread.

    Args:
        model: A folder or a Hub id.
        config: Settings of the engine (squawq.engine.config.EngineConfig).
        **knobs: Fields of EngineConfig instead of `config`, as in threads=2.

    Raises:
        SquawqError: The model cannot be run.
    """

    def __init__(self, model: str | Path, config: EngineConfig | None = None, **knobs: Any) -> None:
        if config is not None and knobs:
            raise ConfigError(f"config and {next(iter(knobs))} are both given; put all fields into one of the two")
        config = config or EngineConfig(**knobs)
        self._model = loaded = LoadedModel(model, config)
        self.folder, self.config, self.device = loaded.folder, loaded.config, config.device
        self.tokenizer, self._defaults = loaded.tokenizer, loaded.sampling_defaults()
        self.engine: InferenceEngine = loaded.engine
        self.context = min(self.engine.max_positions, self.engine.cache_tokens)  # tokens
        self._request_numbers = itertools.count()
        self._close = weakref.finalize(self, self.engine.close)  # at the interpreter's end too

    def __repr__(self) -> str:
        config, bits = self.config, 16 if self.config.quant is None else self.config.quant.bits
        kind = f"{config.model_type}, {config.num_layers} layers, {bits}-bit"
        name = self.folder.resolve().name
        return f"<squawq.LLM {name!r}: {kind}, context of {self.context:,} tokens, on {self.device}>"

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Abort running requests and stop the engine. Idempotent."""
        self._close()
        self._model.close()

    def sampling_defaults(self) -> SamplingParams:
        """The model's own, from its generation_config.json."""
        return self._defaults

    @overload
    def generate(
        self, prompt: str, params: SamplingParams | None = None, *, progress: bool = True, **settings: Any
    ) -> str: ...
    @overload
    def generate(
        self, prompt: Texts, params: SamplingParams | None = None, *, progress: bool = True, **settings: Any
    ) -> list[str]: ...
    def generate(
        self, prompt: str | Texts, params: SamplingParams | None = None, *, progress: bool = True, **settings: Any
    ) -> str | list[str]:
        """Continue a prompt, or a list of prompts as one batch.

        Args:
            prompt: A text, or a list of texts.
            params: Sampling parameters. With n > 1 the first sequence is returned.
            progress: Show a progress bar for a list, on a terminal's stderr.
            **settings: Fields of SamplingParams instead of `params`, as in max_tokens=5.

        Raises:
            ConfigError: A request can never be run.
            GenerationError: A request failed.
        """
        if isinstance(prompt, str):
            return "".join(self.stream(prompt, params, **settings))
        return self._texts([self.tokenizer.encode(text) for text in prompt], params, progress, settings)

    @overload
    def chat(
        self, messages: str | Chat, params: SamplingParams | None = None, *, progress: bool = True, **settings: Any
    ) -> str: ...
    @overload
    def chat(
        self, messages: Sequence[Chat], params: SamplingParams | None = None, *, progress: bool = True, **settings: Any
    ) -> list[str]: ...
    def chat(
        self,
        messages: str | Chat | Sequence[Chat],
        params: SamplingParams | None = None,
        *,
        progress: bool = True,
        **settings: Any,
    ) -> str | list[str]:
        """Answer a user's text, a chat (messages of {"role", "content"}), or each of a list of chats.

        Otherwise like `generate`.
        """
        if not isinstance(messages, str) and messages and all(isinstance(chat, list | tuple) for chat in messages):
            return self._texts([self._encode_chat(chat) for chat in messages], params, progress, settings)  # type: ignore[arg-type]
        return "".join(self.stream_chat(messages, params, **settings))  # type: ignore[arg-type]

    def stream(self, prompt: str, params: SamplingParams | None = None, **settings: Any) -> Generator[str]:
        """Yield the text of `generate` as it comes, never half a character. Closing the iterator aborts the request."""
        return self._pieces(self.tokenizer.encode(prompt), self._params(params, settings))

    def stream_chat(
        self, messages: str | Chat, params: SamplingParams | None = None, **settings: Any
    ) -> Generator[str]:
        """Yield the text of `chat` as it comes."""
        return self._pieces(self._encode_chat(messages), self._params(params, settings))

    def stream_outputs(self, ids: Sequence[int], params: SamplingParams | None = None) -> Generator[Output]:
        """Yield the outputs of one sequence as they come: new ids, text, and in the last one the finish reason.

        Args:
            ids: The prompt, such as `tokenizer.encode_chat(messages)`.
            params: Sampling parameters; n is taken as 1.

        Raises:
            ConfigError: The request can never be run.
            GenerationError: It failed.
        """
        return self._outputs([ids], replace(self._params(params, {}), n=1))

    def generate_ids(self, ids: Sequence[int], params: SamplingParams | None = None, **settings: Any) -> Generator[int]:
        """Yield new token ids, without the end token.

        Stops at the model's last position. Raises ConfigError for an empty prompt or one without room for a token.
        """
        params = replace(self._params(params, settings), n=1)
        ending = {*params.stop_ids, *(() if params.ignore_eos else self._model.eos_ids)}
        outputs = self._outputs([ids], params)
        return (token for output in outputs for token in output.ids if token not in ending)

    def complete(
        self,
        prompts: Sequence[str | Sequence[int]],
        params: SamplingParams | None = None,
        *,
        progress: bool = True,
        **settings: Any,
    ) -> list[list[Output]]:
        """Return n sequences for each prompt (text or token ids): ids, text, log probabilities and finish reason.

        Log probabilities include the texts of their tokens. A failed sequence has the finish reason "error".
        Raises ConfigError for a prompt that cannot be run.
        """
        if isinstance(prompts, str):
            raise ConfigError("prompts is one text; give a list of texts or of lists of token ids")
        params = self._params(params, settings)
        ids = [self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
        requests = self._requests(ids, params)
        found: dict[tuple[str, int], list[Output]] = {
            (request.id, index): [] for request in requests for index in range(params.n)
        }
        outputs = self.engine.generate(requests)
        with _bar(len(found), progress) as ended:
            for output in outputs:
                found[output.request, output.index].append(output)
                if output.finish:
                    ended()
        joined = [[join(found[request.id, index]) for index in range(params.n)] for request in requests]
        return [[self._with_texts(output) for output in sequences] for sequences in joined]

    def _encode_chat(self, messages: str | Chat) -> list[int]:
        return self.tokenizer.encode_chat(
            [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        )

    def _with_texts(self, output: Output) -> Output:
        """The output, with the texts of the tokens in its log probabilities."""
        found, prompt = output.logprobs, output.prompt_logprobs
        scores = None if prompt is None else tuple(item and self._with_text(item) for item in prompt)
        return replace(output, logprobs=found and tuple(map(self._with_text, found)), prompt_logprobs=scores)

    def _with_text(self, item: TokenLogprob) -> TokenLogprob:
        text = self.tokenizer.token_text
        return replace(item, text=text(item.token), top_texts=tuple(text(token) for token, _ in item.top))

    def _texts(
        self, prompts: list[list[int]], params: SamplingParams | None, progress: bool, settings: Mapping[str, Any]
    ) -> list[str]:
        one = replace(self._params(params, settings), n=1)
        return [_checked(output).text for (output,) in self.complete(prompts, one, progress=progress)]

    def _pieces(self, ids: Sequence[int], params: SamplingParams) -> Generator[str]:
        outputs = self._outputs([ids], replace(params, n=1))  # best_of is kept
        return (output.text for output in outputs if output.text)

    def _params(self, params: SamplingParams | None, settings: Mapping[str, Any]) -> SamplingParams:
        """The given SamplingParams, or the model's defaults with these settings changed."""
        if params is not None and not isinstance(params, SamplingParams):
            raise ConfigError(f"params is {params!r:.100}; give SamplingParams, or settings by name: max_tokens=5")
        if params is not None and settings:
            raise ConfigError(f"params and {next(iter(settings))} are both given; put all settings into one of the two")
        return replace(self._defaults, **settings) if params is None else params

    def _requests(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[Request]:
        try:
            whole = [[operator.index(i) for i in ids] for ids in prompts]
        except TypeError as error:
            raise ConfigError(f"a prompt must be a text or whole numbers, token ids: {error}") from error
        return [Request(f"llm-{next(self._request_numbers)}", ids, params) for ids in whole]

    def _outputs(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> Generator[Output]:
        """Yield outputs as they come; raises GenerationError for a failed one."""
        return self._run(self.engine.generate(self._requests(prompts, params)))

    def _run(self, outputs: Iterator[Output]) -> Generator[Output]:
        """`_checked` outputs. Not a function: `self` keeps the model alive while a stream is open."""
        for output in outputs:
            yield _checked(output)


def _checked(output: Output) -> Output:
    if output.finish in (FinishReason.ERROR, FinishReason.ABORT):
        raise GenerationError(f"the text was not finished: {output.stop_reason}")
    return output


@contextmanager
def _bar(total: int, wanted: bool) -> Iterator[Callable[[], None]]:
    """A progress bar over `total` texts, on a terminal; yields a callback for the end of each."""
    if not wanted or total < 2 or not console.is_terminal:
        yield lambda: None
        return
    done = itertools.count(1)
    with counting("generating") as update:
        update(0, total)
        yield lambda: update(next(done), total)
