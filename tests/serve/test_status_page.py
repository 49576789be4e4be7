"""The status page in a browser: figures of the real server and of made ones, keys, silence, sizes and contrast."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from browsing import OVERFLOW, PHONE, dark, findings, opened, until
from prometheus_client.parser import text_string_to_metric_families as parse_text
from running import Running, running

from squawq.engine.protocol import Stats
from squawq.serve.metrics import Metrics, Timing

KEY = "secret"
STATS = Stats(
    running=3,
    waiting=5,
    pages_used=25,
    pages=100,
    prefix_hits=32,
    prefix_queries=80,
    preemptions=2,
    tokens_generated=700,
    prompt_tokens_computed=48,
    steps=40,
    runner_seconds=8.0,
    step_seconds=10.0,
)


@pytest.fixture(scope="module")
def guarded() -> Iterator[Running]:
    with running(api_keys=(KEY,)) as found:
        yield found


def text(page: Any, selector: str) -> str:
    return str(page.locator(selector).inner_text())


def loaded(page: Any) -> None:
    until(page, lambda: text(page, "#running") != "–")


def problem(page: Any) -> bool:
    return bool(page.locator("#problem").is_visible())


def number(shown: str) -> int:
    return int(shown.replace(",", ""))


def test_figures_follow_a_request(server: Running, browser: Any) -> None:
    with opened(browser, server.url) as page:
        page.goto(f"{server.url}/status")
        loaded(page)
        before = number(text(page, "#generated-total"))
        length = number(text(page, "#finished tr:nth-child(2) td"))
        assert server.post("/v1/completions", {"prompt": "Once", "max_tokens": 8, "ignore_eos": True}).is_success
        until(page, lambda: number(text(page, "#generated-total")) == before + 8)
        assert number(text(page, "#finished tr:nth-child(2) td")) == length + 1
        assert float(text(page, "#generated")) > 0
        assert all(" ms" in cell or " s" in cell for cell in page.locator("#latency td").all_inner_texts())
        assert "2xx success" in text(page, "#responses")
        chart = page.locator("#generated-chart")
        until(page, lambda: "L" in chart.locator("path").get_attribute("d"))
        label = chart.locator("svg").get_attribute("aria-label")
        assert label == f"Generated tokens per second. {text(page, '#generated-chart figcaption')}"
        assert " now, " in label
        model, machine = text(page, "#model"), text(page, "#server")
        assert server.served.name in model
        assert f"{server.served.max_len:,} tokens" in model
        assert "Uptime" in machine
        assert re.search(r"[\d.]+ [MG]iB resident in the server's process", machine)


def shown(page: Any, url: str, *scrapes: str) -> None:
    """Open the page with these answers of /metrics, each two seconds after the one before."""
    answers = iter(scrapes)
    page.clock.install()
    page.route("**/metrics", lambda route: route.fulfill(body=next(answers), content_type="text/plain"))
    page.goto(f"{url}/status")
    loaded(page)
    for _ in scrapes[1:]:
        with page.expect_response("**/metrics"):
            page.clock.run_for(2000)
        page.wait_for_timeout(50)


def scrape(stats: Stats, requests: int = 0) -> str:
    metrics = Metrics('a "model"', lambda: stats, facts={"device": "cuda", "gpu": "NVIDIA H200", "cache_tokens": 4096})
    for _ in range(requests):
        metrics.observe(Timing(10.0, 10.1, 12.0, 7, 9, "abort", 10.2, 10.4))
    metrics.rejected("overloaded")
    return metrics.render()[0].decode()


def test_each_figure_is_shown(server: Running, browser: Any) -> None:
    later = replace(STATS, tokens_generated=740, prefix_hits=92, prefix_queries=180, prompt_tokens_computed=68)
    with opened(browser, server.url) as page:
        shown(page, server.url, scrape(STATS), scrape(later, requests=3))
        tiles = {name: text(page, f"#{name}") for name in ("running", "waiting", "cache", "prefix", "prefix-total")}
        assert tiles == {"running": "3", "waiting": "5", "cache": "25 %", "prefix": "60 %", "prefix-total": "51 %"}
        generated, prompt = float(text(page, "#generated")), float(text(page, "#prompt"))
        assert 4 < generated <= 40 / 2  # tokens/s: two seconds at least lie between the scrapes
        assert prompt / generated == pytest.approx((68 + 92 - 48 - 32) / 40, rel=0.02)
        assert text(page, "#cache-size") == "4,096 tokens"
        assert page.locator("#cache-bar").evaluate("bar => bar.value") == 0.25
        assert text(page, "#finished tr:nth-child(3)").split() == ["client", "disconnected", "or", "shutdown", "3"]
        assert text(page, "#refused tr:first-child").split() == ["queue", "full", "1"]
        assert text(page, "#latency tr:first-child").split()[4:6] == ["380", "ms"]
        assert "cuda, NVIDIA H200" in text(page, "#model")


def test_latencies_of_the_last_minutes_begin_with_the_page(server: Running, browser: Any) -> None:
    with opened(browser, server.url) as page:
        shown(page, server.url, scrape(STATS, requests=3))
        cells = page.locator("#latency tr:first-child td").all_inner_texts()
        assert cells[:2] == ["–", "–"]
        assert cells[2].endswith(" ms")
        assert "begin when this page is opened" in text(page, "section:has(#latency) .about")


def test_a_restarted_server_begins_new_charts(server: Running, browser: Any) -> None:
    with opened(browser, server.url) as page:
        shown(page, server.url, scrape(STATS), scrape(replace(STATS, tokens_generated=5)))
        assert text(page, "#generated") == "–"
        assert text(page, "#generated-total") == "5"


def test_a_hidden_page_sends_nothing(server: Running, browser: Any) -> None:
    with opened(browser, server.url) as page:
        shown(page, server.url, *[scrape(STATS)] * 2)
        sent: list[str] = []
        page.on("request", lambda request: sent.append(request.url))
        page.evaluate("Object.defineProperty(document, 'hidden', {value: true, configurable: true})")
        page.clock.run_for(20_000)
        assert sent == []
        page.unroute("**/metrics")
        with page.expect_response("**/metrics"):
            page.evaluate("delete document.hidden; document.dispatchEvent(new Event('visibilitychange'))")


def test_an_unreachable_server_is_said_and_asked_again(server: Running, browser: Any) -> None:
    with opened(browser, server.url, refusals=True) as page:
        page.goto(f"{server.url}/status")
        loaded(page)
        assert page.locator("#problem").is_hidden()
        page.context.set_offline(True)
        until(page, lambda: problem(page))
        assert text(page, "#problem").startswith("The server cannot be reached. The figures are of ")
        page.context.set_offline(False)
        until(page, lambda: not problem(page))


def test_the_key_is_asked_for_once(guarded: Running, browser: Any) -> None:
    with opened(browser, guarded.url, refusals=True) as page:
        page.goto(f"{guarded.url}/status")
        page.get_by_role("button", name="Cancel").click()
        until(page, lambda: problem(page))
        assert text(page, "#problem") == "The server needs an API key. Reload the page to enter one."
        page.wait_for_timeout(2500)
        assert page.locator("dialog").count() == 0
        page.reload()
        page.get_by_label("Key", exact=True).fill(KEY)
        page.get_by_role("button", name="Use this key").click()
        loaded(page)
        assert page.locator("#problem").is_hidden()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, {"width": 1280, "height": 900}], ids=["phone", "desk"])
def test_page_fits_and_can_be_read(size: dict[str, int], scheme: str, server: Running, browser: Any) -> None:
    with opened(browser, server.url, viewport=size, color_scheme=scheme) as page:
        page.goto(f"{server.url}/status")
        loaded(page)
        page.locator("#load-chart summary").click()
        assert page.evaluate(OVERFLOW) <= 0
        assert dark(page) == (scheme == "dark")
        assert findings(page) == {}


def series(sample: tuple[str, dict[str, str], float]) -> str:
    return f"{sample[0]} {json.dumps(sample[1], sort_keys=True)}"


def test_metrics_are_read_as_prometheus_reads_them(server: Running, browser: Any) -> None:
    metrics = Metrics('a "b"\n\\n', lambda: STATS)
    for seconds in (0.0015, 0.002, 0.2, 700.0):
        metrics.inter_token(seconds)
    written = metrics.render()[0].decode()
    expected: list[tuple[str, dict[str, str], float]] = []
    for sample in (sample for family in parse_text(written) for sample in family.samples):
        as_written = sample.name if f"\n{sample.name}" in written else sample.name.removesuffix("_total")  # TGI's
        expected.append((as_written, sample.labels, sample.value))
    name = "vllm:inter_token_latency_seconds"
    with opened(browser, server.url) as page:
        page.goto(f"{server.url}/status")
        read, quantiles = page.evaluate(
            """async ([text, name]) => {
              const { parse, buckets, quantile } = await import("/web/status/prometheus.js");
              const all = parse(text), counts = buckets(all, name);
              const samples = [...all].flatMap(([key, found]) => found.map(({labels, value}) => [key, labels, value]));
              return [samples, [0.25, 0.5, 0.75, 1].map((share) => quantile(counts, share))];
            }""",
            [written, name],
        )
    assert sorted(map(tuple, read), key=series) == sorted(expected, key=series)
    assert quantiles == pytest.approx([0.00175, 0.0025, 0.25, 600])
