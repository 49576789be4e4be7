"""Opens a model folder for LLM, serve and bench: config, tokenizer, chat template, sampling defaults and engine."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from squawq.backends.devices import check_device
from squawq.config import ModelConfig
from squawq.decoder_support import check_decoder, decoder_declines
from squawq.engine.config import EngineConfig
from squawq.engine.engine import Engine
from squawq.engine.generation_config import GenerationConfig
from squawq.engine.protocol import InferenceEngine
from squawq.engine.request import SamplingParams
from squawq.engine.runner import DecoderRunner, load_runner
from squawq.engine.transformers_runner import TransformersRunner, load_transformers
from squawq.errors import ConfigError
from squawq.format.files import has_file, read_config, read_text
from squawq.hub.download import resolve, resolve_small
from squawq.nn.cache import Cache
from squawq.text.template_process import TIMEOUT_S, TemplateProcess
from squawq.text.tokenizer import Tokenizer


class LoadedModel:
    """A model folder or Hub id, loaded, with its engine running until `close`.

    Args:
        revision: Branch, tag or commit on the Hub.
        tokenizer: A folder or Hub id whose tokenizer replaces the model's own.
        chat_template: A jinja file that replaces the model's own templates.
        text: Load the tokenizer; without it the engine takes token ids only.
        generation_config: Source of sampling defaults: "auto" (the model), "vllm" (none), or a folder.

    Attributes:
        chat_template, tool_template: jinja sources, the second for chats with tools; None where there is none.

    Raises:
        SquawqError: The model cannot be run.
    """

    def __init__(
        self,
        model: str | Path,
        config: EngineConfig | None = None,
        *,
        revision: str | None = None,
        tokenizer: str | Path | None = None,
        chat_template: Path | None = None,
        generation_config: str = "auto",
        text: bool = True,
    ) -> None:
        config = config or EngineConfig()
        check_device(config.device)
        self.folder = resolve(model, revision=revision)
        source = self.folder if tokenizer is None else resolve_small(tokenizer)
        template = None if chat_template is None else read_text(chat_template.resolve())
        with ThreadPoolExecutor(1) as pool:  # testing a large tokenizer takes seconds: meanwhile the weights are read
            pending = pool.submit(Tokenizer, source) if text else None
            self._runner = runner = _load(self.folder, config) if config.engine == "squawq" else None
            self.config = runner.config if runner is not None else ModelConfig.from_dict(read_config(self.folder))
            try:
                self._tokenizer = pending.result() if pending else None
                own = self._tokenizer if template is None else None
                self.chat_template = own.chat_template if own else template
                self.tool_template = own.tool_template if own else None
                self._generation_config = self._read_generation_config(generation_config)
                self._defaults = generation_config != "vllm"
                self.eos_ids = self._generation_config.eos_ids
                self.engine = self._engine(config)
            except BaseException:
                if runner is not None:
                    runner.close()
                raise

    def _engine(self, config: EngineConfig) -> InferenceEngine:
        if self._runner is not None:
            return Engine(self._runner, self._tokenizer, config, eos_ids=self.eos_ids)
        from squawq.engine.vllm import VllmEngine

        return VllmEngine(self.folder, config, self.config, self._tokenizer, eos_ids=self.eos_ids)

    @property
    def cache_bytes(self) -> int:
        """Memory of the full KV cache; of another engine's as if it were in 16 bits."""
        if self._runner is not None:
            return self._runner.cache_bytes
        return self.engine.cache_tokens * Cache.token_bytes(self.config)

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises ConfigError for a model that was loaded without one."""
        if self._tokenizer is None:
            raise ConfigError(f"{self.folder}: was loaded without its tokenizer; load it with text=True")
        return self._tokenizer

    def sampling_defaults(self) -> SamplingParams:
        """What generation_config.json asks for."""
        return self._generation_config.sampling_defaults() if self._defaults else SamplingParams()

    def template_process(self, timeout_s: float = TIMEOUT_S) -> TemplateProcess | None:
        """A new process that renders the chat template; None for a model without one."""
        if self.chat_template is None:
            return None
        variables = self.tokenizer.template_variables()
        return TemplateProcess(self.chat_template, variables, tool_template=self.tool_template, timeout_s=timeout_s)

    def close(self) -> None:
        """Abort all requests and end the engine's thread and all processes. Idempotent."""
        self.engine.close()
        if self._runner is not None:
            self._runner.close()
        if self._tokenizer is not None:
            self._tokenizer.close()

    def _read_generation_config(self, source: str) -> GenerationConfig:
        """The model's, or a folder's. The end tokens are the model's with "vllm", too."""
        if source in ("auto", "vllm"):
            return GenerationConfig(self.folder, self.config)
        if not has_file(Path(source) / "generation_config.json"):
            raise ConfigError(
                f"generation_config is {source!r}, which is no folder with a generation_config.json; "
                "give one, or auto or vllm"
            )
        return GenerationConfig(Path(source), self.config)


def why_transformers(model: ModelConfig, config: EngineConfig) -> str | None:
    """Why a model runs on transformers' model class, by `model_impl`; None where it runs on our decoder.

    Raises:
        ConfigError: `model_impl` is "squawq", and our decoder does not run the model; or processes should share a model
            of transformers' class.
    """
    if config.model_impl == "squawq":
        check_decoder(model)
        return None
    reason = "model_impl is transformers" if config.model_impl == "transformers" else decoder_declines(model)
    if reason is not None and config.tensor_parallel_size > 1:
        raise ConfigError(
            f"tensor_parallel_size is {config.tensor_parallel_size}, but transformers' model runs this one "
            f"({reason}), which one process has all of; leave it out"
        )
    return reason


def _load(folder: Path, config: EngineConfig) -> DecoderRunner | TransformersRunner:
    reason = why_transformers(ModelConfig.from_dict(read_config(folder), str(folder / "config.json")), config)
    return load_runner(folder, config) if reason is None else load_transformers(folder, config, reason)
