"""Prometheus metrics under vLLM's names (vllm:*) and TGI's (tgi_*), from one registry.

Label values come from fixed sets, whatever a request holds. The engine's figures are read at each scrape. TGI's
counters have no suffix _total: they are "counter" in the text format and "unknown" in OpenMetrics, which requires it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, choose_encoder
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    SummaryMetricFamily,
    UnknownMetricFamily,
)
from prometheus_client.openmetrics.exposition import CONTENT_TYPE_LATEST

from squawq.engine.protocol import Stats
from squawq.engine.request import FinishReason
from squawq.serve.errors import KINDS

logger = logging.getLogger("squawq.serve")
OTHER = "other"
METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))
ADMISSION = ("overloaded", "unavailable")  # errors that say nothing about the request itself
COMPLETE = (FinishReason.STOP, FinishReason.LENGTH)
FAILURES = {FinishReason.ABORT: "dropped", FinishReason.ERROR: "generation"}  # TGI's words

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
_SEQUENCES = (1, 2, 4, 8, 16, 32, 64)
_WAITING = "Sequences that wait for their turn, and requests that are still being checked."
_STARTED = "from the end of its wait, or from its submission where that end is unknown,"
_RUNNING = f"Running a request, {_STARTED} to its last token."

# vLLM's name, TGI's name for the same quantity, buckets, help
_HISTOGRAMS: tuple[tuple[str, str, tuple[float, ...], str], ...] = (
    ("request_prompt_tokens", "tgi_request_input_length", _TOKENS, "Tokens of a prompt."),
    ("request_params_n", "", _SEQUENCES, "Sequences that a request asked for."),
    ("request_params_max_tokens", "tgi_request_max_new_tokens", _TOKENS, "New tokens that a request allowed."),
    ("time_to_first_token_seconds", "", _SECONDS, "From a request's arrival to its first token."),
    ("inter_token_latency_seconds", "", _SECONDS, "Between two tokens of a sequence."),
    ("request_generation_tokens", "tgi_request_generated_tokens", _TOKENS, "Tokens that a request generated."),
    ("e2e_request_latency_seconds", "tgi_request_duration", _SECONDS, "From a request's arrival to its end."),
    ("request_queue_time_seconds", "tgi_request_queue_duration", _SECONDS, "From a request's submission to its start."),
    ("request_inference_time_seconds", "tgi_request_inference_duration", _SECONDS, _RUNNING),
    ("request_prefill_time_seconds", "", _SECONDS, f"A request's prompt, {_STARTED} to its first token."),
    ("request_decode_time_seconds", "", _SECONDS, "From a request's first token to its last."),
    ("request_time_per_output_token_seconds", "", _SECONDS, "Mean time of a request's tokens after the first."),
)
_FINISHES = frozenset(FinishReason)
# The default escaping would write vllm:x as vllm_x in samples.
_OPENMETRICS = "application/openmetrics-text; version=1.0.0; escaping=allow-utf-8"
_UNTYPED = re.compile(rb"^(# TYPE tgi_\w+) untyped$", re.MULTILINE)


@dataclass
class Timing:
    """A generation request's times, in seconds of time.perf_counter, and counts. None: unknown, or never reached.

    Attributes:
        validated: When it was submitted to the engine.
        ended: When it ended, or when this record of a running request was made.
        generated_tokens: Of all its sequences.
        finish: A FinishReason; any other value counts as "error".
        started: When it left the queue.
        max_tokens: Limit of each sequence.
    """

    arrived: float
    validated: float | None = None
    ended: float = 0.0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    finish: str = FinishReason.ERROR
    started: float | None = None
    first_token: float | None = None
    n: int = 1
    max_tokens: int | None = None


class Metrics:
    """The metrics of one server. Thread-safe.

    Args:
        stats: Called at each scrape.
        routes: Requests are counted by these names; all others together.
        facts: Labels of squawq_info, such as the version and the device.
    """

    def __init__(
        self,
        model_name: str,
        stats: Callable[[], Stats],
        routes: Iterable[str] = (),
        facts: Mapping[str, object] | None = None,
    ) -> None:
        self._model = model_name.encode("utf-8", "replace").decode("utf-8")  # a path may hold what UTF-8 does not
        self._stats = stats
        self._routes = frozenset(routes)
        self._facts = {name: str(value) for name, value in (facts or {}).items()}
        self._registry = registry = CollectorRegistry()
        self._histograms = {
            name: Histogram(f"vllm:{name}", text, ["model_name"], registry=registry, buckets=buckets)
            for name, _, buckets, text in _HISTOGRAMS
        }
        self._values = {name: histogram.labels(self._model) for name, histogram in self._histograms.items()}
        seconds = partial(Histogram, registry=registry, buckets=_SECONDS)
        self._validation = seconds("tgi_request_validation_duration", "From a request's arrival to its submission.")
        text = "Inference time of a request over its tokens."
        self._per_token = seconds("tgi_request_mean_time_per_token_duration", text)
        self._finished = Counter(
            "vllm:request_success",
            "Requests that ended, by reason.",
            ["model_name", "finished_reason"],
            registry=registry,
        )
        for reason in FinishReason:
            self._finished.labels(self._model, reason.value)
        self._http = Counter(
            "http_requests", "HTTP requests that were answered.", ["handler", "method", "status"], registry=registry
        )
        self._rejected = Counter("rejected", "Shown by each dialect in its own way.", ["err"], registry=None)
        for err in (*ADMISSION, "validation"):
            self._rejected.labels(err)
        registry.register(self)
        ProcessCollector(registry=registry)  # memory, CPU time and start of the process, on Linux

    def observe(self, request: Timing) -> None:
        """Count a request at its end. Histograms of durations and tokens only take complete ones."""
        finish = request.finish if request.finish in _FINISHES else FinishReason.ERROR.value
        self._finished.labels(self._model, str(finish)).inc()
        values = {
            "request_prompt_tokens": request.prompt_tokens,
            "request_params_n": request.n,
            "request_params_max_tokens": request.max_tokens,
            "time_to_first_token_seconds": _span(request.arrived, request.first_token),
        }
        if finish in COMPLETE:
            begun = request.validated if request.started is None else request.started
            inference, decode = _span(begun, request.ended), _span(request.first_token, request.ended)
            tokens = request.generated_tokens / max(1, request.n)
            values |= {
                "request_generation_tokens": request.generated_tokens,
                "e2e_request_latency_seconds": _span(request.arrived, request.ended),
                "request_queue_time_seconds": _span(request.validated, request.started),
                "request_inference_time_seconds": inference,
                "request_prefill_time_seconds": _span(begun, request.first_token),
                "request_decode_time_seconds": decode,
                "request_time_per_output_token_seconds": _share(decode, tokens - 1),
            }
            _add(self._validation, _span(request.arrived, request.validated))
            _add(self._per_token, _share(inference, tokens))
        for name, value in values.items():
            _add(self._values[name], value)

    def rejected(self, reason: str) -> None:
        """Count a refused generation request. Reasons that are not in errors.KINDS count as "other"."""
        self._rejected.labels(KINDS[reason].tgi_type if reason in KINDS else OTHER).inc()

    def inter_token(self, seconds: float) -> None:
        _add(self._values["inter_token_latency_seconds"], seconds)

    def http(self, route: str, method: str, status: int) -> None:
        """Count an HTTP request by its route template; unknown ones count as "other"."""
        self._http.labels(
            route if route in self._routes else OTHER,
            method if method in METHODS else OTHER,
            f"{status // 100}xx" if 100 <= status < 600 else OTHER,
        ).inc()

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """The metrics and their content type: OpenMetrics if the Accept header names it, else the text format."""
        asked = {part.partition(";")[0].strip().lower() for part in accept.split(",")}
        if "application/openmetrics-text" in asked:
            encode, _ = choose_encoder(_OPENMETRICS)
            return encode(self._registry), CONTENT_TYPE_LATEST
        return _UNTYPED.sub(rb"\1 counter", generate_latest(self._registry)), CONTENT_TYPE_PLAIN_0_0_4

    def collect(self) -> Iterator[Metric]:
        """The engine's figures, and TGI's view of the other metrics; called by the registry."""
        try:
            stats = self._stats()
        except Exception:
            logger.exception("the engine's figures could not be read")
        else:
            yield from self._engine(stats)
        info = GaugeMetricFamily(
            "squawq_info", "What runs, in its labels; always 1.", labels=["model_name", *self._facts]
        )
        info.add_metric([self._model, *self._facts.values()], 1)
        yield info
        yield from self._tgi()

    def _engine(self, stats: Stats) -> Iterator[Metric]:
        pages, prompt = stats.pages_used / max(1, stats.pages), stats.prompt_tokens_computed + stats.prefix_hits
        prompt_text = "Prompt tokens run or found in the cache; again for a preempted sequence."
        preempted = "Sequences that gave way to others: for their turn, or for pages."
        kind: type[GaugeMetricFamily | CounterMetricFamily]
        for kind, name, value, text in (
            (GaugeMetricFamily, "num_requests_running", stats.running, "Sequences under way."),
            (GaugeMetricFamily, "num_requests_waiting", stats.waiting, _WAITING),
            (GaugeMetricFamily, "kv_cache_usage_perc", pages, "Share of the pages that is in use, 0 to 1."),
            (
                CounterMetricFamily,
                "prefix_cache_queries",
                stats.prefix_queries,
                "Tokens looked for in the prefix cache.",
            ),
            (CounterMetricFamily, "prefix_cache_hits", stats.prefix_hits, "Tokens found in the prefix cache."),
            (CounterMetricFamily, "num_preemptions", stats.preemptions, preempted),
            (CounterMetricFamily, "prompt_tokens", prompt, prompt_text),
            (CounterMetricFamily, "generation_tokens", stats.tokens_generated, "Tokens generated."),
        ):
            family = kind(f"vllm:{name}", text, labels=["model_name"])
            family.add_metric([self._model], value)
            yield family
        yield GaugeMetricFamily("tgi_queue_size", _WAITING, stats.waiting)
        yield GaugeMetricFamily("tgi_batch_current_size", "Sequences under way.", stats.running)
        text = "Steps of the engine; one holds prefill and decode alike."
        yield UnknownMetricFamily("tgi_batch_inference_count", text, stats.steps)
        yield UnknownMetricFamily("tgi_batch_inference_success", text, stats.steps)
        for name, seconds, text in (
            ("tgi_batch_inference_duration", stats.step_seconds, "Time of the engine's steps."),
            ("tgi_batch_forward_duration", stats.runner_seconds, "Time of those steps in the model."),
        ):
            yield SummaryMetricFamily(name, text, count_value=stats.steps, sum_value=seconds)

    def _tgi(self) -> Iterator[Metric]:
        finished = {FinishReason(key): value for key, value in _counts(self._finished, "finished_reason").items()}
        rejected = _counts(self._rejected, "err")
        success = sum(finished[reason] for reason in COMPLETE)
        errors = {err: finished[reason] for reason, err in FAILURES.items()}
        for err, count in rejected.items():
            errors[err] = errors.get(err, 0) + count
        total = success + sum(errors.values())
        yield UnknownMetricFamily("tgi_request_count", "Requests that ended or were refused.", total)
        yield UnknownMetricFamily("tgi_request_success", "Requests that ran to their end.", success)
        failure = UnknownMetricFamily("tgi_request_failure", "Requests that did not, by reason.", labels=["err"])
        for err, count in errors.items():
            failure.add_metric([err], count)
        yield failure
        text = "Requests refused by a server that is full or closing."
        refused = CounterMetricFamily("vllm:admission_rejections", text, labels=["model_name", "reason"])
        for err in ADMISSION:
            refused.add_metric([self._model, err], rejected[err])
        yield refused
        for name, twin, _, text in _HISTOGRAMS:
            if twin:
                yield _twin(self._histograms[name], twin, text)


def _span(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else end - start


def _share(seconds: float | None, tokens: float) -> float | None:
    return None if seconds is None or tokens <= 0 else seconds / tokens


def _add(histogram: Histogram, value: float | None) -> None:
    if value is not None:
        histogram.observe(max(0.0, value))


def _counts(counter: Counter, label: str) -> dict[str, float]:
    samples = (sample for family in counter.collect() for sample in family.samples)
    return {sample.labels[label]: sample.value for sample in samples if sample.name.endswith("_total")}


def _twin(histogram: Histogram, name: str, text: str) -> Metric:
    """A histogram under another name, without its label."""
    samples = [sample for family in histogram.collect() for sample in family.samples]
    buckets = [(sample.labels["le"], sample.value) for sample in samples if sample.name.endswith("_bucket")]
    total = next(sample.value for sample in samples if sample.name.endswith("_sum"))
    return HistogramMetricFamily(name, text, buckets=buckets, sum_value=total)
