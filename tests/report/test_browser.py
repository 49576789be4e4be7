"""The page in a real browser: a silent console, no request, every drawing seen, nothing wider than the screen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from reports import evaluation, report

from squawq.report.page import render

SIZES = """() => [...document.querySelectorAll("figure")].map(f => {
  const inside = f.querySelector("svg.inside").getBoundingClientRect();
  const shapes = [...f.querySelectorAll("svg.inside path, svg.inside circle, svg.inside rect:not(.frame)")].map(
    s => s.getBoundingClientRect()).filter(b => b.width > 0 || b.height > 0);
  return [inside.width, inside.height, shapes.length];
})"""
# Text of a drawing that lies outside the page, or names in a gutter that is too narrow for them.
CUT = """() => [...document.querySelectorAll("svg text")].filter(t => {
  const box = t.getBoundingClientRect(), names = t.closest("svg.names");
  const left = names ? names.getBoundingClientRect().left : 0;
  return box.left < left - 1 || box.right > document.documentElement.clientWidth + 1;
}).map(t => t.textContent)"""
OVERFLOW = "() => document.documentElement.scrollWidth - document.documentElement.clientWidth"
LIGHT = """() => [getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color].map(
  c => c.match(/\\d+/g).map(Number).reduce((a, b) => a + b))"""


@pytest.mark.parametrize("layers", [1, 8, 80])
@pytest.mark.parametrize(("width", "scheme"), [(400, "dark"), (1400, "light")])
def test_page_in_a_browser(layers: int, width: int, scheme: str, browser: Any, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    found = report(layers, model="a" * 90, evaluation=evaluation())
    found["layers"][0]["linears"][-1]["name"] = "language_model.block_sparse_moe.kv_a_proj_with_mqa"
    path.write_text(render(found, "b" * 90), encoding="utf-8")
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    heard: list[str] = []
    page.on("console", lambda message: heard.append(message.text))
    page.on("pageerror", lambda error: heard.append(str(error)))
    page.on("request", lambda request: heard.append(request.url))
    page.goto(path.as_uri())
    assert heard == [path.as_uri()]
    sizes = page.evaluate(SIZES)
    assert len(sizes) == 9
    assert all(across > width / 4 and down > 80 and shapes for across, down, shapes in sizes)
    assert page.evaluate(OVERFLOW) <= 0
    assert page.evaluate(CUT) == []
    ground, ink = page.evaluate(LIGHT)
    assert (ground < ink) == (scheme == "dark")
    page.close()


def test_table_is_sorted_by_a_heading(browser: Any, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(render(report(12), "OUT"), encoding="utf-8")
    page = browser.new_page()
    page.goto(path.as_uri())

    def column(number: int) -> list[str]:
        found: list[str] = page.locator(f"tbody td:nth-child({number})").all_inner_texts()
        return found

    page.get_by_role("button", name="layer").click()
    assert [int(text) for text in column(1)] == sorted(int(text) for text in column(1))
    page.get_by_role("button", name="layer").click()
    assert column(1)[0] == "11"
    page.get_by_role("button", name="kept", exact=True).click()
    assert [float(text) for text in column(5)] == sorted(float(text) for text in column(5))
    page.get_by_role("button", name="linear").click()
    assert column(2) == sorted(column(2))
    page.close()
