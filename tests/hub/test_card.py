"""The model card: what it says, what it leaves out, and that its code is code."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from squawq.config import QuantConfig
from squawq.demo import demo_model
from squawq.errors import ConfigError, OutputError
from squawq.hub.card import Origin, front_matter, is_ours, model_card, write_card
from squawq.quantization.pipeline import quantize

REPO = "me/demo-AWQ"
SCORES = {
    "tokens": 2047,
    "window": 1024,
    "stride": 512,
    "perplexity": 23.0567,
    "reference_perplexity": 22.8061,
    "kl_mean": 0.03791,
    "kl_p99": 0.2211,
    "top1_agreement": 0.9012,
}


@pytest.fixture(scope="module")
def rounded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("card") / "demo-awq"
    quantize(demo_model(), folder, QuantConfig(method="rtn"))
    return folder


@pytest.fixture
def folder(rounded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(rounded, tmp_path / "demo-awq"))


def matter_of(card: str) -> dict[str, Any]:
    """The front matter as the Hub's own reader has it."""
    return {key: value for key, value in vars(ModelCard(card).data).items() if value is not None}


def python_of(card: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)


def test_front_matter_is_read_by_the_hub(folder: Path) -> None:
    origin = Origin(source=str(demo_model()), base_model="me/demo")
    assert matter_of(model_card(folder, REPO, origin)) == {
        "license": "cdla-sharing-1.0",
        "language": "en",
        "base_model": "me/demo",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["awq", "int4", "4-bit", "quantized", "squawq"],
    }


def test_nothing_is_guessed(folder: Path) -> None:
    card = model_card(folder, REPO)
    assert not {"license", "base_model", "language"} & set(matter_of(card))
    assert "## Measured" not in card  # plain rounding measures nothing


def test_a_licence_that_is_given_replaces_all_of_the_sources(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: x\nlicense_link: y\nlanguage: [de]\n---\n")
    found = front_matter(Origin(source=str(tmp_path)))
    assert (found["license"], found["license_name"], found["license_link"]) == ("other", "x", "y")
    given = front_matter(Origin(source=str(tmp_path), license="mit"))
    assert (given["license"], given["language"]) == ("mit", ["de"])
    assert not {"license_name", "license_link"} & set(given)


def test_a_folder_of_the_hubs_cache_knows_its_id(tmp_path: Path) -> None:
    source = tmp_path / "models--meta-llama--Llama-3.1-8B-Instruct" / "snapshots" / "0123"
    source.mkdir(parents=True)
    assert front_matter(Origin(source=str(source)))["base_model"] == "meta-llama/Llama-3.1-8B-Instruct"


def test_front_matter_that_tries_to_leave_its_place(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text('---\nlicense: "mit\\n---\\n# not ours"\n---\n')
    card = model_card(folder, REPO, Origin(source=str(tmp_path)))
    assert matter_of(card)["license"] == "mit\n---\n# not ours"
    assert card.count("\n# ") == 1


def test_measured(awq_demo: Path, tmp_path: Path) -> None:
    evaluation = tmp_path / "eval.json"
    evaluation.write_text(json.dumps({"model": "/home/secret/model", "reference": "/home/secret/other", **SCORES}))
    card = model_card(awq_demo, REPO, Origin(evaluation=evaluation))
    assert "| perplexity | 23.0567 | 22.8061 |" in card
    assert "0.03791, 0.22110" in card
    assert "90.12%" in card
    assert "secret" not in card
    report = json.loads((awq_demo / "squawq_report.json").read_text())
    ratios = sorted(layer["loss"] / layer["loss_rounded"] for layer in report["layers"])
    middle = (ratios[3] + ratios[4]) / 2 - 1
    assert f"median over 8 layers: {middle:+.0%} against plain rounding" in card
    assert f"on {report['calibration_tokens']:,} tokens of text" in card


@pytest.mark.parametrize("content", ["{}", json.dumps({**SCORES, "perplexity": "low"}), '{"tokens": true}'])
def test_an_evaluation_that_is_none(folder: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "eval.json").write_text(content)
    with pytest.raises(ConfigError, match="is not what `squawq eval --json` prints"):
        model_card(folder, REPO, Origin(evaluation=tmp_path / "eval.json"))


@pytest.mark.parametrize("chat", [True, False])
def test_code_is_code_for_every_engine(folder: Path, chat: bool) -> None:
    if not chat:
        (folder / "chat_template.jinja").unlink()
    card = model_card(folder, REPO)
    blocks = python_of(card)
    for block in blocks:
        compile(block, "card", "exec")
    for line in (
        "from squawq import LLM",
        "import squawq.transformers",
        "from awq import",
        "OpenAI(",
        "InferenceClient(",
    ):
        assert sum(line in block for block in blocks) == 1
    for line in (f"squawq serve {REPO}", f"vllm serve {REPO}", f"text-generation-launcher --model-id {REPO}"):
        assert line in card
    assert "$" not in card
    assert ("apply_chat_template" in card) == chat


def test_a_folder_that_squawq_did_not_make(folder: Path) -> None:
    (folder / "squawq_report.json").unlink()
    card = model_card(folder, REPO)
    assert "How it was made" not in card
    assert "groups of 128, zero point" in card


def test_a_card_is_ours_until_it_is_changed(folder: Path) -> None:
    path = write_card(folder, REPO)
    card = path.read_text()
    assert is_ours(card)
    assert write_card(folder, REPO, Origin(license="mit")).read_text() != card
    path.write_text(path.read_text().replace("# demo-AWQ", "# demo"))
    changed = path.read_text()
    with pytest.raises(OutputError, match="not as squawq wrote it"):
        write_card(folder, REPO)
    assert path.read_text() == changed
    assert is_ours(write_card(folder, REPO, force=True).read_text())
    assert not (folder / ".tmp").exists()


@pytest.mark.parametrize("repo", ["demo", 'me/x"; import os', "me/a/b", "../x", "me/demo\n"])
def test_a_repository_that_is_none(folder: Path, repo: str) -> None:
    with pytest.raises(ConfigError, match="must be a Hub id"):
        model_card(folder, repo)


def test_a_16_bit_folder_gets_no_card() -> None:
    with pytest.raises(ConfigError, match="not quantized"):
        model_card(demo_model(), REPO)
