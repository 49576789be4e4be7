"""OpenAI's messages as chat templates take them, with and without a template that knows tools."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from squawq.errors import ConfigError
from squawq.serve.tools.grammar import ARGUMENT_KEYS, CLOSE, OPEN

_SHAPE = '{"name": the function, "%s": an object with its arguments}'
_SAY = "To call one of these functions, answer with nothing but %s. Give values, no variables."
PLAIN_PROMPTS = {
    "llama3_json": _SAY % ("JSON of the form " + _SHAPE % "parameters"),
    "hermes": _SAY % f"{OPEN}{_SHAPE % 'arguments'}{CLOSE}",
}
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_TEMPLATE_ROLES = {"developer": "system", "function": "tool"}
_TEXTS = ("text", "input_text", "output_text", "refusal")  # OpenAI's names of parts that are text


def template_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Convert OpenAI's messages for chat templates. Raises ConfigError for parts that are not text, and invalid calls.

    Arguments of calls become objects, "developer" becomes "system", "function" becomes "tool", text parts are joined by
    line breaks as in vLLM (transformers joins them by spaces, TGI by nothing). An assistant's missing content becomes
    "": Llama's templates would print None, and Qwen's would add it to text. `tool_calls` is there only where there are
    calls, since Llama's templates look for the key alone. An assistant's reasoning is kept
    under both of its names. Other fields are dropped.
    """
    return [_message(message) for message in messages]


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    role = message.get("role")
    if role not in ROLES:
        raise ConfigError(f"a message has the role {role!r:.80}; choose one of {', '.join(ROLES)}")
    content = message.get("content")
    if content is None and role in ("assistant", "tool", "function"):
        refusal = message.get("refusal")
        content = refusal if isinstance(refusal, str) else ""
    made = {"role": _TEMPLATE_ROLES.get(role, role), "content": _text(role, content)}
    for name in ("name", "tool_call_id"):
        if isinstance(message.get(name), str):
            made[name] = message[name]
    if role == "assistant":
        calls = message.get("tool_calls") or []
        if not calls and message.get("function_call"):
            calls = [{"function": message["function_call"]}]
        if calls:
            made["tool_calls"] = [_call(call) for call in calls]
        for thought in (message.get("reasoning_content"), message.get("reasoning")):
            if isinstance(thought, str) and thought:
                made |= {"reasoning_content": thought, "reasoning": thought}
                break
    return made


def plain_messages(
    form: str, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None, prompt: str | None
) -> list[dict[str, Any]]:
    """Messages for a template without tools: the last user message ends with the tools, as in TGI, calls are the
    assistant's text, and their results a user's.

    Args:
        form: Of the calls, one of TOOL_FORMATS.
        messages: As `template_messages` makes them.
        tools: OpenAI's.
        prompt: How to call them; None for the format's of PLAIN_PROMPTS.
    """
    made = [dict(message) for message in messages]
    for message in made:
        if calls := message.pop("tool_calls", None):
            texts = [
                json.dumps({"name": call["function"]["name"], ARGUMENT_KEYS[form]: call["function"]["arguments"]})
                for call in calls
            ]
            texts = [f"{OPEN}\n{text}\n{CLOSE}" for text in texts] if form == "hermes" else texts
            message["content"] = "\n".join([message["content"], *texts] if message["content"] else texts)
        if message["role"] == "tool":
            message["role"] = "user"
    if tools:
        told = f"{json.dumps(tools, ensure_ascii=False)}\n{PLAIN_PROMPTS[form] if prompt is None else prompt}"
        last = next((message for message in reversed(made) if message["role"] == "user"), None)
        if last is None:
            made.insert(0, {"role": "system", "content": told})
        else:
            last["content"] += f"\n---\n{told}"
    return made


def _text(role: str, content: object) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ConfigError(f"the content of a message of role {role} must be text or a list of text parts")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        text = part.get("refusal" if kind == "refusal" else "text") if isinstance(part, Mapping) else None
        if kind not in _TEXTS or not isinstance(text, str):
            raise ConfigError(f"a content part has the type {kind!r:.80}; this server reads text parts only")
        texts.append(text)
    return "\n".join(texts)


def _call(call: object) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping) or not isinstance(name, str):
        raise ConfigError("each of tool_calls must have a function with a name and arguments")
    arguments = function.get("arguments")
    if arguments in (None, ""):  # of a function without arguments
        arguments = {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"the arguments of the call to {name!r:.80} are no JSON: {error}") from error
    if not isinstance(arguments, Mapping):
        raise ConfigError(f"the arguments of the call to {name!r:.80} must be a JSON object")
    found = {"type": "function", "function": {"name": name, "arguments": dict(arguments)}}
    return {"id": call["id"], **found} if isinstance(call.get("id"), str) else found
