"""The chat page in a browser: what its tests do and look for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

CHAT_ROUTE = "**/v1/chat/completions"
LONG = {"ignore_eos": True, "max_tokens": 3000}  # of a request: an answer that takes some seconds


@dataclass
class Chat:
    """The chat page, opened. `noise`: what the console said; `elsewhere`: requests to other hosts."""

    page: Any
    url: str
    noise: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)  # of the chats that were sent

    def send(self, text: str, *, wait: bool = True) -> None:
        self.page.fill("#input", text)
        self.page.press("#input", "Enter")
        if wait:
            self.finished()

    def finished(self) -> None:
        """Wait until an answer has ended."""
        self.page.wait_for_selector(".message.assistant.last[aria-busy=false]")

    def started(self) -> None:
        """Wait until an answer has begun and goes on."""
        self.page.wait_for_selector(".message.assistant.last[aria-busy=true] .block")

    def texts(self) -> list[str]:
        """The messages as they are shown."""
        return [text.strip() for text in self.page.locator(".message .text").all_inner_texts()]

    def press_on_last(self, label: str, kind: str = "assistant") -> None:
        """Press a button of the last message of a kind."""
        self.page.locator(f".message.{kind}").last.get_by_label(label, exact=True).click()

    def undo(self) -> None:
        self.page.locator(".toast").last.get_by_text("Undo").click()

    def answer_with(self, *deltas: dict[str, Any] | str, **last: Any) -> None:
        """Have chats answered with these deltas instead of by the model; texts are content."""
        made = [{"content": delta} if isinstance(delta, str) else delta for delta in deltas]
        chunks: list[dict[str, Any]] = [{"choices": [{"index": 0, "delta": delta}]} for delta in made]
        chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], **last})
        body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
        self.page.unroute(CHAT_ROUTE)
        self.page.route(CHAT_ROUTE, lambda route: route.fulfill(body=body, content_type="text/event-stream"))

    def change_requests(self, **fields: Any) -> None:
        """Add fields to the chats that are sent."""

        def changed(route: Any) -> None:
            route.continue_(post_data=json.dumps({**route.request.post_data_json, **fields}))

        self.page.unroute(CHAT_ROUTE)
        self.page.route(CHAT_ROUTE, changed)

    def use_model(self) -> None:
        self.page.unroute(CHAT_ROUTE)


Open = Callable[..., Chat]


@contextmanager
def opener(browser: Any) -> Iterator[Open]:
    """A function that opens a server's chat page in a browser without history; options are a context's."""
    opened: list[tuple[Any, Chat, tuple[str, ...]]] = []

    def open_chat(url: str, *, noise: tuple[str, ...] = (), path: str = "/chat", **options: Any) -> Chat:
        context = browser.new_context(**{"viewport": {"width": 1200, "height": 760}, **options})
        context.set_default_timeout(60_000)
        page = context.new_page()
        chat = Chat(page, url)
        opened.append((context, chat, noise))
        page.on("console", lambda message: chat.noise.append(message.text))
        page.on("pageerror", lambda error: chat.noise.append(str(error)))
        page.on("request", lambda request: _note(chat, request))
        page.goto(url + path)
        page.wait_for_selector("#new-chat svg", state="attached")
        return chat

    try:
        yield open_chat
        for _, chat, expected in opened:
            assert not [text for text in chat.noise if not any(part in text for part in expected)]
            assert not chat.elsewhere
    finally:
        for context, _, _ in opened:
            context.close()


def _note(chat: Chat, request: Any) -> None:
    if not request.url.startswith((f"{chat.url}/", f"blob:{chat.url}/", "data:")):
        chat.elsewhere.append(request.url)
    if request.url.endswith("/v1/chat/completions"):
        chat.bodies.append(request.post_data_json)
