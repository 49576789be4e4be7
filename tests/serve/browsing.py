"""Pages of the server in a browser: a silent console, and no request to another server."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

PHONE = {"width": 390, "height": 844}
LOUD = ("serious", "critical")
OVERFLOW = "() => document.documentElement.scrollWidth - document.documentElement.clientWidth"
LIGHT = """() => [getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color].map(
  c => c.match(/\\d+/g).map(Number).reduce((a, b) => a + b))"""


@contextmanager
def opened(browser: Any, url: str, *, refusals: bool = False, **options: Any) -> Iterator[Any]:
    """A page in a context of its own. At its end the console was silent and each request was sent to `url`'s server.

    refusals: The console may say that a request got no answer, or an error.
    """
    context = browser.new_context(**options)
    page = context.new_page()
    heard: list[str] = []
    page.on("console", lambda message: heard.append(message.text))
    page.on("pageerror", lambda error: heard.append(str(error)))
    page.on("request", lambda request: sent.append(request.url))
    sent: list[str] = []
    try:
        yield page
        elsewhere = [address for address in sent if not address.startswith((url, "data:", "blob:"))]
        assert elsewhere == []
        assert [text for text in heard if not (refusals and text.startswith("Failed to load resource"))] == []
    finally:
        context.close()


def until(page: Any, condition: Callable[[], bool], seconds: float = 15) -> None:
    """Wait until the condition holds. Playwright's wait_for_function needs eval, which the pages' policy forbids."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the page did not come to this"
        page.wait_for_timeout(50)


def dark(page: Any) -> bool:
    """Whether the background is darker than the text."""
    background, text = page.evaluate(LIGHT)
    return bool(background < text)


def findings(page: Any) -> dict[str, list[str]]:
    """axe-core's serious and critical findings: elements by rule."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-playwright-python")
    violations = axe.Axe().run(page).response["violations"]
    return {rule["id"]: [node["html"] for node in rule["nodes"]] for rule in violations if rule["impact"] in LOUD}
