"""The Helm chart: Helm renders it, the Kubernetes schemas accept the objects, and a server starts as they say."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import urllib.error
import urllib.request
from typing import Any

import pytest
import yaml
from test_image import DEPLOY, container, wait_until_healthy
from test_nginx import free_port

from squawq import __version__
from squawq.demo import demo_model
from squawq.serve.settings import ServerSettings

CHART = DEPLOY / "helm" / "squawq"
HELM = """
import json, sys
import helm_python as helm

chart, values, name = json.load(sys.stdin)
try:
    found = {"lint": helm.lint(chart, values, strict=True), "files": helm.Chart.load(chart).render(values, name=name)}
except helm.HelmError as error:
    found = {"error": str(error)}
print(json.dumps(found))
"""  # in a process of its own: Go sets signal handlers

EVERYTHING: dict[str, Any] = {
    "model": "/model",
    "modelVolume": {"persistentVolumeClaim": {"claimName": "models"}},
    "gpus": 2,
    "args": ["--max-model-len", "4096"],
    "env": [{"name": "SQUAWQ_LOG_FORMAT", "value": "json"}],
    "apiKey": {"secret": "squawq"},
    "hubToken": {"secret": "hub"},
    "cache": {"size": "50Gi", "storageClassName": "fast"},
    "runtimeClassName": "nvidia",
    "imagePullSecrets": [{"name": "registry"}],
    "nodeSelector": {"gpu": "h200"},
    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
    "affinity": {"podAntiAffinity": {}},
    "metrics": {"serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}}, "dashboard": True},
}


def helm(values: dict[str, Any], name: str = "demo") -> dict[str, Any]:
    if importlib.util.find_spec("helm_python") is None:
        pytest.skip("needs helm-python-sdk")
    told = json.dumps([str(CHART), values, name])
    done = subprocess.run([sys.executable, "-c", HELM], input=told, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def render(name: str = "demo", **values: Any) -> dict[str, Any]:
    """The chart's objects by kind; Helm's linter has no objection."""
    found = helm(values, name)
    assert "error" not in found, found
    assert [message for message in found["lint"]["messages"] if message["severity"] > 1] == []
    assert found["lint"]["errors"] == []
    objects = [yaml.safe_load(text) for text in found["files"].values()]
    return {entry["kind"]: entry for entry in objects if entry is not None}


def pod(objects: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The pod's template and its container."""
    template = objects["Deployment"]["spec"]["template"]
    return template, template["spec"]["containers"][0]


def test_defaults() -> None:
    objects = render(model="org/model")
    assert set(objects) == {"Deployment", "Service"}
    template, server = pod(objects)
    assert server["args"] == ["--model", "org/model", "--shutdown-timeout", "30"]
    assert {entry["name"]: entry.get("value") for entry in server["env"]} == {"PORT": "8080", "HOME": "/tmp"}
    assert server["ports"] == [{"name": "http", "containerPort": 8080}]
    assert server["resources"]["limits"] == {"nvidia.com/gpu": 1}
    probes = {kind: server[f"{kind}Probe"] for kind in ("startup", "readiness", "liveness")}
    paths = {kind: probe["httpGet"]["path"] for kind, probe in probes.items()}
    assert paths == {"startup": "/readyz", "readiness": "/readyz", "liveness": "/livez"}
    assert {probe["httpGet"]["port"] for probe in probes.values()} == {"http"}
    assert probes["startup"]["periodSeconds"] * probes["startup"]["failureThreshold"] == 1800
    wait = int(server["lifecycle"]["preStop"]["exec"]["command"][1])
    assert template["spec"]["terminationGracePeriodSeconds"] > wait + ServerSettings(model="m").shutdown_timeout
    assert template["metadata"]["annotations"]["prometheus.io/port"] == "8080"
    assert template["spec"]["enableServiceLinks"] is False
    assert template["spec"]["securityContext"]["runAsNonRoot"] is True
    assert server["securityContext"]["readOnlyRootFilesystem"] is True
    volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
    assert {mount["name"]: mount["mountPath"] for mount in server["volumeMounts"]} == {
        "tmp": "/tmp",
        "shared-memory": "/dev/shm",
        "cache": "/data",
    }
    assert volumes["shared-memory"]["emptyDir"]["medium"] == "Memory"
    service = objects["Service"]["spec"]
    assert service["ports"] == [{"name": "http", "port": 80, "targetPort": "http"}]
    assert service["selector"].items() <= template["metadata"]["labels"].items()
    assert objects["Deployment"]["spec"]["selector"]["matchLabels"] == service["selector"]


def test_everything() -> None:
    objects = render(**EVERYTHING)
    template, server = pod(objects)
    assert server["args"][4:] == ["--tensor-parallel-size", "2", "--max-model-len", "4096"]
    assert server["resources"]["limits"]["nvidia.com/gpu"] == 2
    secrets = {entry["name"]: entry["valueFrom"]["secretKeyRef"] for entry in server["env"] if "valueFrom" in entry}
    assert secrets["SQUAWQ_API_KEY"] == {"name": "squawq", "key": "api-key"}
    assert secrets["HF_TOKEN"] == {"name": "hub", "key": "token"}
    assert "annotations" not in template["metadata"]
    claims = {volume["name"]: volume.get("persistentVolumeClaim") for volume in template["spec"]["volumes"]}
    assert claims["model"] == {"claimName": "models"}
    assert claims["cache"] == {"claimName": objects["PersistentVolumeClaim"]["metadata"]["name"]}
    monitor = objects["ServiceMonitor"]
    assert monitor["metadata"]["labels"]["release"] == "prometheus"
    assert monitor["spec"]["selector"]["matchLabels"].items() <= objects["Service"]["metadata"]["labels"].items()
    assert monitor["spec"]["endpoints"] == [
        {
            "port": "http",
            "path": "/metrics",
            "interval": "15s",
            "authorization": {"credentials": {"name": "squawq", "key": "api-key"}},
        }
    ]
    assert objects["ConfigMap"]["data"]["squawq.json"] == (DEPLOY / "grafana.json").read_text()


def test_on_a_cpu_and_other_values() -> None:
    objects = render("squawq", model="/model", gpus=0, resources={"limits": {"memory": "9Gi"}}, shutdownTimeout=90)
    template, server = pod(objects)
    assert server["resources"]["limits"] == {"memory": "9Gi"}
    assert template["spec"]["terminationGracePeriodSeconds"] == 120
    assert "annotations" not in pod(render(model="m", apiKey={"secret": "s"}))[0]["metadata"]
    assert {entry["metadata"]["name"] for entry in objects.values()} == {"squawq"}


def test_kubernetes_accepts_the_objects() -> None:
    validator = pytest.importorskip("kubernetes_validate")
    for values in ({"model": "m"}, {"model": "m", "gpus": 0}, EVERYTHING):
        for kind, entry in render(**values).items():
            if kind != "ServiceMonitor":  # the Prometheus operator's
                for version in ("1.25", validator.latest_version()):
                    validator.validate(entry, version, strict=True)


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({}, "model is missing"),
        ({"model": "m", "gpu": 2}, "gpu"),
        ({"model": "m", "gpus": -1}, "gpus"),
        ({"model": "m", "args": ["--max-num-seqs", 64]}, "args/1"),
        ({"model": "m", "sharedMemory": "1 GB"}, "sharedMemory"),
        ({"model": "m", "metrics": {"serviceMonitor": True}}, "serviceMonitor"),
    ],
)
def test_wrong_values_are_refused(values: dict[str, Any], word: str) -> None:
    assert word in str(helm(values)["error"])


def test_the_version() -> None:
    assert yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"] == __version__


def test_a_server_starts_as_the_chart_says() -> None:
    """The chart's arguments and variables, on another port."""
    told = EVERYTHING | {"model": str(demo_model()), "gpus": 0}
    _, server = pod(render(**told))
    port = str(free_port())
    variables = {entry["name"]: entry.get("value", "SECRET") for entry in server["env"]} | {"PORT": port}
    del variables["HOME"]  # nothing is kept on a CPU
    with container([*server["args"], "--device", "cpu", "--threads", "1"], **variables) as running:
        wait_until_healthy(running, **variables)
        url = f"http://127.0.0.1:{port}"
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            with urllib.request.urlopen(url + server[probe]["httpGet"]["path"]) as answer:
                assert answer.status == 200
        with pytest.raises(urllib.error.HTTPError, match="401") as refused:
            urllib.request.urlopen(f"{url}/metrics")
        refused.value.close()
        request = urllib.request.Request(f"{url}/metrics", headers={"Authorization": "Bearer SECRET"})
        with urllib.request.urlopen(request) as answer:
            assert b"vllm:" in answer.read()
