"""The chat page's look and access: dark and light, a phone, keys, and axe's rules."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from chatting import Chat, Open, opener
from running import Running

PHONE = {"viewport": {"width": 360, "height": 640}, "has_touch": True}
LOOKS: dict[str, dict[str, Any]] = {
    "light": {"color_scheme": "light"},
    "dark": {"color_scheme": "dark"},
    "phone": {"color_scheme": "light", **PHONE},
}
ANSWER = (
    "<think>I wonder.</think># Title\n\nText with `code`, [a link](https://example.com) and a list:\n\n- one\n- two\n\n"
    '> quoted\n\n```python\n# comment\ndef f(x: int = 3) -> str:\n    return "text" if x else None\n```\n\n'
    "| name | figure |\n|-|-:|\n| a | 1 |\n"
)
BACKGROUND = "() => getComputedStyle(document.body).backgroundColor"


@pytest.fixture
def open_chat(browser: Any) -> Iterator[Open]:
    with opener(browser) as found:
        yield found


def problems(chat: Chat) -> list[str]:
    """Serious findings of axe-core."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-playwright-python")
    chat.page.wait_for_timeout(250)  # transitions have ended
    found = axe.Axe().run(chat.page).response["violations"]
    return [
        f"{one['id']}: {node['html'][:200]} {node['failureSummary'][:300]}"
        for one in found
        if one["impact"] in ("serious", "critical")
        for node in one["nodes"]
    ]


@pytest.mark.parametrize("look", LOOKS)
def test_axe_finds_nothing_serious(look: str, open_chat: Open, server: Running) -> None:
    chat = open_chat(server.url, noise=("status of 400",), **LOOKS[look])
    page = chat.page
    page.get_by_text("Chat with demo_model").wait_for()
    assert not problems(chat), "an empty chat"
    chat.answer_with(ANSWER, usage={"prompt_tokens": 5, "completion_tokens": 7})
    chat.send("one")
    page.locator(".thought summary").click()
    page.locator(".hljs-keyword").first.wait_for()
    page.click("#probabilities")
    chat.change_requests(max_tokens=20, top_logprobs=3)
    chat.send("two")
    chat.change_requests(max_tokens=100_000)
    chat.send("fails")
    page.locator(".token").first.focus()
    assert not problems(chat), "answers, probabilities and an error"
    page.click("#settings")
    page.fill("#field-top_p", "7")
    assert not problems(chat), "settings"
    page.keyboard.press("Escape")
    chat.send("invalid", wait=False)
    page.locator(".message.user").last.get_by_label("Edit message").click()
    if "phone" in look:
        page.click("#drawer")
    page.locator(".row").hover()
    page.locator(".row").get_by_label("Rename").click()
    assert not problems(chat), "a message and a title that are edited"
    page.keyboard.press("Escape")
    page.click("#export")
    assert not problems(chat), "a dialog"


@pytest.mark.parametrize("look", ["light", "dark"])
def test_the_key_dialog_and_an_unreachable_server_are_accessible(look: str, open_chat: Open, server: Running) -> None:
    chat = open_chat(server.url, noise=("status of 401",), **LOOKS[look])
    chat.page.route("**/v1/models", lambda route: route.fulfill(status=401, json={"error": "Unauthorized"}))
    chat.page.reload()
    chat.page.wait_for_selector("#key")
    assert not problems(chat)
    chat.page.keyboard.press("Escape")
    chat.page.wait_for_selector("#banner")
    assert not problems(chat)


def test_a_phone_shows_all_without_scrolling_sideways(open_chat: Open, server: Running) -> None:
    chat = open_chat(server.url, **LOOKS["phone"])
    wide = "x" * 300
    chat.answer_with(f"{wide}\n\n```\n{wide}\n```\n\n|{'a|' * 30}\n|{'-|' * 30}\n|{f'{wide[:30]}|' * 30}\n\n`{wide}`")
    chat.send(wide)

    def fits() -> None:
        width = "() => document.querySelector('#thread').scrollWidth - document.querySelector('#thread').clientWidth"
        assert chat.page.evaluate("document.documentElement.scrollWidth") <= 360
        assert chat.page.evaluate(width) <= 0

    fits()
    assert not chat.page.locator("#sidebar").is_visible()
    chat.page.click("#drawer")
    chat.page.locator(".row .open").wait_for()
    fits()
    chat.page.keyboard.press("Escape")
    chat.page.wait_for_selector("#sidebar", state="hidden")
    chat.page.click("#drawer")
    chat.page.click("#new-chat")
    chat.page.wait_for_selector("#sidebar", state="hidden")
    assert chat.page.locator(".message").count() == 0
    chat.page.click("#settings")
    fits()
    assert chat.page.locator("#settings-dialog").evaluate("dialog => dialog.scrollWidth - dialog.clientWidth") <= 0


@pytest.mark.parametrize("look", ["light", "phone"])
def test_the_header_is_named(look: str, open_chat: Open, server: Running) -> None:
    page = open_chat(server.url, **LOOKS[look]).page
    assert page.locator(".site-name").get_attribute("aria-label") == "squawq"
    page.get_by_role("button", name="Keyboard shortcuts", exact=True).click()
    page.get_by_role("dialog", name="Keyboard shortcuts", exact=True).wait_for()


def test_dark_follows_the_system_until_the_user_switches(open_chat: Open, server: Running) -> None:
    chat = open_chat(server.url, color_scheme="dark")
    dark = chat.page.evaluate(BACKGROUND)
    chat.page.emulate_media(color_scheme="light")
    light = chat.page.evaluate(BACKGROUND)
    assert light == "rgb(255, 255, 255)" != dark
    chat.page.get_by_label("Use dark colours").click()
    assert chat.page.evaluate(BACKGROUND) == dark
    chat.page.reload()
    assert chat.page.evaluate(BACKGROUND) == dark
    chat.page.get_by_label("Use light colours").click()
    assert chat.page.evaluate(BACKGROUND) == light


def test_keys(open_chat: Open, server: Running) -> None:
    chat = open_chat(server.url)
    page = chat.page
    chat.answer_with("first")
    page.fill("#input", "one")
    page.press("#input", "Shift+Enter")
    page.keyboard.type("two")
    page.press("#input", "Enter")
    chat.finished()
    assert chat.texts() == ["one\ntwo", "first"]
    page.keyboard.press("Control+Shift+O")
    assert page.locator(".message").count() == 0
    assert page.evaluate("document.activeElement.id") == "input"
    page.keyboard.press("Control+k")
    assert page.evaluate("document.activeElement.id") == "search"
    page.keyboard.press("Control+/")
    assert "Stop the answer" in page.inner_text("#keys-dialog")
    page.keyboard.press("Escape")
    page.wait_for_selector("#keys-dialog", state="detached")


def test_each_button_has_a_name_and_the_focus_is_visible(open_chat: Open, server: Running) -> None:
    chat = open_chat(server.url)
    names = chat.page.locator("button:visible").evaluate_all("all => all.map(b => b.ariaLabel || b.innerText)")
    assert all(names)
    chat.page.keyboard.press("Shift+Tab")
    outline = chat.page.evaluate("() => getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"


def test_motion_is_reduced_if_the_user_asks(open_chat: Open, server: Running) -> None:
    chat = open_chat(server.url, reduced_motion="reduce")
    assert chat.page.locator("#sidebar").evaluate("one => parseFloat(getComputedStyle(one).transitionDuration)") < 0.001
