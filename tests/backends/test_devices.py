"""Devices that are not there are refused with those that are."""

from __future__ import annotations

import pytest
import torch

from squawq.backends.cuda.backend import CudaBackend
from squawq.backends.devices import check_device, pick_device
from squawq.engine.config import EngineConfig
from squawq.errors import ConfigError
from squawq.serve.settings import ServerSettings


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)


@pytest.mark.parametrize("device", ["mps", "gpu", ""])
def test_a_plain_machine_has_its_cpu(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    check_device("cpu", mps=True)
    with pytest.raises(ConfigError, match=f"device '{device}' is not there; choose one of cpu$"):
        check_device(device, mps=True)


def test_what_is_there(gpus: None) -> None:
    for device in ("cpu", "cuda", "cuda:0", "cuda:1", "mps"):
        check_device(device, mps=True)
    with pytest.raises(ConfigError, match=r"'cuda:2' is not there; choose one of cpu, cuda, cuda:0, cuda:1, mps$"):
        check_device("cuda:2", mps=True)


def test_apples_gpu_is_not_for_everything(gpus: None) -> None:
    with pytest.raises(ConfigError, match=r"'mps' is not there; choose one of cpu, cuda, cuda:0, cuda:1$"):
        check_device("mps")


@pytest.mark.parametrize(
    ("available", "reason", "exact", "expected"),
    [
        (True, None, False, "cuda"),
        (True, None, True, "cpu"),
        (True, "older than Ampere", False, "cpu"),
        (False, None, False, "cpu"),
    ],
)
def test_auto_takes_a_gpu_that_the_backend_takes(
    available: bool, reason: str | None, exact: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(CudaBackend, "declines", classmethod(lambda *_: reason))
    assert pick_device("auto", exact=exact) == expected
    assert EngineConfig(exact=exact).device == EngineConfig(device="auto", exact=exact).device == expected
    assert ServerSettings(model="m", exact=exact).device == expected
    assert EngineConfig(device="cuda:1").device == "cuda:1" == pick_device("cuda:1")
