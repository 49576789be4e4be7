"""/tokenize, /detokenize and /tokenizer_info in vLLM's forms. TGI's /tokenize (key `inputs`) is in tgi/generate.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from squawq.serve.errors import ApiError
from squawq.serve.fields import Body, Many, TokenId, validate
from squawq.serve.model import Served
from squawq.serve.openai.chat import ChatBody, read, render


class TokenizeBody(Body):
    """A text to tokenize."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool = False


class TokenizeChatBody(ChatBody):
    """A chat to tokenize."""

    return_token_strs: bool = False


class DetokenizeBody(Body):
    """Tokens to spell."""

    model: str | None = None
    tokens: Many[TokenId]


def tokenize(raw: Mapping[str, Any], served: Served) -> dict[str, Any]:
    """{"count", "max_model_len", "tokens", "token_strs"} of a prompt or of messages. Raises ApiError."""
    body: TokenizeBody | TokenizeChatBody
    if "messages" in raw:
        body = read(TokenizeChatBody, raw, served)
        ids = body.truncated(served.encode(render(body, served), body.add_special_tokens), served)
    else:
        body = validate(TokenizeBody, raw, strict=served.settings.strict_fields)
        ids = served.encode(body.prompt, body.add_special_tokens)
    served.check_model_name(body.model)
    if body.return_token_strs:
        served.check_listed(len(ids))
    strings = [served.tokenizer.token_text(token) for token in ids] if body.return_token_strs else None
    return {"count": len(ids), "max_model_len": served.max_len, "tokens": ids, "token_strs": strings}


def detokenize(raw: Mapping[str, Any], served: Served) -> dict[str, Any]:
    """{"prompt"} of token ids. Raises ApiError for ids that the vocabulary has not."""
    body = validate(DetokenizeBody, raw, strict=served.settings.strict_fields)
    served.check_model_name(body.model)
    if bad := [token for token in body.tokens if token >= served.config.vocab_size]:
        raise ApiError("invalid", f"token {bad[0]}: the model has ids 0 to {served.config.vocab_size - 1}", "tokens")
    return {"prompt": served.tokenizer.decode(body.tokens, skip_special=False)}


def tokenizer_info(served: Served) -> dict[str, Any]:
    """What tokenizer_config.json says, its special tokens as texts, and the chat template in use."""
    tokenizer = served.tokenizer
    return {**tokenizer.settings, **tokenizer.template_variables(), "chat_template": served.template}
