"""The chat page's conversations: what the browser keeps, exports and imports."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chatting import Chat, opener
from running import Running

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "How many days has a week?"},
    {"role": "assistant", "content": "It has **seven**.", "reasoning_content": "Monday to Sunday."},
]


@pytest.fixture
def chat(browser: Any, server: Running) -> Iterator[Chat]:
    with opener(browser) as open_chat:
        yield open_chat(server.url)


def load(chat: Chat, tmp_path: Path, content: object, name: str = "chat.json") -> None:
    """Import a file with this content."""
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    chat.page.evaluate("document.querySelector('#toasts').replaceChildren()")
    chat.page.set_input_files("#import-file", path)
    chat.page.wait_for_selector(".toast")


def exported(chat: Chat, label: str) -> tuple[str, str]:
    """The name and content of an exported file."""
    chat.page.click("#export")
    with chat.page.expect_download() as download:
        chat.page.get_by_text(label).click()
    return download.value.suggested_filename, Path(download.value.path()).read_text(encoding="utf-8")


def titles(chat: Chat) -> list[str]:
    found: list[str] = chat.page.locator(".row .open").all_inner_texts()
    return found


def test_conversations_survive_a_reload(chat: Chat) -> None:
    chat.answer_with("first")
    chat.send("What is the capital of France, and how long has it been that?")
    chat.page.click("#new-chat")
    chat.send("two")
    assert titles(chat) == ["two", "What is the capital of France, and how long has…"]
    chat.page.reload()
    chat.page.wait_for_selector(".message")
    assert chat.texts() == ["two", "first"]
    assert chat.page.title() == "two · squawq"
    chat.page.locator(".row .open").nth(1).click()
    assert chat.texts()[0].startswith("What is the capital")


def test_an_answer_cut_short_by_a_reload_is_kept(chat: Chat) -> None:
    chat.change_requests(ignore_eos=True, max_tokens=4000)
    chat.send("Tell me a story.", wait=False)
    chat.started()
    chat.page.reload()
    chat.page.wait_for_selector(".message.assistant .block")
    assert len(chat.texts()[1]) > 0


def test_conversations_are_renamed_searched_and_deleted(chat: Chat) -> None:
    chat.answer_with("The answer has an elephant.")
    chat.send("one")
    chat.page.click("#new-chat")
    chat.answer_with("nothing")
    chat.send("two")
    chat.page.locator(".row").first.hover()
    chat.page.get_by_label("Rename two").click()
    chat.page.get_by_label("Title").fill("Second")
    chat.page.get_by_label("Title").press("Enter")
    assert titles(chat) == ["Second", "one"]
    chat.page.fill("#search", "ELEPHANT")
    assert titles(chat) == ["one"]
    chat.page.fill("#search", "nowhere")
    chat.page.get_by_text("No conversation has this text.").wait_for()
    chat.page.fill("#search", "")
    chat.page.locator(".row").first.hover()
    chat.page.get_by_label("Delete Second").click()
    assert titles(chat) == ["one"]
    chat.undo()
    assert titles(chat) == ["Second", "one"]
    assert chat.texts() == ["two", "nothing"]
    chat.page.reload()
    chat.page.wait_for_selector(".row")
    assert sorted(titles(chat)) == ["Second", "one"]


def test_two_tabs_show_the_same_conversations(chat: Chat) -> None:
    chat.answer_with("first")
    other = Chat(chat.page.context.new_page(), chat.url)
    other.page.goto(chat.url + "/chat")
    other.page.wait_for_selector("#new-chat svg")
    chat.send("one")
    other.page.get_by_role("button", name="one", exact=True).click()
    other.page.get_by_text("first", exact=True).wait_for()


def test_export_and_import_bring_the_same_conversation(chat: Chat, tmp_path: Path) -> None:
    load(chat, tmp_path, {"title": "Days", "messages": MESSAGES})
    assert chat.texts() == ["How many days has a week?", "It has seven."]
    name, text = exported(chat, "This conversation as JSON")
    assert (name, json.loads(text)) == ("days.json", {"title": "Days", "messages": MESSAGES})
    load(chat, tmp_path, text)
    _, all_text = exported(chat, "All conversations as JSON")
    assert json.loads(all_text) == [{"title": "Days", "messages": MESSAGES}] * 2
    name, text = exported(chat, "This conversation as Markdown")
    assert name == "days.md"
    assert text.startswith("# Days\n\n## System\n\nBe brief.\n\n## User\n\nHow many days has a week?\n\n## Assistant\n")
    chat.answer_with("ok")
    chat.send("Thanks")
    assert chat.bodies[-1]["messages"] == [
        *MESSAGES[:2],
        {"role": "assistant", "content": "It has **seven**."},
        {"role": "user", "content": "Thanks"},
    ]


def test_messages_alone_and_lists_are_imported_too(chat: Chat, tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    load(chat, tmp_path, [{"role": "user", "content": parts}])
    assert chat.texts() == ["a\nb"]
    load(chat, tmp_path, [{"messages": MESSAGES}, {"messages": MESSAGES[1:]}])
    assert titles(chat) == ["How many days has a week?", "How many days has a week?", "a b"]


REFUSED: list[tuple[object, str]] = [
    ("{", "chat.json is no JSON."),
    ("[]", "chat.json has no conversation."),
    ("null", 'chat.json has no list "messages".'),
    ({"messages": {}}, 'chat.json has no list "messages".'),
    ([{"messages": []}, {}], 'conversation 2 of chat.json has no list "messages".'),
    ({"messages": [{"role": "user", "content": 3}]}, "message 1 of chat.json has no text as its content."),
    ({"messages": [None]}, "message 1 of chat.json has no text as its content."),
    (
        {"messages": [{"role": "tool", "content": "x"}]},
        'message 1 of chat.json has the role "tool"; choose one of system, user, assistant.',
    ),
]


def test_other_files_are_refused_in_words(chat: Chat, tmp_path: Path) -> None:
    for content, why in REFUSED:
        load(chat, tmp_path, content)
        assert chat.page.locator(".toast").inner_text() == why
    assert not titles(chat)
