"""The model card: what it says, what it leaves out, and that its code is code."""

from __future__ import annotations

import html
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeModel
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from squawq.demo import demo_model
from squawq.errors import CheckpointError, ConfigError, OutputError
from squawq.evaluation.run import BUILT_IN
from squawq.format.shards import write_index
from squawq.publish.card import Origin, front_matter, is_ours, model_card, outdated, write_card
from squawq.quant_config import QuantConfig
from squawq.quantization.pipeline import quantize
from squawq.report.files import add_evaluation

REPO = "me/demo-AWQ"
SCORES = {
    "model": "demo-awq",
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
    assert "perplexity" not in card  # no evaluation was given


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
    evaluation.write_text(
        json.dumps({**SCORES, "model": f"/home/secret/{awq_demo.name}", "reference": "/home/secret/other"})
    )
    card = model_card(awq_demo, REPO, Origin(evaluation=evaluation))
    assert "| perplexity | 23.0567 | 22.8061 |" in card
    assert "0.03791, 0.22110" in card
    assert "90.12%" in card
    assert "secret" not in card
    report = json.loads((awq_demo / "squawq_report.json").read_text())
    ratios = sorted(layer["loss"] / layer["loss_rounded"] for layer in report["layers"])
    said = f"on calibration text is {(ratios[3] + ratios[4]) / 2:.0%} of plain rounding's in the median layer."
    assert said in card
    page = html.unescape((awq_demo / "report.html").read_text(encoding="utf-8"))
    assert said in page  # one fact in one form
    assert f"on {report['calibration_tokens']:,} tokens of text" in card
    assert "`report.html` draws them" in card
    assert f"on {report['read_back']['tokens']} tokens (calibration text): mean KL" in card
    tuned = {"steps": 9, "rows": 8, "held_back": 2, "loss_before": 0.2, "loss": 0.1, "seconds": 3.0}
    copied = tmp_path / "tuned"
    shutil.copytree(awq_demo, copied)
    (copied / "squawq_report.json").write_text(json.dumps({**report, "tuning": tuned}))
    assert "Tuning scales lowered the mean KL on 2 rows held back from 0.2 to 0.1 nats" in model_card(copied, REPO)


def evaluated(folder: Path, **changes: Any) -> dict[str, Any]:
    """Put an evaluation into the folder's report."""
    stored = {key: value for key, value in SCORES.items() if key != "model"} | {"text": "mine.txt", **changes}
    add_evaluation(folder, "owner/16-bit", stored)
    return stored


def test_the_evaluation_in_the_report_is_quoted(folder: Path, tmp_path: Path) -> None:
    assert "## Measured" in model_card(folder, REPO)  # the comparison that quantize makes
    assert "perplexity" not in model_card(folder, REPO)
    evaluated(folder, perplexity=24.5)
    card = model_card(folder, REPO)
    assert "| perplexity | 24.5000 | 22.8061 |" in card
    assert "| KL to 16 bits, mean and 99th percentile (nats) | 0.03791, 0.22110 | |" in card
    assert "| top-1 agreement | 90.12% | |" in card
    assert "On 2,047 tokens of mine.txt, window 1024, stride 512 (`squawq eval`)." in card
    (tmp_path / "eval.json").write_text(json.dumps({**SCORES, "text": BUILT_IN}))
    card = model_card(folder, REPO, Origin(evaluation=tmp_path / "eval.json"))
    assert "| perplexity | 23.0567 | 22.8061 |" in card
    assert "On 2,047 tokens of the built-in text (general prose in eight languages), window" in card


@pytest.mark.parametrize("changes", [{"kl_p99": None}, {"window": None}, {"perplexity": None}])
def test_an_evaluation_in_the_report_that_lacks_a_figure(folder: Path, changes: dict[str, Any]) -> None:
    evaluated(folder, **changes)
    assert "squawq eval" not in model_card(folder, REPO)


def test_a_text_that_tries_to_leave_its_place(folder: Path) -> None:
    evaluated(folder, text="a`\n# other --> <img> [x](http://evil)")
    card = model_card(folder, REPO)
    assert "tokens of a_ other --_ _img_ _x_(http_//evil), window" in card


def test_the_16_bit_model_is_named(folder: Path, tmp_path: Path) -> None:
    def opening(origin: Origin | None = None) -> str:
        return next(line for line in model_card(folder, REPO, origin).splitlines() if "linear layers" in line)

    assert opening().startswith("The 16-bit model `demo_model`, its linear layers quantized to 4 bits")
    (tmp_path / "my model").mkdir()
    assert opening(Origin(source=str(tmp_path / "my model"))).startswith("The 16-bit model `my model`, its")
    assert opening(Origin(base_model="me/demo")).startswith("[me/demo](https://huggingface.co/me/demo), its")
    (folder / "squawq_report.json").unlink()
    assert opening().startswith("A 16-bit model, its linear layers")


@pytest.mark.parametrize(
    "content",
    [
        "{}",
        '{"tokens": true}',
        *(json.dumps({**SCORES, **changes}) for changes in ({"perplexity": "low"}, {"kl_p99": None}, {"model": 1})),
        json.dumps({**SCORES, "perplexity": float("nan")}),
        json.dumps({key: value for key, value in SCORES.items() if key != "top1_agreement"}),
    ],
)
def test_an_evaluation_that_is_none(folder: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "eval.json").write_text(content)
    with pytest.raises(ConfigError, match="is not what `squawq eval --json` prints"):
        model_card(folder, REPO, Origin(evaluation=tmp_path / "eval.json"))


def test_an_evaluation_of_another_model(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "eval.json"
    path.write_text(json.dumps({**SCORES, "model": "runs/demo"}))
    with pytest.raises(ConfigError, match="is of 'runs/demo'; it must be of demo-awq or demo-AWQ"):
        model_card(folder, REPO, Origin(evaluation=path))
    path.write_text(json.dumps({**SCORES, "model": REPO}))
    assert "23.0567" in model_card(folder, REPO, Origin(evaluation=path))


@pytest.mark.parametrize(
    "changes",
    [
        {"squawq": "0.1 |\n\n# other"},
        {"squawq": 1},
        {"method": "<img>"},
        {"source_bytes": "1"},
        {"calibration_tokens": float("inf")},
        {"layers": 5},
        {"layers": ["x"]},
        {"layers": [{"loss": 1.0}]},
        {"layers": [{"loss": "1", "loss_rounded": 1.0}]},
        {"job": None},
        {"job": {"config": {"group_size": "128"}}},
    ],
)
def test_a_report_that_is_none(folder: Path, changes: dict[str, Any]) -> None:
    path = folder / "squawq_report.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(
        CheckpointError, match=r"squawq_report\.json(: cannot be read as JSON| is not as squawq quantize writes it)"
    ):
        model_card(folder, REPO)


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_a_name_that_tries_to_leave_its_place(folder: Path) -> None:
    edit_config(folder, architectures=["X |\n\n# other <img>"])
    card = model_card(folder, REPO)
    assert "| architecture | llama, 8 layers |" in card
    assert "<img>" not in card


def test_another_layout_gets_no_card(folder: Path) -> None:
    quant = json.loads((folder / "config.json").read_text())["quantization_config"]
    edit_config(folder, quantization_config={**quant, "version": "gemv"})
    with pytest.raises(ConfigError, match=r"holds awq \(gemv\)"):
        model_card(folder, REPO)


def test_the_head(make_model: MakeModel, tmp_path: Path) -> None:
    folder = tmp_path / "tiny-awq"
    quantize(make_model(), folder, QuantConfig(method="rtn", group_size=32))
    assert "| 16-bit | embedding, norms, head |" in model_card(folder, REPO)
    shard = folder / "model-00004-of-00004.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(shard).items()}
    del tensors["lm_head.weight"]
    tensors["lm_head.qweight"] = torch.zeros(64, 20, dtype=torch.int32)
    save_file(tensors, shard)
    write_index(folder)
    card = model_card(folder, REPO)
    assert "zero point; the head too |" in card
    assert "| 16-bit | embedding, norms |" in card


@pytest.mark.parametrize("chat", [True, False])
def test_code_is_code_for_every_engine(folder: Path, chat: bool) -> None:
    if not chat:
        (folder / "chat_template.jinja").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": "float16"}))  # TGI reads nothing else
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
    for line in (f"squawq serve {REPO}", f"vllm serve {REPO}", f"--model-id {REPO} --quantize awq"):
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
    assert not list(folder.glob(".*"))


def test_a_card_that_is_written_again_keeps_what_options_gave_it(folder: Path, tmp_path: Path) -> None:
    (folder / "squawq_report.json").unlink()
    (tmp_path / "eval.json").write_text(json.dumps({**SCORES, "text": "mine.txt"}))
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: [de]\n---\n")
    said: list[str] = []
    source = str(tmp_path / "source")
    path = write_card(folder, REPO, Origin(None, "mit", "me/demo", tmp_path / "eval.json"), say=said.append)
    first = path.read_text()
    write_card(folder, REPO, say=said.append)
    assert path.read_text() == first
    assert said == [f"{path}: written", f"{path}: kept as it is"]
    write_card(folder, "me/other", Origin(source=source), say=said.append)
    card = path.read_text()
    found = matter_of(card)
    assert (found["license"], found["base_model"], found["language"]) == ("mit", "me/demo", ["de"])
    assert "| perplexity | 23.0567 | 22.8061 |" in card
    assert "tokens of mine.txt" in card
    kept = "written; kept from the card before"
    assert said[2:] == [f"{path}: {kept}: license, base_model, evaluation (remove it to begin anew)"]
    write_card(folder, "me/other", Origin(license="cc0-1.0"), say=said.append)
    assert matter_of(path.read_text())["license"] == "cc0-1.0"
    assert said[3:] == [f"{path}: {kept}: language, base_model, evaluation (remove it to begin anew)"]
    flip(folder)
    write_card(folder, REPO, Origin(license="mit"), say=said.append)
    assert "base_model" not in matter_of(path.read_text())
    assert "perplexity" not in path.read_text()
    assert said[4:] == [f"{path}: written", f"{path} has no base_model; --base-model sets it"]


def test_the_sources_name_is_kept(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "my model").mkdir()
    write_card(folder, REPO, Origin(source=str(tmp_path / "my model")))
    assert "The 16-bit model `my model`, its" in write_card(folder, REPO).read_text()


def test_a_newer_evaluation_gets_into_the_card(folder: Path) -> None:
    path = write_card(folder, REPO, Origin(license="mit"))
    evaluated(folder)
    said: list[str] = []
    write_card(folder, REPO, say=said.append)
    assert "| perplexity | 23.0567 | 22.8061 |" in path.read_text()
    assert matter_of(path.read_text())["license"] == "mit"
    assert said[0] == f"{path}: written; kept from the card before: license (remove it to begin anew)"


def test_what_a_card_lacks_is_said(folder: Path) -> None:
    said: list[str] = []
    path = write_card(folder, REPO, say=said.append)
    lacking = "no license and no base_model; --license and --base-model set them"
    assert said == [f"{path}: written", f"{path} has {lacking}"]


def test_what_another_is_writing_stays(folder: Path) -> None:
    (folder / ".tmp").mkdir()
    (folder / ".tmp" / "half").touch()
    write_card(folder, REPO)
    assert (folder / ".tmp" / "half").exists()


def test_a_card_knows_what_it_is_of(folder: Path) -> None:
    assert outdated(folder, REPO) is None  # none there
    path = write_card(folder, REPO)
    assert outdated(folder, REPO) is None
    assert outdated(folder, "me/other") == f"was written for {REPO}"
    card = path.read_text()
    path.write_text(card.replace(f"card of {REPO}", "card of me/other"))
    assert not is_ours(path.read_text())
    assert outdated(folder, REPO) is None  # a person's
    path.write_text(card)
    flip(folder)
    assert outdated(folder, REPO) == "was written before the model changed"


def flip(folder: Path) -> None:
    """Another weight, in a file of the same size."""
    path = folder / "model-00002-of-00010.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("repo", ["demo", 'me/x"; import os', "me/a/b", "../x", "me/demo\n"])
def test_a_repository_that_is_none(folder: Path, repo: str) -> None:
    with pytest.raises(ConfigError, match="must be a Hub id"):
        model_card(folder, repo)


def test_a_16_bit_folder_gets_no_card() -> None:
    with pytest.raises(ConfigError, match="not quantized"):
        model_card(demo_model(), REPO)


def test_another_source_replaces_what_the_first_one_gave(folder: Path, tmp_path: Path) -> None:
    for name, licence in (("first", "mit"), ("second", "apache-2.0")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "README.md").write_text(f"---\nlicense: {licence}\n---\n")
        card = write_card(folder, REPO, Origin(source=str(tmp_path / name))).read_text()
        assert matter_of(card)["license"] == licence
        assert f"The 16-bit model `{name}`" in card
