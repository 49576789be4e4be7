"""/v1/chat/completions: OpenAI's JSON, with vLLM's additions, to an engine request, and its outputs back.

Streams and complete replies are made by the same steps, so they agree.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field

from squawq.engine.request import FinishReason, Grammar, Output, Request
from squawq.errors import ConfigError
from squawq.serve.call import Reply, Times, dump, dump_large
from squawq.serve.errors import ApiError
from squawq.serve.fields import Body, Many, validate
from squawq.serve.limits import limit_by_logprobs
from squawq.serve.model import Served
from squawq.serve.openai.reply import OpenAICall
from squawq.serve.openai.sampling import SamplingFields
from squawq.serve.tools.grammar import PLAIN_FORMAT, call_id, tool_grammar
from squawq.serve.tools.messages import plain_messages, template_messages
from squawq.serve.tools.parser import Delta, ToolParser
from squawq.serve.tools.structured import response_grammar
from squawq.text import chat_template

Chat = TypeVar("Chat", bound="ChatBody")
NO_TOOLS = "the server knows no format of tool calls for this model; --tool-call-parser names one"
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
    if not served.template_supports_tools:
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
    room = served.max_new_tokens(len(ids), asked)
    params = body.params(
        served,
        max_tokens=limit_by_logprobs(served.settings, scored, each, room, asked=asked is not None),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        prompt_logprobs=body.prompt_logprobs,
        grammar=grammar,
    )
    request = Request(f"chatcmpl-{uuid.uuid4().hex}", ids, params, tenant, cache_salt=body.cache_salt or "")
    return ChatCall(body, served, request)


def _grammar(body: ChatBody, served: Served) -> Grammar | None:
    """The grammar of the answer: a response format, tool calls, or ("auto") either."""
    asked = response_grammar(body.response_format, body.outputs(), served.added_tokens)
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


class _ChatChoice:
    """The state of one of n answers."""

    def __init__(self, parser: ToolParser | None) -> None:
        self.parser = parser
        self.calls = 0
        self.begun = False

    def read(self, output: Output) -> list[Delta]:
        """The text or pieces of tool calls that an output adds."""
        if self.parser is None:
            return [Delta(content=output.text)] if output.text else []
        deltas = self.parser.push(output.text) + (self.parser.finish() if output.finish else [])
        self.calls += sum(delta.name is not None for delta in deltas)
        return deltas


class ChatCall(OpenAICall):
    """A chat request (call.Call)."""

    def __init__(self, body: ChatBody, served: Served, request: Request) -> None:
        super().__init__(body, served, (request,), request.id, "chat.completion.chunk")
        self._body = body
        names = body.tool_names()
        form = served.tool_format if names else None
        self._choices = [_ChatChoice(ToolParser(form, names) if form else None) for _ in range(body.n)]

    def push(self, output: Output) -> list[str]:
        """Chunks for an output."""
        choice = self._choices[output.index]
        deltas = [self._delta(delta) for delta in self._read(output)]
        first = not choice.begun
        choice.begun = True
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
                last["delta"] = self._last_delta(choice)
            last["finish_reason"] = self._finish(output, choice)
            last["stop_reason"] = self._stop_reason(output)
        return [dump(chunk) if output.prompt_logprobs is None else dump_large(chunk) for chunk in chunks]

    def reply(self, outputs: Sequence[Sequence[Output]], _: Times, /) -> Reply:
        """OpenAI's chat.completion."""
        choices = [self._whole(output) for output in outputs[0]]
        body = {**self._head("chat.completion"), "choices": choices, "usage": self._usage()}
        scores = outputs[0][0].prompt_logprobs
        body["prompt_logprobs"] = None if scores is None else self._formatter.prompt(scores)
        if self._body.return_token_ids:
            body["prompt_token_ids"] = list(self.requests[0].prompt)
        return Reply(body)

    def _whole(self, output: Output) -> dict[str, Any]:
        choice = self._choices[output.index]
        content, calls = "", []
        for delta in self._read(output):
            content += delta.content
            if delta.name is not None:
                calls.append({"id": call_id(), "type": "function", "function": {"name": delta.name, "arguments": ""}})
            if delta.arguments:
                calls[delta.call]["function"]["arguments"] += delta.arguments  # type: ignore[index]
        message: dict[str, Any] = {"role": "assistant", "content": content or None if calls else content}
        message |= {"refusal": None, **({"tool_calls": calls} if calls else {})}
        found = {
            "index": output.index,
            "message": message,
            "logprobs": None if output.logprobs is None else self._formatter.chat(output.logprobs),
            "finish_reason": self._finish(output, choice),
            "stop_reason": self._stop_reason(output),
        }
        return {**found, "token_ids": list(output.ids)} if self._body.return_token_ids else found

    def _delta(self, delta: Delta) -> dict[str, Any]:
        role = {"role": "assistant"} if self._tgi else {}  # TGI repeats it
        if delta.call is None:
            return {**role, "content": delta.content}
        call: dict[str, Any] = {"index": delta.call, "function": {"arguments": delta.arguments}}
        if delta.name is not None:
            call |= {"id": call_id(), "type": "function"}
            call["function"] = {"name": delta.name, "arguments": delta.arguments}
        return {**role, "tool_calls": [call]}

    def _last_delta(self, choice: _ChatChoice) -> dict[str, Any]:
        """An empty delta; in TGI's dialect with the keys of the earlier ones, since its clients concatenate them."""
        if not self._tgi:
            return {}
        return self._delta(Delta(call=choice.calls - 1) if choice.calls else Delta())

    def _chunk(self, index: int, delta: dict[str, Any]) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        chunk = {**self._head("chat.completion.chunk"), "choices": [choice]}
        if self._usage_in_chunks:
            chunk["usage"] = self._usage()
        return chunk

    def _finish(self, output: Output, choice: _ChatChoice) -> str | None:
        calls = output.finish is FinishReason.STOP and choice.calls
        return "tool_calls" if calls else self._finish_reason(output)

    def _read(self, output: Output) -> list[Delta]:
        self._tokens += len(output.ids)
        return self._choices[output.index].read(output)
