"""Chat templates: checked against transformers' own rendering, and with templates that try to do more than render."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import datetime
from typing import Any

import pytest
from conftest import shared_data
from hypothesis import example, given, settings
from hypothesis import strategies as st

from squawq.demo import demo_model
from squawq.errors import ConfigError, TemplateError
from squawq.text.chat_template import MAX_MESSAGE, load, render

LLAMA = "llama3-chat-template/meta-llama-Llama-3.1-8B-Instruct.jinja"
DEMO = (demo_model() / "chat_template.jinja").read_text(encoding="utf-8")
TOOLS = [
    {
        "type": "function",
        "function": {"name": "météo", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
    }
]
CALL = {"id": "1", "type": "function", "function": {"name": "météo", "arguments": {"city": "Zürich", "days": 2}}}
CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": " Be kind. "},
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "1", "name": "météo", "content": {"degrees": 21.5}},
    {"role": "user", "content": "Thanks!"},
    {"role": "assistant", "content": "You are "},
]
ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__']['__mro__'] }}",
    "{{ (''|attr('__class__')).mro() }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ lipsum.__globals__.os }}",
    "{{ joiner.__init__.__globals__['__builtins__'].open('/etc/passwd').read() }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context.eval_ctx.environment.loader.x }}",
    "{{ raise_exception.__globals__.sys.exit() }}",
    "{{ strftime_now.__closure__[0] }}",
    "{{ strftime_now.__globals__.sys.modules.os.system('id') }}",
    "{{ dict.mro() }}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{% set f = '{0.__class__.__mro__}'.format %}{{ f('') }}",
    "{{ ['{0.__class__.__mro__}']|map('format', '')|list }}{{ '{x.__class__}'.format_map({'x': ''}) }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os.system('id') }}",
    "{% extends '/etc/passwd' %}",
    "{{ open('/etc/passwd').read() }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'role': 'king'}) }}",
    "{{ messages.__init__.__globals__ }}",
    "{% for i in range(10**9) %}{% endfor %}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{% for",
    "{{ raise_exception('no') }}",
]


def llama() -> str:
    return shared_data(LLAMA).read_text(encoding="utf-8")


def theirs(template: str, messages: list[dict[str, Any]], **options: Any) -> str:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_model())
    return str(tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **options))


VARIABLES = {"bos_token": "<|begin_of_text|>"}


@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("in_user", [True, False])
def test_tools_equal_transformers(tools: list[dict[str, Any]] | None, in_user: bool) -> None:
    options = {"tools_in_user_message": in_user, "date_string": "1 Jan 2026"}
    for prompt in (True, False):
        expected = theirs(llama(), CHAT, tools=tools, add_generation_prompt=prompt, **options)
        found = render(llama(), CHAT, tools=tools, generation_prompt=prompt, variables={**VARIABLES, **options})
        assert found == expected


@pytest.mark.parametrize("content", ["You are ", "", "o", "<|eot_id|>", "a\n", [{"type": "text", "text": "So "}]])
def test_continued_chats_equal_transformers(content: object) -> None:
    text = "{{ m.content if m.content is string else m.content[0].text }}"
    keep = "{% for m in messages %}<{{ m.role }}>" + text + "</s> {% endfor %}"
    trim = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</s>{% endfor %}{{ eos_token }}"
    chat = [*CHAT[:2], {"role": "assistant", "content": content}]
    for template in (keep, trim, DEMO) if isinstance(content, str) else (keep,):
        if content == "" and template != keep:
            continue  # theirs takes the template's own line ends away too
        expected = theirs(template, chat, continue_final_message=True)
        assert render(template, chat, continue_final=True, variables=VARIABLES) == expected


@settings(max_examples=200, deadline=None)
@given(st.text(), st.text(), st.booleans())
@example("", "\n", True)
@example("ContinueFromHere\u2003", "a ", True)
def test_a_continued_chat_ends_with_the_message(before: str, content: str, trims: bool) -> None:
    template = (
        "{% for m in messages %}<s>\n" + ("{{ m.content|trim }}" if trims else "{{ m.content }}") + " </s>{% endfor %}"
    )
    chat = [{"role": "user", "content": before}, {"role": "assistant", "content": content}]
    first = before.strip() if trims else before
    expected = f"<s>\n{first} </s><s>\n{content.strip() if trims else content}"
    assert render(template, chat, continue_final=True) == expected


@pytest.mark.parametrize("content", [None, [], [{"type": "image"}], 7])
def test_what_cannot_be_continued(content: object) -> None:
    with pytest.raises(ConfigError, match="nothing to continue"):
        render(DEMO, [{"role": "assistant", "content": content}], continue_final=True)
    with pytest.raises(ConfigError, match="nothing to continue"):
        render(DEMO, [], continue_final=True)
    with pytest.raises(ConfigError, match="cannot be continued"):
        render("{{ messages|length }}", [{"role": "assistant", "content": "a"}], continue_final=True)


def test_absent_values() -> None:
    template = "{{ 'tool_calls' in messages[0] }} {{ messages[0].content }}{{ bos_token }}|{{ tools is none }}"
    assert render(template, [{"role": "assistant", "content": None, "tool_calls": None}]) == "False |True"
    assert render("{{ add_generation_prompt }}", []) == "True"
    assert render("{{ enable_thinking }}", [], variables={"enable_thinking": False}) == "False"


def test_a_continued_chat_has_no_generation_prompt() -> None:
    template = "{{ add_generation_prompt }} {{ messages[0].content }}"
    assert render(template, [{"role": "assistant", "content": "a"}], continue_final=True) == "False a"


def test_the_messages_stay_as_they_are() -> None:
    chat = [{"role": "assistant", "content": [{"type": "text", "text": "a"}], "name": None}]
    before = json.dumps(chat)
    render("{{ messages[0].content[0].text }}", chat, continue_final=True)
    assert json.dumps(chat) == before


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt"])
def test_reserved_variables(name: str) -> None:
    with pytest.raises(ConfigError, match=f"messages, tools, add_generation_prompt; got {name}"):
        render(DEMO, CHAT[:1], variables={name: []})


def test_filters_and_tags() -> None:
    value = [{"role": "user", "content": {"b": "<é>", "a": [1]}}]
    assert render("{{ messages[0].content|tojson }}", value) == '{"b": "<é>", "a": [1]}'
    options = "ensure_ascii=true, indent=1, separators=(',', ':'), sort_keys=true"
    assert render("{{ messages[0].content|tojson(" + options + ") }}", value) == json.dumps(
        value[0]["content"], indent=1, separators=(",", ":"), sort_keys=True
    )
    assert render("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", []) == "01"
    assert render("{% generation %}[{{ 1 }}]{% endgeneration %}", []) == "[1]"
    assert render("{{ strftime_now('%d %b %Y') }}", [], now=datetime(2024, 7, 26)) == "26 Jul 2024"


@pytest.mark.parametrize("template", ESCAPES)
def test_templates_do_nothing_but_render(template: str) -> None:
    with pytest.raises(ConfigError, match="chat template refuses"):
        render(template, [{"role": "user", "content": "a"}])


def test_errors_are_short_and_name_no_memory() -> None:
    with pytest.raises(ConfigError) as error:
        render("{{ raise_exception('a' * 10**6) }}", [])
    assert len(str(error.value)) < MAX_MESSAGE + 100
    with pytest.raises(TemplateError, match="out of memory"):
        render("{{ 'a' * 10**18 }}", [])


def test_importing_it_takes_no_torch() -> None:
    code = "import squawq.text.chat_template, sys; print(sorted({'torch', 'tokenizers', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_messages_are_answered() -> None:
    answer = load(b"")

    def ask(**changes: Any) -> Any:
        request = {"template": "{{ messages[0].content }}", "messages": [{"content": "é\ud800"}], "now": None}
        return json.loads(answer(json.dumps({**request, **changes}).encode()))

    assert ask() == {"text": "é\ud800"}
    error = {"error": "the chat template refuses these messages: no", "limit": False}
    assert ask(template="{{ raise_exception('no') }}") == error
    assert ask(template="{{ 'a' * 10**18 }}") == {"error": "the chat template ran out of memory", "limit": True}
    assert ask(template="{{ strftime_now('%Y') }}", now="2024-07-26T00:00:00") == {"text": "2024"}
