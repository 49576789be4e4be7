"""What the chat page makes of a model's text: markdown, code, reasoning, probabilities, and hostile output."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chatting import LONG, Chat, opener
from running import Running

CODE = "Here:\n\n```python\ndef f(x):\n    return x\n```\n\n| a | b |\n|-|-:|\n| 1 | 2 |\n"
HOSTILE = [
    "<script>window.hacked = 1</script>",
    "text <script>window.hacked = 1</script> text",
    '<img src=x onerror="window.hacked = 1">',
    "<svg onload='window.hacked = 1'></svg>",
    "<iframe srcdoc='<script>parent.hacked = 1</script>'></iframe>",
    "<style>body { display: none }</style>",
    "<form action='https://example.com'><input name=a></form>",
    "<div style='position: fixed; inset: 0'>over all</div>",
    "<a href='javascript:window.hacked = 1' class='button'>press</a>",
    "[press](javascript:window.hacked=1)",
    "[press](JaVaScRiPt:window.hacked=1)",
    "[press](data:text/html,<script>window.hacked=1</script>)",
    "[press](vbscript:x) <javascript:window.hacked=1>",
    '[press](https://example.com "\\" onmouseover=window.hacked=1 x=\\"")',
    "![picture](https://example.com/pixel.png)",
    "![picture](//example.com/pixel.png)",
    '![x" onerror="window.hacked=1](y)',
    "```<img onerror=window.hacked=1>\n</code></pre><img src=x onerror=window.hacked=1>\n```",
    "<think><img src=x onerror=window.hacked=1></think><script>window.hacked=1</script>",
    "<br onclick=window.hacked=1> <sub onclick=window.hacked=1>",
    "<!-- --><script>window.hacked=1</script><![CDATA[<script>window.hacked=1</script>]]>",
    "<math><mtext><table><mglyph><style><!--</style><img title='--&gt;&lt;img src=1 onerror=window.hacked=1&gt;'>",
]


@pytest.fixture
def chat(browser: Any, server: Running) -> Iterator[Chat]:
    with opener(browser) as open_chat:
        yield open_chat(server.url)


def test_markdown_code_and_tables(chat: Chat) -> None:
    chat.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    chat.answer_with(*CODE)  # a character at a time
    chat.send("one")
    text = chat.page.locator(".message.assistant .text")
    assert text.locator(".code-head span").inner_text() == "python"
    text.locator(".hljs-keyword").first.wait_for()
    assert text.locator("pre").inner_text().strip() == "def f(x):\n    return x"
    assert text.locator("td").all_inner_texts() == ["1", "2"]
    text.get_by_label("Copy code").click()
    text.get_by_label("Copied").wait_for()
    assert chat.page.evaluate("navigator.clipboard.readText()") == "def f(x):\n    return x"
    chat.press_on_last("Copy message")
    chat.page.locator(".message-buttons").get_by_label("Copied").wait_for()
    assert chat.page.evaluate("navigator.clipboard.readText()") == CODE


def test_links_open_in_a_new_tab_and_images_are_links(chat: Chat) -> None:
    chat.answer_with("[a](https://example.com/a) ![b](https://example.com/b.png)")
    chat.send("one")
    for name in "ab":
        link = chat.page.get_by_role("link", name=name, exact=True)
        assert link.get_attribute("href", timeout=1000).startswith(f"https://example.com/{name}")
        assert (link.get_attribute("target"), link.get_attribute("rel")) == ("_blank", "noopener noreferrer")
    assert chat.page.locator(".message img").count() == 0


def test_a_link_is_defined_after_its_use(chat: Chat) -> None:
    chat.answer_with("See [the page][1].", "\n\nMore.", "\n\n[1]: https://example.com/page")
    chat.send("one")
    assert chat.page.get_by_role("link", name="the page").get_attribute("href") == "https://example.com/page"


def harmless(chat: Chat) -> None:
    """Check that nothing of a model's text ran, or became more than text."""
    chat.page.wait_for_timeout(100)
    assert chat.page.evaluate("window.hacked") is None
    inside = chat.page.locator(".message .text, .thought-text")
    assert inside.locator("script, img, svg:not(button svg), iframe, style, form, input, object, embed").count() == 0
    attributes: list[str] = inside.evaluate_all(
        """(all) => all.flatMap((one) => [...one.querySelectorAll("*")].flatMap((e) => e.getAttributeNames()))"""
    )
    assert not {name for name in attributes if name.startswith("on") or name in ("style", "id", "name", "src")}
    for target in inside.locator("a").evaluate_all("(all) => all.map((a) => a.getAttribute('href'))"):
        assert target.startswith("https://example.com")


def test_hostile_answers_do_nothing(chat: Chat) -> None:
    chat.answer_with("\n\n".join(HOSTILE[:-1]))
    chat.send("one")
    for text in HOSTILE:
        chat.answer_with(text)
        chat.send(text)
    for summary in chat.page.locator(".thought:not([hidden]) summary").all():
        summary.click()
    assert chat.page.get_by_text("<script>window.hacked = 1</script>", exact=True).count() >= 2  # shown as text
    harmless(chat)


def test_hostile_imports_do_nothing(chat: Chat, tmp_path: Path) -> None:
    pairs = [
        pair
        for text in HOSTILE
        for pair in (
            {"role": "user", "content": text},
            {"role": "assistant", "content": text, "reasoning_content": text},
        )
    ]
    path = tmp_path / "chat.json"
    path.write_text(json.dumps({"title": HOSTILE[2], "messages": pairs, "__proto__": {"system": "x"}, "id": "y"}))
    chat.page.set_input_files("#import-file", path)
    chat.page.wait_for_selector(".toast")
    assert chat.page.locator(".row .open").inner_text() == HOSTILE[2]
    for summary in chat.page.locator(".thought:not([hidden]) summary").all():
        summary.click()
    harmless(chat)


def test_huge_answers_are_shown(chat: Chat) -> None:
    for text in ("a " * 300_000, ">" * 20_000, "[" * 20_000, "*a " * 10_000, "- " * 3000 + "x"):
        chat.answer_with(text)
        chat.send("one")
    chat.answer_with("short")
    chat.send("two")
    assert chat.texts()[-1] == "short"


REASONED: list[tuple[list[Any], str, str]] = [
    (["<think>", "I wo", "nder.</th", "ink>\n\nYes."], "I wonder.", "Yes."),
    (["I wonder.\n</think>\n\nYes."], "I wonder.", "Yes."),
    ([{"reasoning_content": "I "}, {"reasoning_content": "wonder."}, "Yes."], "I wonder.", "Yes."),
    ([{"reasoning": "I wonder."}, "Yes."], "I wonder.", "Yes."),
    (["<think>I wonder.</think>Yes.</think> <think>No.</think>"], "I wonder.", "Yes.</think> <think>No.</think>"),
    (["A tag </think> in text."], "", "A tag </think> in text."),
    (["```\n</think>\n```"], "", "</think>"),
]


def test_reasoning_is_folded_and_not_sent_back(chat: Chat) -> None:
    for deltas, thought, answer in REASONED:
        chat.page.click("#new-chat")
        chat.answer_with(*deltas)
        chat.send("one")
        folded = chat.page.locator(".thought:not([hidden])")
        assert folded.count() == bool(thought), deltas
        assert answer in chat.texts()[1], deltas
        if thought:
            assert folded.locator("summary").inner_text().startswith("Thought for ")
            assert not folded.locator(".thought-text").is_visible()
            folded.locator("summary").click()
            folded.locator(".thought-text").get_by_text(thought, exact=True).wait_for()
            chat.send("two")
            assert chat.bodies[-1]["messages"][1] == {"role": "assistant", "content": answer}


def test_probabilities_are_shown_by_pointer_and_keys(chat: Chat) -> None:
    chat.page.click("#probabilities")
    chat.change_requests(max_tokens=12, seed=1)
    chat.send("Tell me a story.")
    assert (chat.bodies[-1]["logprobs"], chat.bodies[-1]["top_logprobs"]) == (True, 5)
    tokens = chat.page.locator(".token")
    assert tokens.count() == 12
    assert chat.texts()[1]
    tokens.nth(3).hover()
    box = chat.page.locator("#token-box")
    assert box.locator("tr").count() >= 5
    assert box.locator("tr.chosen").count() == 1
    assert box.inner_text().count("%") >= 5
    chat.page.mouse.move(0, 0)
    tokens.first.focus()
    first = box.inner_text()
    chat.page.keyboard.press("ArrowRight")
    assert tokens.nth(1).evaluate("token => token === document.activeElement")
    assert tokens.nth(1).get_attribute("aria-describedby") == "token-box"
    assert box.inner_text() != first
    chat.page.click("#probabilities")
    assert chat.page.locator(".token").count() == 0
    assert chat.page.locator(".message.assistant .block").count() >= 1


def test_the_reader_who_scrolled_up_stays_there(chat: Chat) -> None:
    chat.change_requests(**LONG)
    chat.send("Tell me a story.", wait=False)
    chat.page.wait_for_function("() => document.querySelector('#thread').scrollTop > 200")
    chat.page.evaluate("document.querySelector('#thread').scrollTop = 20")
    chat.page.locator("#to-end").wait_for()
    height = chat.page.evaluate("document.querySelector('#thread').scrollHeight")
    chat.page.wait_for_function("before => document.querySelector('#thread').scrollHeight > before + 100", arg=height)
    assert chat.page.evaluate("document.querySelector('#thread').scrollTop") == 20
    chat.page.click("#to-end")
    chat.page.wait_for_selector("#to-end", state="hidden")
    chat.page.click("#stop")
    chat.finished()
