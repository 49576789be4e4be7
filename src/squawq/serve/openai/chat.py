"""/v1/chat/completions: OpenAI's JSON, with vLLM's additions, to an engine request, and its outputs back.

Streams and complete replies are made by the same steps, so they agree.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field

from squawq.engine.request import FinishReason, Grammar, Output, Request
from squawq.errors import ConfigError
from squawq.serve.errors import ApiError
from squawq.serve.fields import Body, Many, validate
from squawq.serve.metrics import Timing
from squawq.serve.model import Served
from squawq.serve.openai.base import OpenAICall, SamplingFields
from squawq.serve.runtime import Reply
from squawq.serve.tools.grammar import PLAIN_FORMAT, call_id, tool_grammar
from squawq.serve.tools.parser import Delta, ToolParser, plain_messages
from squawq.text import chat_template

Chat = TypeVar("Chat", bound="ChatBody")
NO_TOOLS = "the server knows no format of tool calls for this model; --tool-call-parser names one"
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_TEMPLATE_ROLES = {"developer": "system", "function": "tool"}
_TEXTS = ("text", "input_text", "output_text", "refusal")  # OpenAI's names of parts that are text
RESERVED = (*chat_template.RESERVED, "tokenize", "chat_template")


class Message(Body):
    """A message; content is text or a list of text parts. Other fields that clients replay are accepted."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Many[dict[str, Any]] | None = None
    name: Annotated[str, Field(max_length=200)] | None = None
    tool_calls: Many[dict[str, Any]] | None = None
    tool_call_id: Annotated[str, Field(max_length=200)] | None = None
    function_call: dict[str, Any] | None = None
    refusal: str | None = None
    reasoning_content: Any = None
    reasoning: Any = None
    type: Any = None  # lm-evaluation-harness up to 0.4.10 sends it


class Function(Body):
    """A function that the model may call; parameters is a JSON schema."""

    name: Annotated[str, Field(min_length=1, max_length=64)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    """OpenAI's wrapper of a function."""

    type: Literal["function"]
    function: Function


class ChatBody(SamplingFields):
    """The body of /v1/chat/completions."""

    messages: Annotated[Many[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    tool_prompt: str | None = None
    parallel_tool_calls: bool = True
    reasoning_effort: Annotated[str, Field(max_length=100)] | None = None
    enable_thinking: bool | None = None
    thinking: dict[str, Any] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    chat_template_kwargs: Annotated[dict[str, Any], Field(max_length=32)] | None = None
    echo: Literal[False] = False
    audio: Any = None  # of an answer's speech, which modalities ask for

    def tool_names(self) -> list[str]:
        """The tools that may be called; none if tool_choice is "none"."""
        return [tool.function.name for tool in self.tools or ()] if self.choice() != "none" else []

    def choice(self) -> str:
        """tool_choice as "none", "auto", "required" or a function's name. Raises ApiError."""
        choice, names = self.tool_choice, [tool.function.name for tool in self.tools or ()]
        if choice is None:
            return "auto" if names else "none"
        if isinstance(choice, dict):
            function = choice.get("function")
            choice = function.get("name") if isinstance(function, dict) else choice.get("name")
        if choice == "none" or (choice == "auto" and not names):
            return "none"
        if choice in ("auto", "required") and names:
            return str(choice)
        if isinstance(choice, str) and choice in names:
            return choice
        known = ", ".join(names)[:300] or "no tools were given"
        raise ApiError(
            "tool", f"Tool error: tool_choice must be none, auto, required or one of the tools: {known}", "tool_choice"
        )

    def variables(self) -> dict[str, Any]:
        """Variables for the template: chat_template_kwargs, and other fields' settings of thinking.

        Raises ApiError.
        """
        given = self.chat_template_kwargs or {}
        if taken := sorted(set(given) & set(RESERVED)):
            raise ApiError("invalid", f"chat_template_kwargs may not set {taken[0]}", "chat_template_kwargs")
        found: dict[str, Any] = {}
        if self.reasoning_effort is not None:
            found["reasoning_effort"] = self.reasoning_effort
            if self.reasoning_effort == "none":
                found["enable_thinking"] = False
        if self.thinking is not None:
            kind = self.thinking.get("type")
            if kind not in ("enabled", "disabled", "adaptive", "auto") or self.thinking.get("budget_tokens"):
                why = 'thinking may be {"type": "enabled"} or {"type": "disabled"}, without a budget'
                raise ApiError("invalid", why, "thinking")
            if kind in ("enabled", "disabled"):
                found |= {"enable_thinking": kind == "enabled", "thinking": kind == "enabled"}
        if self.enable_thinking is not None:
            found["enable_thinking"] = self.enable_thinking
        return {**found, **given}


def read(model: type[Chat], raw: Mapping[str, Any], served: Served) -> Chat:
    """Validate a chat's body; the messages' size is checked first. Raises ApiError."""
    served.prompt_limits.check_messages(raw.get("messages"), truncated=bool(raw.get("truncate_prompt_tokens")))
    return validate(model, raw, strict=served.settings.strict_fields)


def render(body: ChatBody, served: Served) -> str:
    """Render the chat with the model's template. Raises ApiError."""
    messages = [message.model_dump(exclude_none=True) for message in body.messages]
    tools = None
    if body.tools and body.choice() != "none":
        tools = [tool.model_dump(exclude_none=True, exclude={"function": {"strict"}}) for tool in body.tools]
    try:
        messages = template_messages(messages)
    except ConfigError as error:
        raise ApiError("invalid", str(error), "messages") from error
    if not served.template_supports_tools and (
        tools or any("tool_calls" in one or one["role"] == "tool" for one in messages)
    ):
        messages = plain_messages(served.tool_format or PLAIN_FORMAT, messages, tools, body.tool_prompt)
        tools = None
    continued = body.continue_final_message
    if served.settings.tgi and messages[-1]["role"] == "assistant":
        continued = True  # TGI continues an assistant's last message
    if continued and messages[-1]["role"] != "assistant":
        raise ApiError("invalid", "continue_final_message needs an assistant's message at the end", "messages")
    return served.render_chat(
        messages,
        tools=tools,
        generation_prompt=body.add_generation_prompt and not continued,
        continue_final=continued,
        variables=body.variables(),
    )


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


def chat(raw: Mapping[str, Any], served: Served, tenant: str = "") -> ChatCall:
    """Parse a chat request. Raises ApiError."""
    body = read(ChatBody, raw, served)
    body.check(served)
    if body.top_logprobs and not body.logprobs:
        raise ApiError("invalid", "top_logprobs needs logprobs: true", "top_logprobs")
    grammar = _grammar(body, served)
    served.check_grammar(grammar)
    ids = body.prompt_ids(render(body, served), "messages", body.add_special_tokens, served)
    asked = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    scored = 0 if body.prompt_logprobs is None else len(ids) * (body.prompt_logprobs + 1)
    each = body.n * ((body.top_logprobs or 0) + 1) if body.logprobs else 0
    limit = served.max_new_tokens(len(ids), asked)
    params = body.params(
        served,
        max_tokens=served.limit_by_logprobs(scored, each, limit, asked=asked is not None),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        prompt_logprobs=body.prompt_logprobs,
        grammar=grammar,
    )
    request = Request(f"chatcmpl-{uuid.uuid4().hex}", ids, params, tenant, cache_salt=body.cache_salt or "")
    return ChatCall(body, served, request)


def _grammar(body: ChatBody, served: Served) -> Grammar | None:
    """The grammar of the answer: a response format, tool calls, or ("auto") either."""
    asked = body.output_grammar(served)
    tgi = served.settings.tgi
    if asked is not None and tgi and body.tools is not None:
        raise ApiError("tool", "Tool error: Grammar and tools are mutually exclusive", "response_format")
    choice = body.choice()
    if choice == "none":
        return asked
    if served.tool_format is None:
        raise ApiError("tool", f"Tool error: {NO_TOOLS}", "tools")
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
    try:
        return tool_grammar(
            served.tool_format,
            tools,
            choice,
            body.parallel_tool_calls and not tgi,  # TGI's grammar has one call
            served.added_tokens,
            asked if choice == "auto" else None,
        )
    except ConfigError as error:
        raise ApiError("tool", f"Tool error: {error}", "tools") from error


class ChatCall(OpenAICall):
    """A chat request (runtime.Call)."""

    def __init__(self, body: ChatBody, served: Served, request: Request) -> None:
        super().__init__(body, served, (request,), request.id, "chat.completion.chunk")
        self._body = body
        names = body.tool_names()
        form = served.tool_format if names else None
        self._parsers = [ToolParser(form, names) if form else None for _ in range(body.n)]  # one for each choice
        self._begun: set[int] = set()

    def push(self, output: Output) -> list[dict[str, Any]]:
        parser = self._parsers[output.index]
        self._tokens += len(output.ids)
        if parser is None:
            deltas = [self._content(output.text)] if output.text else []
        else:
            deltas = [self._tool_delta(delta) for delta in _parse(parser, output)]
        first = output.index not in self._begun
        self._begun.add(output.index)
        if first and not self._tgi:
            deltas.insert(0, {"role": "assistant", "content": ""})
        scored = output.logprobs is not None or output.prompt_logprobs is not None
        if not deltas and not output.finish and not scored and not self._body.return_token_ids:
            return []
        chunks = [self._chunk(output.index, delta) for delta in deltas] or [self._chunk(output.index, {})]
        last = chunks[-1]["choices"][0]
        if output.logprobs is not None:
            last["logprobs"] = self._formatter.chat(output.logprobs)
        if self._body.return_token_ids:
            last["token_ids"] = list(output.ids)
            if first:
                chunks[0]["prompt_token_ids"] = list(self.requests[0].prompt)
        if output.prompt_logprobs is not None:
            chunks[0]["prompt_logprobs"] = self._formatter.prompt(output.prompt_logprobs)
        if output.finish:
            if last["delta"] and not self._tgi:
                chunks.append(self._chunk(output.index, {}))
                last = chunks[-1]["choices"][0]
            elif not last["delta"]:
                last["delta"] = self._last_delta(parser)
            last["finish_reason"] = self._finish(output, parser)
            last["stop_reason"] = self._stop_reason(output)
        return chunks

    def reply(self, outputs: Sequence[Sequence[Output]], _: Timing, /) -> Reply:
        choices = [self._whole(output) for output in outputs[0]]
        body = {**self._head("chat.completion"), "choices": choices, "usage": self._usage()}
        scores = outputs[0][0].prompt_logprobs
        body["prompt_logprobs"] = None if scores is None else self._formatter.prompt(scores)
        if self._body.return_token_ids:
            body["prompt_token_ids"] = list(self.requests[0].prompt)
        return Reply(body)

    def _whole(self, output: Output) -> dict[str, Any]:
        parser = self._parsers[output.index]
        self._tokens += len(output.ids)
        content, calls = (output.text, []) if parser is None else _joined(_parse(parser, output))
        message: dict[str, Any] = {"role": "assistant", "content": content or None if calls else content}
        message |= {"refusal": None, **({"tool_calls": calls} if calls else {})}
        found = {
            "index": output.index,
            "message": message,
            "logprobs": None if output.logprobs is None else self._formatter.chat(output.logprobs),
            "finish_reason": self._finish(output, parser),
            "stop_reason": self._stop_reason(output),
        }
        return {**found, "token_ids": list(output.ids)} if self._body.return_token_ids else found

    def _content(self, text: str) -> dict[str, Any]:
        return {"role": "assistant", "content": text} if self._tgi else {"content": text}  # TGI repeats the role

    def _tool_delta(self, delta: Delta) -> dict[str, Any]:
        if delta.call is None:
            return self._content(delta.content)
        call: dict[str, Any] = {"index": delta.call, "function": {"arguments": delta.arguments}}
        if delta.name is not None:
            call |= {"id": call_id(), "type": "function"}
            call["function"] = {"name": delta.name, "arguments": delta.arguments}
        return {"role": "assistant", "tool_calls": [call]} if self._tgi else {"tool_calls": [call]}

    def _last_delta(self, parser: ToolParser | None) -> dict[str, Any]:
        """An empty delta; in TGI's dialect with the keys of the earlier ones, since its clients concatenate them."""
        if not self._tgi:
            return {}
        return self._tool_delta(Delta(call=parser.calls - 1)) if parser and parser.calls else self._content("")

    def _chunk(self, index: int, delta: dict[str, Any]) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        chunk = {**self._head("chat.completion.chunk"), "choices": [choice]}
        if self._usage_in_chunks:
            chunk["usage"] = self._usage()
        return chunk

    def _finish(self, output: Output, parser: ToolParser | None) -> str | None:
        calls = output.finish is FinishReason.STOP and parser and parser.calls
        return "tool_calls" if calls else self._finish_reason(output)


def _parse(parser: ToolParser, output: Output) -> list[Delta]:
    return parser.push(output.text) + (parser.finish() if output.finish else [])


def _joined(deltas: Sequence[Delta]) -> tuple[str, list[dict[str, Any]]]:
    content, calls = "", []
    for delta in deltas:
        content += delta.content
        if delta.name is not None:
            calls.append({"id": call_id(), "type": "function", "function": {"name": delta.name, "arguments": ""}})
        if delta.arguments:
            calls[delta.call]["function"]["arguments"] += delta.arguments  # type: ignore[index]
    return content, calls
