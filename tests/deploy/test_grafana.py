"""The dashboard asks for metrics and labels that a server has."""

from __future__ import annotations

import json
import re
import urllib.request
from pathlib import Path

from running import process

from squawq.demo import demo_model

DASHBOARD = Path(__file__).parents[2] / "deploy" / "grafana.json"
LABELS = {"instance", "job"}  # Prometheus adds these


def test_the_dashboard() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}
    assert len(places) == len({panel["id"] for panel in panels}) == len(panels)
    with process(["serve", str(demo_model()), "--port", "0", "--device", "cpu", "--threads", "1"]) as (_, url):
        told = json.dumps({"prompt": "Once", "max_tokens": 4}).encode()
        request = urllib.request.Request(f"{url}/v1/completions", told, {"Content-Type": "application/json"})
        urllib.request.urlopen(request, timeout=60).close()
        with urllib.request.urlopen(f"{url}/metrics", timeout=60) as answer:
            lines = answer.read().decode().splitlines()
    there: dict[str, set[str]] = {}
    for line in lines:
        if found := re.match(r"([a-z_:0-9]+)(?:\{(.*)\})? ", line):
            there.setdefault(found[1], set()).update(re.findall(r'([a-z_]+)="', found[2] or ""))
    asked = [target["expr"] for panel in panels for target in panel["targets"]]
    assert len(asked) > len(panels)
    for expression in asked:
        names = re.findall(r"(vllm:[a-z_0-9]+|tgi_[a-z_0-9]+)", expression)
        assert names, expression
        for name in names:
            assert name in there, f"{name} is no metric of a server"
        used = {
            "model_name",
            *(label for group in re.findall(r"by \((.*?)\)", expression) for label in group.split(", ")),
        }
        assert used <= set.union(*(there[name] for name in names)) | LABELS, expression
