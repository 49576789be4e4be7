"""The server against its own OpenAPI document, by schemathesis: statuses, content types and replies are as it says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from running import Running, running
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error, positive_data_acceptance
from schemathesis.core.result import Ok

from squawq.serve.app import ROUTES


@pytest.fixture(scope="module", params=["openai", "tgi"])
def small(request: pytest.FixtureRequest) -> Iterator[Running]:
    """A server whose answers are short, whatever a body asks for."""
    with running(dialect=request.param, max_model_len=64, max_choices=2, max_prompts=2) as found:
        yield found


def operations(server: Running) -> Iterator[Any]:
    """What the document lists."""
    document = schemathesis.openapi.from_dict(server.get("/openapi.json").json())
    document.config.update(base_url=server.url)
    for found in document.get_all_operations():
        assert isinstance(found, Ok)
        yield found.ok()


def validate(case: Any) -> int:
    """Send a request and check its reply; returns the status. That an allowed body is accepted is not checked: no
    schema says what holds between two fields."""
    excluded = [positive_data_acceptance, *([] if ROUTES[case.operation.label].content else [not_a_server_error])]
    response = case.call_and_validate(timeout=60, excluded_checks=excluded)
    return int(response.status_code)


def test_every_route_is_documented(small: Running) -> None:
    found = {operation.label: operation.definition.raw["operationId"] for operation in operations(small)}
    assert set(found) == set(ROUTES)
    assert len(set(found.values())) == len(ROUTES)


def test_examples_work(small: Running) -> None:
    """Each example in the document gets the reply that is documented, whole and in events."""
    count = 0
    for operation in operations(small):
        examples = operation.definition.raw.get("requestBody", {}).get("content", {}).get("application/json", {})
        for example in examples.get("examples", {}).values():
            bodies = [example["value"]]
            if "text/event-stream" in ROUTES[operation.label].content:
                bodies.append({**bodies[0], "stream": True})
            for body in bodies:
                assert validate(operation.Case(body=body, media_type="application/json")) == 200
                count += 1
    assert count > 15


def test_generated_requests(small: Running) -> None:
    """Requests that the document allows, and others; the same ones in every run."""
    for operation in operations(small):
        modes = [operation.as_strategy(generation_mode=mode) for mode in GenerationMode]

        @settings(max_examples=25, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
        @given(case=st.one_of(modes))
        def check(case: Any) -> None:
            validate(case)

        check()
    assert small.served.engine.alive
    assert small.idle()
