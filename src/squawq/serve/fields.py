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

_REFUSED = {  # why, and the fields
    "adapters (LoRA) are not supported": ("adapter_id", "lora_path"),
    "this server reads and writes text only": ("audio", "media_io_kwargs", "modalities"),
    "use n": ("best_of",),
    "a template in a request is not rendered; the server's model has its own": ("chat_template",),
    "no code of a request is run": ("custom_logit_processor", "logits_processors"),
    "put documents into the messages": ("documents",),
    "this sampler is not supported": (
        "dry_multiplier",
        "dynatemp_range",
        "mirostat",
        "top_a",
        "top_n_sigma",
        "xtc_probability",
    ),
    "use structured_outputs or response_format": ("ebnf", "grammar", "json_schema", "regex"),
    "put its fields into the body itself": ("extra_body",),
    "use response_format": ("format", "structural_tag"),
    "use tools and tool_choice": ("function_call",),
    "use tools": ("functions",),
    "white space in JSON is fixed": ("guided_whitespace_pattern",),
    "there is one engine, with nothing to transfer": ("kv_transfer_params",),
    "use logprobs": ("logprob_token_ids", "n_probs"),
    "use max_tokens, or TGI's max_new_tokens": ("max_length",),
    "use max_tokens": ("max_new_tokens", "n_predict", "num_predict"),
    "use min_tokens": ("min_new_tokens",),
    "this server reads text only": ("mm_processor_kwargs",),
    "use include_stop_str_in_output": ("no_stop_trim",),
    "beam search is not supported": ("num_beams",),
    "put sampling fields into the body itself, under OpenAI's names": ("options",),
    "use continue_final_message": ("prefix",),
    "give text or token ids": ("prompt_embeds",),
    "use repetition_penalty": ("repeat_penalty",),
    "use stop or max_tokens": ("repetition_detection",),
    "hidden states are not returned": ("return_hidden_states",),
    "use stop": ("stop_regex",),
    "thinking has no budget of its own here; use max_tokens": ("thinking_budget", "thinking_token_budget"),
    "this server has no extra arguments": ("vllm_xargs",),
    "this server does not search the web": ("web_search_options",),
}
REFUSED = {name: why for why, names in _REFUSED.items() for name in names}
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
        nothing = value in NO_OPS[name] if name in NO_OPS else not value
        if name in fields or (name in REFUSED and not nothing):
            kept[name] = value
        elif name not in REFUSED and name not in BOOKKEEPING:
            _log(name)
    return kept


def _log(name: str) -> None:
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

    Raises ApiError, which names the first wrong fields and why, never their contents.
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
        why = REFUSED.get(str(item["loc"][-1]), "this server does not know the field")
        return f"{_where(item)}: not supported: {why}"
    return f"{_where(item)}: {item['msg'][:200]}"
