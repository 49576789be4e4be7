"""The chat page against a real server: chats, their messages, settings, and what goes wrong."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import pytest
from chatting import CHAT_ROUTE, LONG, Chat, Open, opener
from running import Running, running

from squawq.serve.web.pages import web_files


@pytest.fixture(scope="module")
def guarded() -> Iterator[Running]:
    """A server with a key and two names."""
    with running(api_keys=("secret",), served_names=("small", "other")) as found:
        yield found


@pytest.fixture
def open_chat(browser: Any) -> Iterator[Open]:
    with opener(browser) as found:
        yield found


@pytest.fixture
def chat(open_chat: Open, server: Running) -> Chat:
    return open_chat(server.url)


def test_the_page_says_what_it_is_and_is_ready_to_write(open_chat: Open, server: Running) -> None:
    chat = open_chat(server.url, path="/")
    chat.page.get_by_text("Chat with demo_model").wait_for()
    assert chat.page.title() == "squawq chat"
    assert chat.page.inner_text("#model-name") == "demo_model"
    assert chat.page.evaluate("document.activeElement.id") == "input"
    assert chat.page.locator("#send").is_disabled()


def test_answers_stream_and_are_announced_once(chat: Chat) -> None:
    chat.page.evaluate(
        """() => {
            const said = window.said = [];
            new MutationObserver(() => said.push(document.querySelector("#announcer").textContent))
                .observe(document.querySelector("#announcer"), {childList: true});
        }"""
    )
    chat.change_requests(**{**LONG, "max_tokens": 200})
    chat.send("Tell me a story.", wait=False)
    chat.started()
    begun = len(chat.texts()[1])
    chat.finished()
    assert 0 < begun < len(chat.texts()[1])
    (said,) = chat.page.evaluate("window.said")
    assert said.startswith("Answer: ")
    (body,) = chat.bodies
    assert body["messages"] == [{"role": "user", "content": "Tell me a story."}]
    assert (body["model"], body["stream"]) == ("demo_model", True)


def test_figures_and_the_context_used(chat: Chat) -> None:
    chat.send("Tell me a story.")
    figures = chat.page.locator(".message.last .figures").inner_text()
    assert "\u00a0tokens/s · first token after " in figures
    assert chat.page.inner_text("#context-text").endswith(" of 4,096 tokens")
    used = int(chat.page.inner_text("#context-text").split()[0].replace(",", ""))
    assert used > int(figures.split()[0].replace(",", ""))
    meter = chat.page.get_by_role("meter", name="Context used")
    assert [meter.get_attribute(f"aria-value{name}") for name in ("now", "max")] == [str(used), "4096"]


@pytest.mark.parametrize("how", ["button", "key"])
def test_stop_keeps_what_arrived_and_frees_the_server(how: str, chat: Chat, server: Running) -> None:
    chat.change_requests(**LONG)
    chat.send("Tell me a story.", wait=False)
    chat.started()
    if how == "button":
        chat.page.click("#stop")
    else:
        chat.page.keyboard.press("Escape")
    chat.finished()
    assert chat.texts()[1]
    assert "stopped" in chat.page.locator(".message.last .figures").inner_text()
    assert server.idle()
    assert chat.page.locator("#send").is_visible()


def test_an_answer_is_made_again_and_the_earlier_one_comes_back(chat: Chat) -> None:
    chat.answer_with("first")
    chat.send("one")
    chat.answer_with("second")
    chat.press_on_last("Answer again")
    chat.page.get_by_text("second", exact=True).wait_for()
    assert chat.texts() == ["one", "second"]
    assert [one["messages"] for one in chat.bodies] == [[{"role": "user", "content": "one"}]] * 2
    chat.undo()
    assert chat.texts() == ["one", "first"]


def test_a_message_is_edited_and_sent_again(chat: Chat) -> None:
    chat.answer_with("first")
    chat.send("one")
    chat.send("two")
    chat.answer_with("second")
    chat.page.locator(".message.user").first.hover()
    chat.page.locator(".message.user").first.get_by_label("Edit message").click()
    area = chat.page.locator(".editor textarea")
    assert area.input_value() == "one"
    area.fill("three")
    area.press("Enter")
    chat.page.get_by_text("second", exact=True).wait_for()
    assert chat.texts() == ["three", "second"]
    chat.undo()
    assert chat.texts() == ["one", "first", "two", "first"]


def test_a_message_is_edited_while_its_answer_is_made(chat: Chat) -> None:
    chat.change_requests(**LONG)
    chat.send("one", wait=False)
    chat.started()
    chat.page.locator(".message.user").hover()
    chat.page.locator(".message.user").get_by_label("Edit message").click()
    chat.answer_with("second")
    chat.page.locator(".editor textarea").fill("two")
    chat.page.locator(".editor textarea").press("Enter")
    chat.page.get_by_text("second", exact=True).wait_for()
    assert chat.texts() == ["two", "second"]


def test_arrow_up_edits_the_last_message_and_escape_leaves_it(chat: Chat) -> None:
    chat.answer_with("first")
    chat.send("one")
    chat.page.press("#input", "ArrowUp")
    chat.page.locator(".editor textarea").press("Escape")
    assert chat.page.locator(".editor").count() == 0
    assert chat.texts() == ["one", "first"]


def test_an_answer_is_edited_and_continued(chat: Chat) -> None:
    chat.answer_with("A wrong start")
    chat.send("one")
    chat.press_on_last("Edit message")
    chat.page.locator(".editor textarea").fill("Once upon a time")
    chat.page.get_by_role("button", name="Save").click()
    chat.use_model()
    chat.press_on_last("Continue this answer")
    chat.finished()
    assert chat.texts()[1].startswith("Once upon a time")
    assert len(chat.texts()[1]) > len("Once upon a time")
    body = chat.bodies[-1]
    assert (body["continue_final_message"], body["add_generation_prompt"]) == (True, False)
    assert body["messages"][-1] == {"role": "assistant", "content": "Once upon a time"}


def test_a_message_is_deleted_and_comes_back(chat: Chat) -> None:
    chat.answer_with("first")
    chat.send("one")
    chat.press_on_last("Delete message")
    assert chat.texts() == ["one"]
    chat.undo()
    assert chat.texts() == ["one", "first"]


def test_settings_are_sent_and_the_models_defaults_are_shown(chat: Chat, server: Running) -> None:
    chat.answer_with("first")
    chat.page.click("#settings")
    defaults = server.served.sampling_defaults()
    for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty"):
        assert float(chat.page.get_attribute(f"#field-{name}", "placeholder")) == defaults[name]
    values = {"temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "repetition_penalty": 1.1}
    values |= {"presence_penalty": -1, "frequency_penalty": 1, "max_tokens": 7, "seed": 3}
    for name, value in values.items():
        chat.page.fill(f"#field-{name}", str(value))
    chat.page.fill("#field-stop", "END\n\\n\\n")
    chat.page.fill("#system", "Be brief.")
    chat.page.get_by_role("button", name="Done").click()
    chat.send("one")
    body = chat.bodies[-1]
    assert {name: body[name] for name in values} == values
    assert body["stop"] == ["END", "\n\n"]
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    chat.page.click("#new-chat")
    chat.send("two")
    assert chat.bodies[-1]["messages"] == [{"role": "user", "content": "two"}]
    chat.page.reload()
    chat.page.click("#settings")
    assert chat.page.input_value("#field-seed") == "3"
    chat.page.get_by_role("button", name="Use the model's defaults").click()
    assert chat.page.input_value("#field-seed") == ""


def test_invalid_settings_are_said_before_a_message_is_sent(chat: Chat) -> None:
    chat.page.click("#settings")
    for name, value, why in (
        ("temperature", "3", "Temperature must be from 0, at most 2."),
        ("top_p", "0", "Top p must be greater than 0, at most 1."),
        ("seed", "1.5", "Seed must be a whole number from 0"),
        ("max_tokens", "many", "Max tokens is not a number: write one from 1."),
    ):
        chat.page.fill(f"#field-{name}", value)
        assert chat.page.inner_text(f"#field-{name}-problem").startswith(why)
    chat.page.keyboard.press("Escape")
    chat.send("one", wait=False)
    assert chat.page.inner_text("#composer-problem").startswith("Temperature must be from 0, at most 2.")
    assert chat.page.input_value("#input") == "one"
    assert not chat.bodies
    chat.page.get_by_text("Open settings").click()
    chat.page.get_by_role("button", name="Use the model's defaults").click()
    chat.page.get_by_role("button", name="Done").click()
    chat.answer_with("first")
    chat.page.press("#input", "Enter")
    chat.finished()
    assert chat.texts() == ["one", "first"]


def test_the_servers_errors_are_shown_and_tried_again(open_chat: Open, server: Running) -> None:
    chat = open_chat(server.url, noise=("status of 400",))
    chat.change_requests(max_tokens=100_000)
    chat.send("Tell me a story.")
    failure = chat.page.locator(".failure")
    assert "maximum context length is 4096 tokens" in failure.inner_text()
    chat.use_model()
    failure.get_by_text("Try again").click()
    chat.page.wait_for_selector(".message.last .figures:not(:empty)")
    assert chat.page.locator(".failure").count() == 0


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ('data: {"error": {"message": "The engine failed.", "code": 500}}\n\ndata: [DONE]\n\n', "The engine failed."),
        ('data: {"choices": [{"delta": {"content": "Half"}}]}\n\n', "The connection ended before the answer did."),
    ],
)
def test_streams_that_fail(body: str, why: str, chat: Chat) -> None:
    chat.page.route(CHAT_ROUTE, lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    chat.send("one")
    assert why in chat.page.locator(".failure").inner_text()


def test_an_unreachable_server_is_said_and_asked_again(open_chat: Open, server: Running) -> None:
    chat = open_chat(server.url, noise=("net::ERR_CONNECTION_REFUSED",))
    chat.page.route("**/v1/**", lambda route: route.abort("connectionrefused"))
    chat.send("one")
    assert "The server does not answer." in chat.page.inner_text("#banner")
    chat.page.unroute("**/v1/**")
    chat.page.get_by_text("Try now").click()
    chat.page.wait_for_selector("#banner", state="hidden")
    chat.page.get_by_text("Try again").click()
    chat.page.wait_for_selector(".message.last .figures:not(:empty)")


def test_the_key_is_asked_for_and_kept(open_chat: Open, guarded: Running) -> None:
    chat = open_chat(guarded.url, noise=("status of 401",))
    chat.page.fill("#key", "wrong")
    chat.page.get_by_text("Use this key").click()
    chat.page.get_by_text("The server refused this key.").wait_for()
    chat.page.fill("#key", "secret")
    chat.page.get_by_text("Use this key").click()
    chat.page.wait_for_selector("#model")
    assert chat.page.evaluate("[localStorage['squawq.key'], sessionStorage['squawq.key']]") == [None, "secret"]
    chat.page.select_option("#model", "other")
    chat.send("Tell me a story.")
    assert chat.bodies[-1]["model"] == "other"
    assert chat.texts()[1]
    chat.page.reload()
    chat.page.wait_for_selector("#model")
    assert chat.page.input_value("#model") == "other"
    assert chat.page.locator("#key").count() == 0


def test_the_key_stays_in_the_browser_if_the_user_wants(open_chat: Open, guarded: Running) -> None:
    chat = open_chat(guarded.url, noise=("status of 401",))
    chat.page.fill("#key", "secret")
    chat.page.check("#key-remember")
    chat.page.get_by_text("Use this key").click()
    chat.page.get_by_text("Chat with small").wait_for()
    assert chat.page.evaluate("[localStorage['squawq.key'], sessionStorage['squawq.key']]") == ["secret", None]


def test_without_a_key_the_page_says_that_it_needs_one(open_chat: Open, guarded: Running) -> None:
    chat = open_chat(guarded.url, noise=("status of 401",))
    chat.page.get_by_role("button", name="Cancel").click()
    banner = chat.page.locator("#banner")
    banner.get_by_text("The server needs an API key.").wait_for()
    assert "Trying again" not in banner.inner_text()
    banner.get_by_role("button", name="Enter key").click()
    chat.page.fill("#key", "wrong")
    chat.page.get_by_text("Use this key").click()
    chat.page.get_by_text("The server refused this key.").wait_for()
    chat.page.get_by_role("button", name="Cancel").click()
    banner.get_by_role("button", name="Enter key").click()
    chat.page.fill("#key", "secret")
    chat.page.get_by_text("Use this key").click()
    chat.page.wait_for_selector("#banner", state="hidden")
    chat.send("Tell me a story.")
    assert chat.texts()[1]


def test_a_message_without_a_key_asks_for_one_again(open_chat: Open, guarded: Running) -> None:
    chat = open_chat(guarded.url, noise=("status of 401",))
    chat.page.get_by_role("button", name="Cancel").click()
    chat.send("Tell me a story.", wait=False)
    chat.page.get_by_role("button", name="Cancel").click()
    chat.page.get_by_text("The server needs a valid API key.", exact=True).wait_for()
    assert chat.page.locator("#banner").is_visible()
    chat.page.get_by_text("Try again").click()
    chat.page.fill("#key", "secret")
    chat.page.get_by_text("Use this key").click()
    chat.page.wait_for_selector("#banner", state="hidden")
    chat.page.wait_for_selector(".message.last .figures:not(:empty)")


def test_the_page_chats_with_tgis_dialect_too(open_chat: Open, tgi_server: Running) -> None:
    chat = open_chat(tgi_server.url)
    chat.send("Tell me a story.")
    assert chat.texts()[1]
    assert "\u00a0tokens/s" in chat.page.locator(".message.last .figures").inner_text()


def test_all_files_together_are_small() -> None:
    names = [name for name in web_files().values() if not name.startswith(("docs", "status", "vendor/swagger"))]
    sizes = {name: len(files("squawq.serve.web").joinpath(name).read_bytes()) for name in names}
    assert sum(sizes.values()) < 300_000, sizes
