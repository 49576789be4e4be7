"""The API page in a browser: every route is there, and requests are sent with the key."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from browsing import OVERFLOW, PHONE, dark, findings, opened
from running import Running, running

from squawq.serve.app import ROUTES

KEY = "secret"


@pytest.fixture(scope="module")
def guarded() -> Iterator[Running]:
    with running(api_keys=(KEY,)) as found:
        yield found


def operation(page: Any, path: str) -> Any:
    """An operation of POST, unfolded."""
    found = page.locator(".opblock-post", has=page.locator(f'[data-path="{path}"]'))
    found.locator(".opblock-summary-control").click()
    return found


def response(found: Any) -> str:
    """What the server answers to the operation's request."""
    found.get_by_role("button", name="Execute").click()
    return str(found.locator(".live-responses-table .response-col_description pre").first.inner_text())


def test_every_route_is_shown(server: Running, browser: Any) -> None:
    with opened(browser, server.url) as page:
        page.goto(f"{server.url}/docs")
        page.wait_for_selector(".opblock")
        shown = zip(
            page.locator(".opblock-summary-method").all_inner_texts(),
            page.locator(".opblock-summary-path").evaluate_all("paths => paths.map(path => path.dataset.path)"),
            strict=True,
        )
        assert {f"{method} {path}" for method, path in shown} == set(ROUTES)


def test_a_request_can_be_sent(server: Running, browser: Any) -> None:
    with opened(browser, server.url) as page:
        page.goto(f"{server.url}/docs")
        found = operation(page, "/v1/completions")
        assert json.loads(response(found))["choices"][0]["text"]
        assert "Set stream to true" in found.inner_text()
        found.locator(".examples-select select").select_option("Completion_stream")
        found.get_by_role("button", name="Execute").click()
        found.locator(".live-responses-table", has_text="data: [DONE]").wait_for()


def test_requests_carry_the_key(guarded: Running, browser: Any) -> None:
    with opened(browser, guarded.url, refusals=True) as page:
        page.goto(f"{guarded.url}/docs")
        page.get_by_label("Key", exact=True).fill(KEY)
        page.get_by_role("button", name="Use this key").click()
        assert json.loads(response(operation(page, "/v1/completions")))["choices"][0]["text"]


def test_a_document_that_cannot_be_read_is_said(guarded: Running, browser: Any) -> None:
    with opened(browser, guarded.url, refusals=True) as page:
        page.goto(f"{guarded.url}/docs")
        page.get_by_role("button", name="Cancel").click()
        assert page.get_by_role("alert").inner_text() == "/openapi.json answers with status 401."
        page.route("**/openapi.json", lambda route: route.abort())
        page.reload()
        assert "cannot be reached" in page.get_by_role("alert").inner_text()


def test_dark_mode_follows_the_switch(server: Running, browser: Any) -> None:
    with opened(browser, server.url, color_scheme="dark") as page:
        page.goto(f"{server.url}/docs")
        page.wait_for_selector("html.dark-mode .opblock")
        assert dark(page)
        page.locator("#theme").click()
        page.wait_for_selector("html:not(.dark-mode) .opblock")
        assert not dark(page)


@pytest.mark.parametrize(("size", "scheme"), [(PHONE, "dark"), ({"width": 1280, "height": 900}, "light")])
def test_page_fits_and_can_be_read(size: dict[str, int], scheme: str, server: Running, browser: Any) -> None:
    with opened(browser, server.url, viewport=size, color_scheme=scheme) as page:
        page.goto(f"{server.url}/docs")
        page.wait_for_selector(".opblock")
        assert page.evaluate(OVERFLOW) <= 0
        operation(page, "/v1/completions").locator(".execute").wait_for()
        assert page.evaluate(OVERFLOW) <= 0
        assert findings(page) == {}
