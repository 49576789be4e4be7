"""The pages' files over HTTP: who gets them, their headers, and that they ask for nothing from elsewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.resources import files

import pytest
from running import Running, running

from squawq.serve.web.pages import PAGES, web_files

HTML = {"accept": "text/html,application/xhtml+xml,*/*;q=0.8"}  # as browsers send it


@pytest.fixture(scope="module")
def guarded() -> Iterator[Running]:
    with running(api_keys=("secret",)) as found:
        yield found


@pytest.mark.parametrize("path", sorted(web_files()))
def test_files_need_no_key_and_are_asked_for_again_only_if_they_changed(path: str, guarded: Running) -> None:
    reply = guarded.get(path)
    assert reply.status_code == 200
    content = files("squawq.serve.web").joinpath(web_files()[path]).read_bytes()
    assert reply.headers["content-encoding"] == "gzip"
    assert reply.content == content  # which the client has unpacked
    plain = guarded.get(path, headers={"accept-encoding": "identity"})
    assert (plain.content, "content-encoding" in plain.headers) == (content, False)
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert "default-src 'none'; script-src 'self'; " in reply.headers["content-security-policy"]
    again = guarded.get(path, headers={"if-none-match": reply.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert guarded.get(path, headers={"if-none-match": '"other"'}).status_code == 200


@pytest.mark.parametrize("dialect", ["server", "tgi_server"])
def test_the_root_is_the_chat_page_for_browsers_and_health_for_others(
    dialect: str, request: pytest.FixtureRequest
) -> None:
    server: Running = request.getfixturevalue(dialect)
    page, other = server.get("/", headers=HTML), server.get("/")
    assert page.content == server.get("/chat").content
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert (other.status_code, other.content, other.headers["content-type"]) == (200, b"", "text/plain")
    assert server.post("/", {"inputs": "a", "parameters": {"max_new_tokens": 1}}, headers=HTML).status_code == 200


@pytest.mark.parametrize("path", ["/web/../pages.py", "/web/pages.py", "/web/", "/web", "/web/chat.html/", "/chat/"])
def test_other_files_are_not_there(path: str, server: Running) -> None:
    assert server.get(path.replace("..", "%2e%2e")).status_code == 404


def test_without_pages_the_root_is_health_for_all() -> None:
    with running(web=False) as server:
        assert server.get("/", headers=HTML).content == b""
        assert {server.get(path).status_code for path in web_files()} == {404}


def test_metrics_name_pages_and_count_scripts_together(server: Running) -> None:
    for path in web_files():
        server.get(path)
    handlers = set(re.findall(r'handler="([^"]+)"', server.get("/metrics").text))
    assert set(PAGES) <= handlers
    assert not {handler for handler in handlers if handler.startswith("/web/")}


@pytest.mark.parametrize("name", sorted(name for name in web_files().values() if not name.startswith("vendor/")))
def test_files_of_ours_load_nothing_from_elsewhere(name: str) -> None:
    text = files("squawq.serve.web").joinpath(name).read_text(encoding="utf-8")
    assert not re.search(r"""(src=|href=|url\(|from |import\(|fetch\()\s*["']?(https?:)?//""", text)
    assert " style=" not in text
