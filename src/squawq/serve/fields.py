"""Request bodies: strict types, bounded errors, and what happens to fields that no class here has.

A field whose meaning this server does not support is refused where ignoring it would change the answer. A client's
bookkeeping, a no-op value and an unknown field are accepted and ignored, as vLLM and TGI do; `--strict-fields` refuses
them. A key whose value is null counts as absent.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Container, Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, model_validator
from pydantic_core import PydanticCustomError, from_json

from squawq.serve.errors import ApiError
from squawq.serve.logs import event

logger = logging.getLogger("squawq.serve")
Model = TypeVar("Model", bound="Body")
Item = TypeVar("Item")
Many = Annotated[list[Item], Field(fail_fast=True)]  # a million wrong items are one error, not a minute's work
Count = Annotated[int, Field(ge=0, le=2**31 - 1)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
MAX_LOGGED = 100  # field names per process
MAX_ERRORS = 5
MAX_KEYS = 1024  # of an object in a body; each unknown key is an error
STRICT = {"strict_fields": True}

_LORA = "adapters (LoRA) are not supported"
_OUTPUTS = "use structured_outputs or response_format"
_TEXT = "this server reads and writes text only"
_SAMPLER = "this sampler is not supported"
_CODE = "no code of a request is run"
_LENGTH = "use max_tokens"
REFUSED = {
    "adapter_id": _LORA,
    "audio": _TEXT,
    "best_of": "use n",
    "chat_template": "a template in a request is not rendered; the server's model has its own",
    "custom_logit_processor": _CODE,
    "documents": "put documents into the messages",
    "dry_multiplier": _SAMPLER,
    "dynatemp_range": _SAMPLER,
    "ebnf": _OUTPUTS,
    "extra_body": "put its fields into the body itself",
    "format": "use response_format",
    "function_call": "use tools and tool_choice",
    "functions": "use tools",
    "grammar": _OUTPUTS,
    "guided_whitespace_pattern": "white space in JSON is fixed",
    "json_schema": _OUTPUTS,
    "kv_transfer_params": "there is one engine, with nothing to transfer",
    "logits_processors": _CODE,
    "logprob_token_ids": "use logprobs",
    "lora_path": _LORA,
    "max_length": "use max_tokens, or TGI's max_new_tokens",
    "max_new_tokens": _LENGTH,
    "media_io_kwargs": _TEXT,
    "min_new_tokens": "use min_tokens",
    "mirostat": _SAMPLER,
    "mm_processor_kwargs": "this server reads text only",
    "modalities": _TEXT,
    "n_predict": _LENGTH,
    "n_probs": "use logprobs",
    "no_stop_trim": "use include_stop_str_in_output",
    "num_beams": "beam search is not supported",
    "num_predict": _LENGTH,
    "options": "put sampling fields into the body itself, under OpenAI's names",
    "prefix": "use continue_final_message",
    "prompt_embeds": "give text or token ids",
    "regex": _OUTPUTS,
    "repeat_penalty": "use repetition_penalty",
    "repetition_detection": "use stop or max_tokens",
    "return_hidden_states": "hidden states are not returned",
    "stop_regex": "use stop",
    "structural_tag": "use response_format",
    "thinking_budget": "thinking has no budget of its own here; use max_tokens",
    "thinking_token_budget": "thinking has no budget of its own here; use max_tokens",
    "top_a": _SAMPLER,
    "top_n_sigma": _SAMPLER,
    "vllm_xargs": "this server has no extra arguments",
    "web_search_options": "this server does not search the web",
    "xtc_probability": _SAMPLER,
}
NO_OPS: dict[str, tuple[Any, ...]] = {  # of other fields: values that are empty, false or zero
    "best_of": (1,),
    "function_call": ("none", "auto", ""),
    "format": ("", "text"),
    "modalities": ([], ["text"]),
    "n_predict": (-1,),
    "num_beams": (1,),
    "num_predict": (-1,),
    "repeat_penalty": (1,),
    "thinking_budget": (-1,),
    "thinking_token_budget": (-1,),
    "top_n_sigma": (-1,),
}
BOOKKEEPING = {  # of clients, and hints that no text depends on; other fields are logged
    *("api_base", "api_version", "custom_llm_provider", "drop_params", "extra_headers", "extra_query", "fallbacks"),
    *("allowed_openai_params", "keep_alive", "max_retries", "num_retries", "provider", "rid", "timeout"),
    *("cache_control", "cache_prompt", "caching", "prediction", "prompt_cache_options", "prompt_cache_retention"),
    *("guided_decoding_backend", "include_reasoning", "separate_reasoning", "stream_interval", "stream_reasoning"),
    *("annotations", "id", "index", "parsed", "provider_specific_fields", "thinking_blocks", "type", "verbosity"),
}
_logged: set[str] = set()
_lock = threading.Lock()


def known(given: Mapping[str, Any], fields: Container[str]) -> dict[str, Any]:
    """The entries of an object in a body that are validated: known `fields`, and fields to refuse."""
    kept = {}
    for name, value in given.items():
        if name in fields or (name in REFUSED and not _asks_for_nothing(name, value)):
            kept[name] = value
        elif name not in REFUSED and name not in BOOKKEEPING:
            _log(name)
    return kept


def why_refused(name: str) -> str:
    """The reason for refusing a field."""
    return REFUSED.get(name, "this server does not know the field")


def _asks_for_nothing(name: str, value: Any) -> bool:
    return value in NO_OPS[name] if name in NO_OPS else not value


def _log(name: str) -> None:
    """Log once that a field is ignored."""
    name = name[:60]
    with _lock:
        if name in _logged or len(_logged) >= MAX_LOGGED:
            return
        _logged.add(name)
    event(logger, logging.WARNING, "unknown field ignored", field=name)


class Body(BaseModel):
    """Base class of every request body and of its parts."""

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, json_schema_extra={"additionalProperties": True}
    )

    @model_validator(mode="before")
    @classmethod
    def _prepare(cls, values: Any, info: ValidationInfo) -> Any:
        if not isinstance(values, dict):
            return values
        if any(len(value) > MAX_KEYS for value in (values, *values.values()) if isinstance(value, dict)):
            raise PydanticCustomError("too_many_keys", f"an object may have at most {MAX_KEYS} keys")
        given = {k: v for k, v in values.items() if v is not None}
        return given if info.context == STRICT else known(given, cls.model_fields)


def parse_json(raw: bytes) -> dict[str, Any]:
    """A body's JSON object. Nesting is bounded by the parser. Raises ApiError."""
    try:
        value = from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError("invalid", f"the body is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ApiError("invalid", "the body must be a JSON object")
    return value


def validate(model: type[Model], values: Mapping[str, Any], *, strict: bool) -> Model:
    """Validate a body's JSON object. strict: refuse unknown fields.

    Raises:
        ApiError: Names the first wrong fields and why, never their contents.
    """
    try:
        return model.model_validate(values, context=STRICT if strict else None)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False, include_context=False)
        raise ApiError(
            "invalid", "; ".join(_sentence(item) for item in found[:MAX_ERRORS]), _where(found[0])
        ) from error


def _where(item: Mapping[str, Any]) -> str:
    return ".".join(str(part)[:60] for part in item["loc"][:6]) or "body"


def _sentence(item: Mapping[str, Any]) -> str:
    if item["type"] == "extra_forbidden":
        return f"{_where(item)}: not supported: {why_refused(str(item['loc'][-1]))}"
    return f"{_where(item)}: {item['msg'][:200]}"
