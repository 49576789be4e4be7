"""LLM: a model folder that talks. Turns text and chats into requests for the engine and its outputs into text.

Knows what a folder says of stop ids and sampling; knows no logits. Batches, pages and sampling are the engine's.
"""

from __future__ import annotations

import itertools
import operator
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import overload

from squawq.engine.engine import Engine
from squawq.engine.generation_config import GenerationConfig
from squawq.engine.request import FinishReason, Output, Request, SamplingParams
from squawq.engine.runner import load_runner
from squawq.engine.sequence import join
from squawq.errors import ConfigError, GenerationError
from squawq.hub.download import resolve
from squawq.kernels.devices import check_device
from squawq.progress import console, counting
from squawq.tokenizer import Message, Tokenizer

Chat = Sequence[Message]
Texts = list[str] | tuple[str, ...]  # a text is a sequence of texts too


class LLM:
    """A folder or Hub id, loaded: 16-bit or AWQ. Raises SquawqError for what cannot be run.

    `generate` continues texts, `chat` answers messages, `stream` and `stream_chat` give one text piece by piece, and
    `complete` gives all there is to know. All may be called from several threads. Without settings a model's own
    (`sampling_defaults`) hold. threads, exact, head, kv_tokens: see `squawq.engine.runner.load_runner`.
    Close it, or leave its `with` block, to stop its thread; its memory goes with the last reference to it.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        device: str = "cpu",
        threads: int | None = None,
        exact: bool = False,
        head: str | None = None,
        kv_tokens: int | None = None,
    ) -> None:
        check_device(device)
        self.folder = resolve(model)
        self.tokenizer = Tokenizer(self.folder)
        runner = load_runner(self.folder, device=device, threads=threads, exact=exact, head=head, kv_tokens=kv_tokens)
        self.config = runner.config
        self._generation_config = GenerationConfig(self.folder, self.config)
        self._eos_ids = self._generation_config.eos_ids
        self.engine = Engine(runner, self.tokenizer, eos_ids=sorted(self._eos_ids))
        self._names = itertools.count()
        self._close = weakref.finalize(self, self.engine.close)  # at the interpreter's end too

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop what is running and take no more. Idempotent."""
        self._close()
        self.tokenizer.close()

    def sampling_defaults(self) -> SamplingParams:
        """What generation_config.json asks for."""
        return self._generation_config.sampling_defaults()

    @overload
    def generate(self, prompt: str, params: SamplingParams | None = None, *, progress: bool = True) -> str: ...
    @overload
    def generate(self, prompt: Texts, params: SamplingParams | None = None, *, progress: bool = True) -> list[str]: ...
    def generate(
        self, prompt: str | Texts, params: SamplingParams | None = None, *, progress: bool = True
    ) -> str | list[str]:
        """The text that follows a prompt, or a list of them, which run together with a bar on a terminal's stderr.

        Of n sequences the first. Raises ConfigError for what cannot be run, GenerationError for what failed.
        """
        if isinstance(prompt, str):
            return "".join(self.stream(prompt, params))
        return self._texts([self.tokenizer.encode(text) for text in prompt], params, progress)

    @overload
    def chat(self, messages: Chat, params: SamplingParams | None = None, *, progress: bool = True) -> str: ...
    @overload
    def chat(
        self, messages: Sequence[Chat], params: SamplingParams | None = None, *, progress: bool = True
    ) -> list[str]: ...
    def chat(
        self, messages: Chat | Sequence[Chat], params: SamplingParams | None = None, *, progress: bool = True
    ) -> str | list[str]:
        """The assistant's answer to messages of {"role", "content"} by the model's chat template, or to each of a list
        of such chats. Otherwise as `generate`."""
        if messages and all(isinstance(chat, list | tuple) for chat in messages):
            return self._texts([self.tokenizer.encode_chat(chat) for chat in messages], params, progress)  # type: ignore[arg-type]
        return "".join(self.stream_chat(messages, params))  # type: ignore[arg-type]

    def stream(self, prompt: str, params: SamplingParams | None = None) -> Generator[str]:
        """`generate` in pieces as they come, never half a character. Closing it stops the work."""
        return self._pieces(self.tokenizer.encode(prompt), params)

    def stream_chat(self, messages: Chat, params: SamplingParams | None = None) -> Generator[str]:
        """`chat` in pieces."""
        return self._pieces(self.tokenizer.encode_chat(messages), params)

    def generate_ids(self, ids: Sequence[int], params: SamplingParams | None = None) -> Generator[int]:
        """New token ids one by one, an ending one not included.

        Stops at the model's last position. Raises ConfigError for an empty prompt or one without room for a token.
        """
        params = self._one(params)
        ending = {*params.stop_ids, *(() if params.ignore_eos else self._eos_ids)}
        outputs = self._outputs([ids], params)
        return (token for output in outputs for token in output.ids if token not in ending)

    def complete(
        self,
        prompts: Sequence[str | Sequence[int]],
        params: SamplingParams | None = None,
        *,
        progress: bool = True,
    ) -> list[list[Output]]:
        """For each prompt, a text or token ids, its n sequences: ids, text, log probabilities and why they ended.

        A sequence that failed says so in its `finish`. Raises ConfigError for what cannot be run.
        """
        if isinstance(prompts, str):
            raise ConfigError("prompts is one text; give a list of texts or of lists of token ids")
        params = self.sampling_defaults() if params is None else params
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
        return [[join(found[request.id, index]) for index in range(params.n)] for request in requests]

    def _texts(self, prompts: list[list[int]], params: SamplingParams | None, progress: bool) -> list[str]:
        texts = []
        for (output,) in self.complete(prompts, self._one(params), progress=progress):
            _check(output)
            texts.append(output.text)
        return texts

    def _pieces(self, ids: Sequence[int], params: SamplingParams | None) -> Generator[str]:
        outputs = self._outputs([ids], self._one(params))
        return (output.text for output in outputs if output.text)

    def _one(self, params: SamplingParams | None) -> SamplingParams:
        """The settings for who wants one text; best_of stays."""
        params = self.sampling_defaults() if params is None else params
        return replace(params, n=1)

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
