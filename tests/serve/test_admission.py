"""Who is let in: no key can lock out another, and all together keep to what the connections are made for."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from squawq.engine.request import Request, SamplingParams
from squawq.errors import ConfigError
from squawq.serve.errors import ApiError
from squawq.serve.limits import Admission, cost
from squawq.serve.settings import ServerSettings


def settings(keys: int, most: int) -> ServerSettings:
    return ServerSettings(model="m", api_keys=tuple(map(str, range(keys))), max_num_seqs=1, max_queued=most - 1)


@given(st.integers(1, 4), st.integers(1, 8), st.lists(st.integers(0, 3), max_size=40))
def test_no_key_locks_out_another_and_connections_suffice(keys: int, most: int, asking: list[int]) -> None:
    limits = settings(keys, most)
    admission = Admission(limits)
    with ExitStack() as stack:
        for number in asking:
            with suppress(ApiError):
                stack.enter_context(admission.admitted(str(number % keys), 100))
            assert admission.load.requests <= limits.most_under_way < limits.connections
        ready = not admission.full
        let_in = set()
        for key in map(str, range(keys)):
            idle = not admission.tenants[key].requests
            try:
                with admission.admitted(key, 1):
                    let_in.add(key)
            except ApiError:
                assert not idle, "a key with nothing under way was refused"
        assert ready == bool(let_in)
    assert admission.load.requests == admission.load.size == 0


@pytest.mark.parametrize(("keys", "most", "needed"), [(1, 4, 4), (2, 4, 6), (3, 4, 6), (8, 4, 11)])
def test_connections_that_contradict_are_refused(keys: int, most: int, needed: int) -> None:
    given: dict[str, Any] = {
        "model": "m",
        "api_keys": tuple(map(str, range(keys))),
        "max_num_seqs": 1,
        "max_queued": most - 1,
    }
    assert ServerSettings(**given, max_connections=needed + 1).connections == needed + 1
    with pytest.raises(ConfigError, match=f"max_connections is {needed}, but up to {needed} requests"):
        ServerSettings(**given, max_connections=needed)
    assert ServerSettings(**given).connections > needed


def test_a_unix_socket_has_no_port_for_metrics() -> None:
    with pytest.raises(ConfigError, match="prometheus_port is 9000 beside the Unix socket"):
        ServerSettings(model="m", uds=Path("s"), prometheus_port=9000)


def test_log_probabilities_cost_what_they_hold() -> None:
    def costs(**params: Any) -> int:
        return cost([Request("r", [5] * 1000, SamplingParams(max_tokens=500, **params))])

    plain = costs()
    assert costs(logprobs=0) == plain, "as any stream of TGI asks"
    assert costs(logprobs=20) - plain > 100 * 20 * 500
    assert costs(logprobs=20, n=3) - costs(n=3) == 3 * (costs(logprobs=20) - plain)
    assert costs(prompt_logprobs=20) - plain > 100 * 21 * 1000
