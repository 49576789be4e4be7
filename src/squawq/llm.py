"""LLM: a model folder that talks. Turns text and chats into requests for the engine and its outputs into text.

Knows what a folder says of stop ids and sampling; knows no logits. Batches, pages and sampling are the engine's.
"""

from __future__ import annotations

import itertools
import operator
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
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
Texts = list[str] | tuple[str, ...]  # a text is a sequence of texts too


class LLM:
    """A folder or Hub id, loaded: 16-bit or AWQ. Raises SquawqError for what cannot be run.

    `generate` continues texts, `chat` answers messages, `stream` and `stream_chat` give one text piece by piece, and
    `complete` gives all there is to know. All may be called from several threads. Without settings a model's own
    (`sampling_defaults`) hold; keywords such as max_tokens=5 change those, SamplingParams take their place.
    config: the engine's knobs, which may also be given by name, as in threads=2 (squawq.engine.config.EngineConfig).
    Close it, or leave its `with` block, to stop its thread; its memory goes with the last reference to it.
    """

    def __init__(self, model: str | Path, config: EngineConfig | None = None, **knobs: Any) -> None:
        if config is not None and knobs:
            raise ConfigError(f"config and {next(iter(knobs))} are both given; put all knobs into one of the two")
        config = config or EngineConfig(**knobs)
        self._model = loaded = LoadedModel(model, config)
        self.folder, self.config, self.device = loaded.folder, loaded.config, config.device
        self.tokenizer = loaded.tokenizer
        self.engine: InferenceEngine = loaded.engine
        self.context = min(self.engine.max_positions, self.engine.cache_tokens)
        self._names = itertools.count()
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
        """Stop what is running and take no more. Idempotent."""
        self._close()
        self._model.close()

    def sampling_defaults(self) -> SamplingParams:
        """What generation_config.json asks for."""
        return self._model.sampling_defaults()

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
        """The text that follows a prompt, or a list of them, which run together with a bar on a terminal's stderr.

        Of n sequences the first. settings: fields of SamplingParams, as in max_tokens=5, in place of `params`.
        Raises ConfigError for what cannot be run, GenerationError for what failed.
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
        """The assistant's answer to a user's text, or to messages of {"role", "content"}, by the model's chat template;
        or to each of a list of such chats. Otherwise as `generate`."""
        if not isinstance(messages, str) and messages and all(isinstance(chat, list | tuple) for chat in messages):
            return self._texts([self._encode_chat(chat) for chat in messages], params, progress, settings)  # type: ignore[arg-type]
        return "".join(self.stream_chat(messages, params, **settings))  # type: ignore[arg-type]

    def stream(self, prompt: str, params: SamplingParams | None = None, **settings: Any) -> Generator[str]:
        """`generate` in pieces as they come, never half a character. Closing it stops the work."""
        return self._pieces(self.tokenizer.encode(prompt), self._params(params, settings))

    def stream_chat(
        self, messages: str | Chat, params: SamplingParams | None = None, **settings: Any
    ) -> Generator[str]:
        """`chat` in pieces."""
        return self._pieces(self._encode_chat(messages), self._params(params, settings))

    def generate_ids(self, ids: Sequence[int], params: SamplingParams | None = None, **settings: Any) -> Generator[int]:
        """New token ids one by one, an ending one not included.

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
        """For each prompt, a text or token ids, its n sequences: ids, text, log probabilities and why they ended.

        Tokens in log probabilities have their texts beside their ids. A sequence that failed says so in its `finish`.
        Raises ConfigError for what cannot be run.
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
        """An output whose log probabilities have texts."""
        return replace(
            output,
            logprobs=None if output.logprobs is None else tuple(map(self._with_text, output.logprobs)),
            prompt_logprobs=None
            if output.prompt_logprobs is None
            else tuple(None if item is None else self._with_text(item) for item in output.prompt_logprobs),
        )

    def _with_text(self, item: TokenLogprob) -> TokenLogprob:
        text = self.tokenizer.token_text
        return replace(item, text=text(item.token), top_texts=tuple(text(token) for token, _ in item.top))

    def _texts(
        self, prompts: list[list[int]], params: SamplingParams | None, progress: bool, settings: Mapping[str, Any]
    ) -> list[str]:
        texts = []
        one = replace(self._params(params, settings), n=1)
        for (output,) in self.complete(prompts, one, progress=progress):
            _check(output)
            texts.append(output.text)
        return texts

    def _pieces(self, ids: Sequence[int], params: SamplingParams) -> Generator[str]:
        outputs = self._outputs([ids], replace(params, n=1))  # best_of stays
        return (output.text for output in outputs if output.text)

    def _params(self, params: SamplingParams | None, settings: Mapping[str, Any]) -> SamplingParams:
        """What was asked for: SamplingParams, or the model's own with these settings changed."""
        if params is not None and not isinstance(params, SamplingParams):
            raise ConfigError(f"params is {params!r:.100}; give SamplingParams, or settings by name: max_tokens=5")
        if params is not None and settings:
            raise ConfigError(f"params and {next(iter(settings))} are both given; put all settings into one of the two")
        known = [entry.name for entry in fields(SamplingParams)]
        if unknown := next((name for name in settings if name not in known), None):
            raise ConfigError(f"there is no setting {unknown!r}; choose from {', '.join(known)}")
        return replace(self.sampling_defaults(), **settings) if params is None else params

    def _requests(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[Request]:
        try:
            whole = [[operator.index(i) for i in ids] for ids in prompts]
        except TypeError as error:
            raise ConfigError(f"a prompt must be a text or whole numbers, token ids: {error}") from error
        return [Request(f"llm-{next(self._names)}", ids, params) for ids in whole]

    def _outputs(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> Iterator[Output]:
        """Outputs as they come; a failure is raised."""
        return self._checked(self.engine.generate(self._requests(prompts, params)))

    def _checked(self, outputs: Iterator[Output]) -> Iterator[Output]:
        """A method, so that a stream keeps the model that it comes from."""
        for output in outputs:
            _check(output)
            yield output


def _check(output: Output) -> None:
    if output.finish in (FinishReason.ERROR, FinishReason.ABORT):
        raise GenerationError(f"the text was not finished: {output.stop_reason}")


@contextmanager
def _bar(total: int, wanted: bool) -> Iterator[Callable[[], None]]:
    """A bar over `total` texts on a terminal; what it gives is called at the end of each."""
    if not wanted or total < 2 or not console.is_terminal:
        yield lambda: None
        return
    done = itertools.count(1)
    with counting("generating") as update:
        update(0, total)
        yield lambda: update(next(done), total)
