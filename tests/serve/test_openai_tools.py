"""Tools through OpenAI's own client, with chat templates of both tool formats.

The demo model knows no tools: what it must write, the grammar sees to; what it may write, tokens that are forbidden.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from running import MESSAGES, Running, running

from squawq.demo import demo_model
from squawq.text.tokenizer import Tokenizer

WORDS = Tokenizer(demo_model())
TIDY = {
    str(token): -100 for token in range(4096) if WORDS.token_text(token).isspace() and WORDS.token_text(token) != " "
}
ENDS = {**TIDY, "1": 100, "4": 100}  # the end tokens as soon as the grammar lets them come, and no empty lines
GOES_ON = {**TIDY, "1": -100, "4": -100}
SAY = """{{- bos_token }}
{%- macro say(role, text) %}{{- "<|start_header_id|>" + role + "<|end_header_id|>\\n\\n" + text }}{%- endmacro %}
"""
TAIL = """{%- if add_generation_prompt %}{{- say("assistant", hint | default("")) }}{%- endif %}"""
LLAMA = """
{%- if tools %}{{- say("system", 'Call by JSON: {"name": the function, "parameters": its arguments}.') }}
{%- for tool in tools %}{{- "\\n" + tool | tojson }}{%- endfor %}{{- "<|eot_id|>" }}{%- endif %}
{%- for message in messages %}
{%- set role = "ipython" if message.role == "tool" else message.role %}
{%- if message.tool_calls is defined %}
{%- for call in message.tool_calls %}
{%- set text = '{"name": "' + call.function.name + '", "parameters": ' + call.function.arguments | tojson + "}" %}
{{- say(role, text) + "<|eot_id|>" }}
{%- endfor %}
{%- else %}{{- say(role, message.content | trim) + "<|eot_id|>" }}{%- endif %}
{%- endfor %}
"""
HERMES = """
{%- if tools %}{{- say("system", "<tools>") }}
{%- for tool in tools %}{{- "\\n" + tool | tojson }}{%- endfor %}
{{- '\\n</tools>\\n<tool_call>\\n{"name": a name, "arguments": an object}\\n</tool_call><|eot_id|>' }}{%- endif %}
{%- for message in messages %}
{%- if message.role == "tool" %}{{- say("user", "<tool_response>\\n" + message.content + "\\n</tool_response>") }}
{%- else %}{{- say(message.role, message.content) }}{%- endif %}
{%- for call in message.tool_calls or [] %}
{%- set text = {"name": call.function.name, "arguments": call.function.arguments} | tojson %}
{{- "\\n<tool_call>\\n" + text + "\\n</tool_call>" }}
{%- endfor %}
{{- "<|eot_id|>" }}
{%- endfor %}
"""
TEMPLATES = {"llama3_json": SAY + LLAMA + TAIL, "hermes": SAY + HERMES + TAIL}


def tool_model(folder: Path, form: str) -> Path:
    """The demo model in a new folder, with a chat template that knows tools."""
    shutil.copytree(demo_model(), folder)
    (folder / "chat_template.jinja").write_text(TEMPLATES[form])
    return folder


def function(name: str, **properties: object) -> dict[str, Any]:
    """A function whose arguments are all required."""
    parameters = {"properties": properties, "required": list(properties), "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "description": "does it", "parameters": parameters}}


TOOLS = [
    function("get_weather", city={"enum": ["Oslo", "Rome"]}, metric={"type": "boolean"}),
    function("set_light", on={"type": "boolean"}),
]
ARGUMENTS = {"get_weather": {"city", "metric"}, "set_light": {"on"}}
ASKED: dict[str, Any] = {"model": "any", "messages": MESSAGES, "temperature": 0, "max_tokens": 200}


@pytest.fixture(scope="module", params=["llama3_json", "hermes"])
def tools_server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    form = request.param
    with running(model=str(tool_model(tmp_path_factory.mktemp("tools") / "model", form))) as server:
        assert server.served.tool_format == form
        yield server


@pytest.fixture
def chat(tools_server: Running) -> Iterator[Any]:
    with openai.OpenAI(base_url=tools_server.url + "/v1", api_key="none", max_retries=0) as client:
        yield lambda **options: client.chat.completions.create(**{**ASKED, "tools": TOOLS, **options})


@pytest.fixture
def plain(server: Running) -> Iterator[Any]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def calls_of(message: Any) -> list[tuple[str, dict[str, Any]]]:
    """The calls of a message, checked against TOOLS."""
    found = []
    for call in message.tool_calls or ():
        assert re.fullmatch("call_[0-9a-f]{24}", call.id)
        arguments = json.loads(call.function.arguments)
        assert set(arguments) == ARGUMENTS[call.function.name]
        assert arguments.get("city", "Oslo") in ("Oslo", "Rome")
        found.append((call.function.name, arguments))
    return found


def joined(stream: Any) -> tuple[str, list[tuple[str, str]], str | None]:
    """A stream's content, its calls with their arguments joined, and its finish_reason."""
    content, finish = "", None
    calls: list[list[str]] = []
    for chunk in stream:
        choice = chunk.choices[0]
        content += choice.delta.content or ""
        finish = choice.finish_reason or finish
        for piece in choice.delta.tool_calls or ():
            if piece.id:
                assert (piece.index, piece.type) == (len(calls), "function")
                calls.append([piece.function.name, ""])
            assert piece.index == len(calls) - 1
            calls[-1][1] += piece.function.arguments
    return content, [(name, arguments) for name, arguments in calls], finish


def whole(answer: Any) -> tuple[str, list[tuple[str, str]], str | None]:
    """The same of a whole answer."""
    message = answer.choices[0].message
    calls = [(call.function.name, call.function.arguments) for call in message.tool_calls or ()]
    return message.content or "", calls, answer.choices[0].finish_reason


@pytest.mark.parametrize("choice", ["required", "get_weather", "set_light"])
def test_a_call_that_must_come(chat: Any, choice: str) -> None:
    chosen = choice if choice == "required" else {"type": "function", "function": {"name": choice}}
    answer = chat(tool_choice=chosen, logit_bias=ENDS)
    message = answer.choices[0].message
    ((name, _),) = calls_of(message)
    assert choice in ("required", name)
    assert (message.content, answer.choices[0].finish_reason) == (None, "tool_calls")
    assert joined(chat(tool_choice=chosen, logit_bias=ENDS, stream=True)) == whole(answer)


def test_parallel_calls(chat: Any) -> None:
    asked = {"tool_choice": "required", "logit_bias": GOES_ON, "seed": 1, "temperature": 1}
    content, calls, finish = whole(chat(**asked))
    assert (len(calls) >= 2, finish) == (True, "length"), (calls, content)
    for name, arguments in calls[:-1]:
        assert set(json.loads(arguments)) == ARGUMENTS[name]
    assert joined(chat(stream=True, **asked)) == (content, calls, finish)
    one = chat(**asked, parallel_tool_calls=False)  # whatever is forbidden: after one call nothing but the end may come
    assert (len(calls_of(one.choices[0].message)), one.choices[0].finish_reason) == (1, "tool_calls")


def test_text_where_no_call_must_come(chat: Any) -> None:
    for options in ({"tool_choice": "auto"}, {"tool_choice": "none"}, {}):
        asked = {**options, "max_tokens": 12}
        content, calls, finish = whole(chat(**asked))
        assert (bool(content), calls, finish) == (True, [], "length")
        assert joined(chat(stream=True, **asked)) == (content, calls, finish)


def test_a_call_that_may_come(tools_server: Running, chat: Any) -> None:
    form = tools_server.served.tool_format
    begin = "<tool_call>" if form == "hermes" else '{"name": "set_light"'
    first = tools_server.served.encode(begin, special=False)[0]
    asked = {"tool_choice": "auto", "logit_bias": {str(first): 15, **GOES_ON}, "max_tokens": 100}
    content, calls, finish = whole(chat(**asked))
    assert joined(chat(stream=True, **asked)) == (content, calls, finish)
    assert all(name in ARGUMENTS for name, _ in calls)


def test_the_template_shows_the_tools(tools_server: Running, chat: Any) -> None:
    def prompt(**options: Any) -> str:
        ids = chat(max_tokens=1, extra_body={"return_token_ids": True}, **options).prompt_token_ids
        return tools_server.served.tokenizer.decode(ids, skip_special=False)

    assert '"get_weather"' in prompt()
    assert '"get_weather"' not in prompt(tool_choice="none")


def test_a_tools_result(tools_server: Running, chat: Any) -> None:
    message = chat(tool_choice="required", logit_bias=ENDS).choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": '{"degrees": 21}'}
    asked = {"max_tokens": 12, "extra_body": {"return_token_ids": True}}
    for held in (message, message.model_dump()):
        answer = chat(messages=[*MESSAGES, held, result], tool_choice="none", **asked)
        prompt = tools_server.served.tokenizer.decode(answer.prompt_token_ids, skip_special=False)
        assert '{"degrees": 21}' in prompt
        assert f'"name": "{message.tool_calls[0].function.name}"' in prompt
        assert answer.choices[0].message.content


def test_the_clients_streaming_helper(tools_server: Running) -> None:
    with (
        openai.OpenAI(base_url=tools_server.url + "/v1", api_key="none") as client,
        client.chat.completions.stream(**ASKED, tools=TOOLS, tool_choice="required", logit_bias=ENDS) as stream,  # type: ignore[arg-type]
    ):
        events = list(stream)
    (done,) = [event for event in events if event.type == "tool_calls.function.arguments.done"]
    assert set(json.loads(done.arguments)) == ARGUMENTS[done.name]
    assert len(calls_of(stream.get_final_completion().choices[0].message)) == 1


def test_a_template_for_tools_alone(tmp_path: Path) -> None:
    folder = shutil.copytree(demo_model(), tmp_path / "model")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text(TEMPLATES["hermes"])
    asked = {**ASKED, "max_tokens": 1, "tools": TOOLS}
    with running(model=str(folder)) as server:
        texts = []
        for choice in ("auto", "none"):
            answer = server.post("/v1/chat/completions", {**asked, "tool_choice": choice, "return_token_ids": True})
            texts.append(server.served.tokenizer.decode(answer.json()["prompt_token_ids"], skip_special=False))
    assert ("<tools>" in texts[0], texts[1]) == (True, server.served.tokenizer.render(MESSAGES))
    with running(model=str(folder), tool_call_parser="none") as server:
        answer = server.post("/v1/chat/completions", asked)
        assert "knows no format of tool calls for this model" in answer.json()["error"]["message"]


def test_markers_that_are_tokens(tmp_path: Path) -> None:
    folder = tool_model(tmp_path / "model", "hermes")
    text = (folder / "tokenizer.json").read_text()
    tokenizer = json.loads(text.replace("<|eom_id|>", "<tool_call>").replace("<|python_tag|>", "</tool_call>"))
    for token in (5, 6):  # as in Qwen's tokenizer
        tokenizer["added_tokens"][token]["special"] = False
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with running(model=str(folder)) as server:
        asked = {**ASKED, "tools": TOOLS, "logit_bias": ENDS, "tool_choice": "required", "return_token_ids": True}
        (choice,) = server.post("/v1/chat/completions", asked).json()["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert (choice["token_ids"][0], choice["token_ids"][-2]) == (5, 6)


def test_variables_of_the_template(tools_server: Running, chat: Any) -> None:
    def last(**kwargs: Any) -> str:
        asked = {"return_token_ids": True, "chat_template_kwargs": kwargs}
        ids = chat(max_tokens=1, extra_body=asked).prompt_token_ids
        return tools_server.served.tokenizer.decode(ids, skip_special=False)

    assert last(hint="Well,").removesuffix("Well,") == last()
    with pytest.raises(openai.BadRequestError, match="chat_template_kwargs may not set tools"):
        last(tools=[])


def test_tools_that_cannot_be_used(chat: Any) -> None:
    for options, why in (
        (
            {"tool_choice": {"type": "function", "function": {"name": "other"}}},
            "one of the tools: get_weather, set_light",
        ),
        (
            {"response_format": {"type": "regex", "value": "a"}},
            "Grammar and tools are mutually exclusive, but for JSON schemas",
        ),
        ({"tools": [function("bad name")]}, "a function is called 'bad name'"),
        ({"tools": [], "tool_choice": "required"}, "no tools were given"),
        ({"tools": None, "tool_choice": "required"}, "no tools were given"),
    ):
        with pytest.raises(openai.BadRequestError, match=re.escape(why)):
            chat(**options)


def test_no_tools_at_all(chat: Any) -> None:
    asked = {"max_tokens": 8}
    assert whole(chat(tools=[], tool_choice="auto", **asked)) == whole(chat(tools=openai.NOT_GIVEN, **asked))


def test_a_call_or_a_form(tools_server: Running, chat: Any) -> None:
    """Where a call may come, an answer without one has the form that was asked for."""
    schema = {"properties": {"name": {"enum": ["cat", "dog"]}}, "required": ["name"]}
    form = {"type": "json_schema", "json_schema": {"name": "pet", "schema": schema}}
    asked = {"response_format": form, "logit_bias": ENDS}
    found = []
    for word in ("cat", "get_weather", "set_light"):
        bias = {str(token): 30 for token in tools_server.served.encode(word, special=False)}
        if word != "cat" and tools_server.served.tool_format == "hermes":
            bias |= {str(tools_server.served.encode("<tool_call>", special=False)[0]): 100}
        answer = chat(**{**asked, "logit_bias": {**bias, **ENDS}})
        content, calls, finish = whole(answer)
        assert joined(chat(**{**asked, "logit_bias": {**bias, **ENDS}}, stream=True)) == (content, calls, finish)
        found += [bool(calls)]
        if calls:
            assert (content, finish, len(calls_of(answer.choices[0].message)) >= 1) == ("", "tool_calls", True)
        else:
            assert (set(json.loads(content)), finish) == ({"name"}, "stop")
    assert set(found) == {True, False}, "the biases show no difference; choose others"
    must = chat(**asked, tool_choice="set_light")
    assert [name for name, _ in calls_of(must.choices[0].message)] == ["set_light"]


def test_a_template_that_knows_no_tools(server: Running, plain: Any) -> None:
    """The tools stand at the end of the user's message, and the answer is held to JSON."""
    asked = {**ASKED, "tools": TOOLS, "logit_bias": ENDS, "extra_body": {"return_token_ids": True}}

    def prompt(answer: Any) -> str:
        return server.served.tokenizer.decode(answer.prompt_token_ids, skip_special=False)

    answer = plain.chat.completions.create(**asked, tool_choice="required")
    assert (len(calls_of(answer.choices[0].message)), answer.choices[0].finish_reason) == (1, "tool_calls")
    assert "Tell me a story.\n---\n[{" in prompt(answer)
    assert '"get_weather"' in prompt(answer)
    told = {**asked, "extra_body": {"return_token_ids": True, "tool_prompt": "Choose one."}}
    assert "\nChoose one.<|eot_id|>" in prompt(plain.chat.completions.create(**told, tool_choice="required"))
    replayed = [*MESSAGES, answer.choices[0].message, {"role": "tool", "tool_call_id": "x", "content": "21 degrees"}]
    again = prompt(plain.chat.completions.create(**{**asked, "messages": replayed, "tools": openai.NOT_GIVEN}))
    name = answer.choices[0].message.tool_calls[0].function.name
    assert f'assistant<|end_header_id|>\n\n{{"name": "{name}", "parameters": ' in again
    assert "user<|end_header_id|>\n\n21 degrees" in again
    assert "---" not in again
