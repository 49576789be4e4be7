"""Both families of names hold the same figures, in both formats; no request can add a label or stop a scrape."""

from __future__ import annotations

import sys
import threading
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import REGISTRY
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from squawq.engine.protocol import Stats
from squawq.engine.request import FinishReason
from squawq.serve.errors import KINDS
from squawq.serve.metrics import METHODS, Metrics, Timing

OPENMETRICS = "application/openmetrics-text"
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
# Arrived at 10, validated a quarter later, started at 11, first token at 12, ended at 16.
TIMING = Timing(
    arrived=10.0,
    validated=10.25,
    ended=16.0,
    prompt_tokens=7,
    generated_tokens=9,
    finish="stop",
    started=11.0,
    first_token=12.0,
    n=1,
    max_tokens=32,
)
Labels = tuple[tuple[str, str], ...]


def make(stats: Stats = STATS) -> Metrics:
    return Metrics("m", lambda: stats, ["/generate", "/v1/completions"])


def lines(metrics: Metrics, accept: str = "") -> list[str]:
    return metrics.render(accept)[0].decode().splitlines()


def families(metrics: Metrics, accept: str = "") -> dict[str, Metric]:
    text = metrics.render(accept)[0].decode()
    found = list(parse_openmetrics(text) if accept else parse_text(text))  # type: ignore[no-untyped-call]
    assert len({family.name for family in found}) == len(found)
    return {family.name: family for family in found}


def samples(metrics: Metrics, accept: str = "") -> dict[tuple[str, Labels], float]:
    """Each sample as it is written, the model's label left out; none of the process', which change at any time."""
    found = {}
    for line in lines(metrics, accept):
        if line.startswith(("#", "process_")):
            continue
        [family] = parse_text(line)
        [sample] = family.samples
        labels = tuple(sorted((key, value) for key, value in sample.labels.items() if key != "model_name"))
        assert (sample.name, labels) not in found
        found[sample.name, labels] = sample.value
    return found


def value(metrics: Metrics, name: str, **labels: str) -> float:
    return samples(metrics)[name, tuple(sorted(labels.items()))]


def test_the_engines_figures_are_read_at_each_scrape() -> None:
    now = [STATS]
    metrics = Metrics("m", lambda: now[0])
    expected = {
        "vllm:num_requests_running": 3,
        "vllm:num_requests_waiting": 5,
        "vllm:kv_cache_usage_perc": 0.25,
        "vllm:prefix_cache_queries_total": 80,
        "vllm:prefix_cache_hits_total": 32,
        "vllm:num_preemptions_total": 2,
        "vllm:prompt_tokens_total": 48 + 32,
        "vllm:generation_tokens_total": 700,
        "tgi_queue_size": 5,
        "tgi_batch_current_size": 3,
        "tgi_batch_inference_count": 40,
        "tgi_batch_inference_success": 40,
        "tgi_batch_inference_duration_sum": 10,
        "tgi_batch_inference_duration_count": 40,
        "tgi_batch_forward_duration_sum": 8,
        "tgi_batch_forward_duration_count": 40,
    }
    assert {name: samples(metrics)[name, ()] for name in expected} == expected
    now[0] = replace(STATS, running=0, tokens_generated=701)
    assert value(metrics, "tgi_batch_current_size") == 0
    assert value(metrics, "vllm:generation_tokens_total") == 701


@pytest.mark.parametrize(
    ("name", "twin", "expected"),
    [
        ("vllm:request_prompt_tokens", "tgi_request_input_length", 7),
        ("vllm:request_generation_tokens", "tgi_request_generated_tokens", 9),
        ("vllm:request_params_n", None, 1),
        ("vllm:request_params_max_tokens", "tgi_request_max_new_tokens", 32),
        ("vllm:time_to_first_token_seconds", None, 2.0),
        ("vllm:e2e_request_latency_seconds", "tgi_request_duration", 6.0),
        ("vllm:request_queue_time_seconds", "tgi_request_queue_duration", 0.75),
        ("vllm:request_inference_time_seconds", "tgi_request_inference_duration", 5.0),
        ("vllm:request_prefill_time_seconds", None, 1.0),
        ("vllm:request_decode_time_seconds", None, 4.0),
        ("vllm:request_time_per_output_token_seconds", None, 4.0 / 8),
        (None, "tgi_request_validation_duration", 0.25),
        (None, "tgi_request_mean_time_per_token_duration", 5.0 / 9),
    ],
)
def test_a_request_is_observed_once_under_each_name(name: str | None, twin: str | None, expected: float) -> None:
    metrics = make()
    metrics.observe(TIMING)
    found = samples(metrics)
    for histogram in filter(None, (name, twin)):
        assert found[f"{histogram}_count", ()] == 1
        assert found[f"{histogram}_sum", ()] == pytest.approx(expected)
        buckets = [
            (dict(labels)["le"], count) for (key, labels), count in found.items() if key == f"{histogram}_bucket"
        ]
        assert all(count == (float(edge) >= expected) for edge, count in buckets)
        assert len(buckets) > 5


def test_seconds_have_buckets_from_a_millisecond_to_ten_minutes() -> None:
    metrics = make()
    metrics.inter_token(0.0005)
    metrics.inter_token(1000)
    name = "vllm:inter_token_latency_seconds"
    assert value(metrics, f"{name}_bucket", le="0.001") == 1
    assert value(metrics, f"{name}_bucket", le="600.0") == 1
    assert value(metrics, f"{name}_count") == 2


def test_times_of_several_sequences_are_of_each() -> None:
    metrics = make()
    metrics.observe(replace(TIMING, n=3, generated_tokens=27))
    assert value(metrics, "vllm:request_time_per_output_token_seconds_sum") == pytest.approx(4.0 / 8)
    assert value(metrics, "tgi_request_mean_time_per_token_duration_sum") == pytest.approx(5.0 / 9)
    assert value(metrics, "vllm:request_generation_tokens_sum") == 27


def test_an_unknown_start_leaves_the_wait_out_and_counts_from_the_submission() -> None:
    metrics = make()
    metrics.observe(replace(TIMING, started=None, max_tokens=None))
    assert value(metrics, "vllm:request_queue_time_seconds_count") == 0
    assert value(metrics, "tgi_request_queue_duration_count") == 0
    assert value(metrics, "vllm:request_params_max_tokens_count") == 0
    assert value(metrics, "vllm:request_inference_time_seconds_sum") == 5.75
    assert value(metrics, "vllm:request_prefill_time_seconds_sum") == 1.75


def test_one_token_has_no_time_between_tokens_and_none_no_first() -> None:
    metrics = make()
    metrics.observe(replace(TIMING, generated_tokens=1))
    assert value(metrics, "vllm:request_time_per_output_token_seconds_count") == 0
    assert value(metrics, "tgi_request_mean_time_per_token_duration_count") == 1
    metrics.observe(replace(TIMING, generated_tokens=0, first_token=None))
    assert value(metrics, "tgi_request_mean_time_per_token_duration_count") == 1
    assert value(metrics, "vllm:time_to_first_token_seconds_count") == 1
    assert value(metrics, "vllm:request_decode_time_seconds_count") == 1
    assert value(metrics, "vllm:e2e_request_latency_seconds_count") == 2


@pytest.mark.parametrize("finish", ["abort", "error", "no such reason"])
def test_what_did_not_end_well_has_no_duration(finish: str) -> None:
    metrics = make()
    metrics.observe(replace(TIMING, finish=finish))
    for name in (
        "vllm:e2e_request_latency_seconds",
        "vllm:request_generation_tokens",
        "tgi_request_duration",
        "tgi_request_validation_duration",
        "tgi_request_mean_time_per_token_duration",
    ):
        assert value(metrics, f"{name}_count") == 0
    for name in ("vllm:request_prompt_tokens", "tgi_request_max_new_tokens", "vllm:time_to_first_token_seconds"):
        assert value(metrics, f"{name}_count") == 1


def test_each_request_is_a_success_or_a_failure() -> None:
    metrics = make()
    for finish, times in (("stop", 4), ("length", 3), ("abort", 2), ("error", 1), ("no such reason", 1)):
        for _ in range(times):
            metrics.observe(replace(TIMING, finish=finish))
    for reason in ("overloaded", "overloaded", "unavailable", "invalid", "too_large", "no such kind"):
        metrics.rejected(reason)
    for reason, count in (("stop", 4), ("length", 3), ("abort", 2), ("error", 2)):
        assert value(metrics, "vllm:request_success_total", finished_reason=reason) == count
    assert value(metrics, "vllm:admission_rejections_total", reason="overloaded") == 2
    assert value(metrics, "vllm:admission_rejections_total", reason="unavailable") == 1
    failures = {"dropped": 2, "generation": 2, "overloaded": 2, "unavailable": 1, "validation": 2, "other": 1}
    assert {
        dict(labels)["err"]: count
        for (name, labels), count in samples(metrics).items()
        if name == "tgi_request_failure"
    } == failures
    assert value(metrics, "tgi_request_success") == 7
    assert value(metrics, "tgi_request_count") == 7 + sum(failures.values())


def test_every_series_that_can_be_shown_from_the_start_is() -> None:
    metrics = make()
    before = set(samples(metrics))
    for finish in FinishReason:
        metrics.observe(replace(TIMING, finish=finish))
    for reason in ("overloaded", "unavailable", "invalid"):
        metrics.rejected(reason)
    assert set(samples(metrics)) == before


def test_http_requests_are_counted_by_fixed_labels() -> None:
    metrics = make()
    metrics.http("/generate", "POST", 200)
    metrics.http("/generate", "POST", 204)
    metrics.http("/etc/passwd", "BREW", 99)
    assert value(metrics, "http_requests_total", handler="/generate", method="POST", status="2xx") == 2
    assert value(metrics, "http_requests_total", handler="other", method="other", status="other") == 1


def test_facts_about_the_server_are_labels() -> None:
    metrics = Metrics("m", lambda: STATS, facts={"version": "1.2", "threads": 8})
    assert value(metrics, "squawq_info", version="1.2", threads="8") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="the process' figures are read from /proc")
def test_the_process_has_figures() -> None:
    text = "\n".join(lines(make()))
    for name in ("process_start_time_seconds", "process_resident_memory_bytes", "process_cpu_seconds_total"):
        assert f"\n{name} " in text


def test_tgis_counters_keep_their_names_and_type() -> None:
    metrics = make()
    metrics.observe(TIMING)
    text = lines(metrics)
    for name in ("tgi_request_count", "tgi_request_success", "tgi_request_failure", "tgi_batch_inference_count"):
        assert f"# TYPE {name} counter" in text
        assert any(line.startswith((f"{name} ", f"{name}{{")) for line in text)
    assert not any(line.startswith("tgi_") and "_total" in line for line in text)
    assert "# TYPE vllm:generation_tokens_total counter" in text


def test_openmetrics_is_given_to_those_who_ask_and_holds_the_same() -> None:
    metrics = make()
    metrics.observe(TIMING)
    metrics.http("/generate", "POST", 200)
    prometheus = f"{OPENMETRICS};version=1.0.0;escaping=allow-utf-8;q=0.5,text/plain;version=0.0.4;q=0.3,*/*;q=0.1"
    for accept in (OPENMETRICS, prometheus, f"text/html, {OPENMETRICS.upper()}; version=x"):
        body, kind = metrics.render(accept)
        assert kind.startswith(f"{OPENMETRICS}; version=1.0.0")
        assert body.endswith(b"# EOF\n")
    for accept in ("", "*/*", "text/plain", "application/json", "\n;,=,;"):
        assert metrics.render(accept)[1] == "text/plain; version=0.0.4; charset=utf-8"

    assert samples(metrics, OPENMETRICS) == samples(metrics)
    assert families(metrics, OPENMETRICS)["vllm:generation_tokens"].type == "counter"


def test_two_servers_in_a_process_share_nothing() -> None:
    before = {family.name for family in REGISTRY.collect()}
    one, two = make(), make()
    one.observe(TIMING)
    one.rejected("overloaded")
    one.http("/generate", "POST", 200)
    assert value(one, "tgi_request_count") == 2
    assert value(two, "tgi_request_count") == 0
    assert not any(name == "http_requests_total" for name, _ in samples(two))
    assert {family.name for family in REGISTRY.collect()} == before


def test_figures_that_cannot_be_read_leave_the_rest(caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> Stats:
        raise RuntimeError("no engine")

    metrics = Metrics("m", broken)
    metrics.observe(TIMING)
    assert value(metrics, "tgi_request_success") == 1
    assert not any(name == "tgi_queue_size" for name, _ in samples(metrics))
    assert "no engine" in caplog.text


def test_a_model_without_pages_and_with_a_strange_name_can_be_shown() -> None:
    metrics = Metrics('a"\n\udcff\\', lambda: replace(STATS, pages=0, pages_used=0))
    family = families(metrics)["vllm:kv_cache_usage_perc"]
    assert [(sample.labels, sample.value) for sample in family.samples] == [({"model_name": 'a"\n?\\'}, 0.0)]


def test_calls_from_many_threads_are_all_counted() -> None:
    metrics = make()

    def work() -> None:
        for _ in range(200):
            metrics.observe(TIMING)
            metrics.rejected("invalid")
            metrics.inter_token(0.1)
            metrics.http("/generate", "POST", 200)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for _ in range(5):
        metrics.render()
    for thread in threads:
        thread.join()
    assert value(metrics, "tgi_request_count") == 3200
    assert value(metrics, "tgi_request_duration_count") == 1600
    assert value(metrics, "vllm:inter_token_latency_seconds_count") == 1600
    assert value(metrics, "http_requests_total", handler="/generate", method="POST", status="2xx") == 1600


TIMES = st.floats() | st.none()
NUMBERS = st.floats() | st.integers(-(2**63), 2**63)
ANYTHING = st.text(st.characters(exclude_categories=())) | st.sampled_from(
    [*KINDS, *METHODS, *FinishReason, "/generate"]
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(ANYTHING, ANYTHING, ANYTHING, st.integers(), TIMES, NUMBERS), max_size=20), ANYTHING)
def test_whatever_comes_in_the_labels_are_ours_and_a_scrape_can_be_parsed(
    calls: list[tuple[str, str, str, int, float | None, float]], accept: str
) -> None:
    metrics = make()
    for route, method, reason, status, moment, number in calls:
        metrics.http(route, method, status)
        metrics.rejected(reason)
        metrics.inter_token(number)
        size = status if abs(status) < 2**63 else 0
        metrics.observe(Timing(number, number, number, size, size, reason, moment, moment, size, size))
    metrics.render(accept)
    allowed = {
        "handler": {"/generate", "/v1/completions", "other"},
        "method": METHODS | {"other"},
        "status": {"1xx", "2xx", "3xx", "4xx", "5xx", "other"},
        "finished_reason": set(FinishReason),
        "reason": {"overloaded", "unavailable"},
        "err": {kind.tgi_type for kind in KINDS.values()} | {"dropped", "generation", "other"},
        "model_name": {"m"},
    }
    for accept in ("", OPENMETRICS):
        for family in families(metrics, accept).values():
            for sample in family.samples:
                assert sample.labels.keys() <= {*allowed, "le"}
                assert all(text in allowed[label] for label, text in sample.labels.items() if label != "le")
