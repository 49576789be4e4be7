"""The page as plain HTML: well-formed, nothing loaded, nothing injected, every drawing there. No browser."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from reports import evaluation, report

from squawq.errors import CheckpointError
from squawq.quant_config import QuantConfig
from squawq.report.charts import Axis, column_ticks, lines
from squawq.report.files import PAGE, REPORT, add_evaluation, public_name, write_report
from squawq.report.page import render as render_page
from squawq.report.schema import Report
from squawq.report.words import command as command_line
from squawq.report.words import headline, limits, verdict

VOID = {"meta", "link"}
HOSTILE = "\"'><script>alert(1)</script><img src=http://evil.example/x onerror=alert(1)>{{ 7 * 7 }}"


def render(found: dict[str, Any]) -> str:
    return render_page(found, "OUT")


def command(found: Report) -> str:
    return command_line(found, "OUT")


class Page(HTMLParser):
    """What a page consists of; fails on tags that are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.section = ""
        self.figures: dict[str, int] = {}
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "section":
            self.section = str(dict(attrs)["id"])
            self.figures[self.section] = 0
        if tag == "figure":
            self.figures[self.section] += 1
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.mark.parametrize("layers", [1, 2, 8, 80])
def test_every_section_has_its_drawings(layers: int) -> None:
    page = Page(render(report(layers, evaluation=evaluation())))
    expected = {"layers": 1, "linears": 1, "scales": 3, "clipping": 1, "divergence": 1, "cost": 2}
    assert page.figures == {"summary": 0, **expected, "table": 0, "notes": 0}
    assert sum(tag == "tr" for tag, _ in page.tags) == 1 + 7 * layers
    cells = [attrs for tag, attrs in page.tags if tag == "rect" and attrs.get("height") == "21"]
    assert len(cells) == (7 + 5) * layers


def test_nothing_is_loaded_and_nothing_else_runs() -> None:
    page = Page(render(report(evaluation=evaluation())))
    policy = next(attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy
    assert "http" not in policy
    for tag, attrs in page.tags:
        for name, value in attrs.items():
            assert name not in ("src", "style", "xlink:href"), tag
            assert not name.startswith("on"), tag
            assert name != "href" or value == "data:,"


def test_hostile_names_are_only_text() -> None:
    found = report(2, model=HOSTILE, notes=[HOSTILE], kept_in_16_bits=[{"name": HOSTILE, "reason": HOSTILE}])
    found["layers"][0]["name"] = f"model.layers.{HOSTILE}"
    found["layers"][1]["linears"][0]["name"] = HOSTILE
    found["layers"][1]["linears"][1]["kept_in_16_bits"] = HOSTILE
    found["layers"][0]["scales"][0]["formula"] = HOSTILE
    found["layers"][0]["scales"][1]["linears"] = [HOSTILE]
    found["squawq"] = found["method"] = found["job"]["device"] = HOSTILE
    text = render(found)
    page = Page(text)
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert "img" not in {tag for tag, _ in page.tags}
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert HOSTILE in page.texts  # as text it is all there, template marks too


def test_losses_and_summary_in_words() -> None:
    found = report(4, notes=["model.layers.2: odd"])
    found["layers"][2] |= {"method": "rtn", "loss": found["layers"][2]["loss_rounded"], "scales": []}
    text = " ".join(Page(render(found)).texts)
    assert "is 40% of plain rounding's in the median layer" in text
    assert "Least was gained in layer 2 (100%)" in text
    assert "1 layer fell back to plain rounding: 2." in text
    assert "4.16 in quantized linears, 5.85 over the whole model" in text
    assert "model.layers.2: odd" in text
    assert "squawq eval OUT --reference MODEL" in text
    assert "mean KL 0.0123 nats" in " ".join(Page(render(report(evaluation=evaluation()))).texts)


def test_plain_rounding_and_older_reports_say_what_is_not_there() -> None:
    found = report(2, method="rtn", calibration_tokens=0)
    for record in found["layers"]:
        record |= {"method": "rtn", "loss": None, "loss_rounded": None, "scales": []}
        for key in ("seconds", "peak_bytes"):
            del record[key]
        for row in record["linears"]:
            for key in ("loss", "loss_rounded", "clip"):
                row.pop(key, None)
    del found["model"], found["parameters"]
    page = Page(render(found))
    assert set(page.figures.values()) == {0}
    assert "no loss was measured" in " ".join(page.texts)


def test_experts_share_a_row_and_have_their_own_in_the_table() -> None:
    found = report(2)
    for record in found["layers"]:
        experts = [f"mlp.experts.{i}.down_proj" for i in range(32)]
        model = record["linears"].pop()
        record["linears"] += [{**model, "name": name} for name in experts]
        scales = record["scales"].pop()
        record["scales"] += [{**scales, "linears": [name]} for name in experts]
    page = Page(render(found))
    assert page.texts.count("mlp.experts.*.down_proj") == 2  # of two maps
    assert page.figures["scales"] == 3
    assert "mlp.experts.31.down_proj" in page.texts


def broken(key: str, value: Any) -> dict[str, Any]:
    found = copy.deepcopy(report(2))
    found["layers"][1][key] = value
    return found


@pytest.mark.parametrize(
    "found",
    [
        {},
        {**report(2), "source_bytes": "many"},
        report(2, evaluation={"kl_by_position": ["a"]}),
        broken("loss", "low"),
        broken("linears", 3),
        broken("scales", [{"linears": ["a"], "formula": "x", "ratio": 0.1, "quantiles": [1]}]),
    ],
)
def test_a_report_that_is_none(found: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="not as squawq quantize writes it"):
        render(found)


def test_an_evaluation_is_added_to_both_files(tmp_path: Path) -> None:
    write_report(tmp_path, report(), "OUT")
    before = (tmp_path / PAGE).read_text(encoding="utf-8")
    scores = {key: value for key, value in evaluation().items() if key != "reference"}
    add_evaluation(tmp_path, tmp_path / "somewhere" / ".." / "16-bit", scores)
    add_evaluation(tmp_path, tmp_path, scores)  # in place of the first
    found = json.loads((tmp_path / REPORT).read_text(encoding="utf-8"))
    assert found == {**report(), "evaluation": {"reference": tmp_path.name, **scores}}
    assert before != (tmp_path / PAGE).read_text(encoding="utf-8")
    assert {path.name for path in tmp_path.iterdir()} == {PAGE, REPORT}


def test_an_evaluation_that_does_not_fit_changes_no_file(tmp_path: Path) -> None:
    write_report(tmp_path, report(), "OUT")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(CheckpointError, match="kl_mean"):
        add_evaluation(tmp_path, "model", {**evaluation(), "kl_mean": -1.0})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_names_say_nothing_of_folders(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    assert public_name(tmp_path / "model" / ".") == "model"
    assert public_name("owner/name") == "owner/name"


@pytest.mark.parametrize("values", [[1.0], [0.0], [], [1e-12, 1e9], [3.0, 3.1], [1e-300, 1.0], [123456.0]])
@pytest.mark.parametrize("log", [True, False])
def test_axes_hold_their_values(values: list[float], log: bool) -> None:
    axis = Axis.over(values, log)
    places = [axis.place(value) for value in values]
    assert all(8 <= place <= 192 for place in places)
    assert places == sorted(places, reverse=True)
    assert 1 <= len(axis.ticks()) <= 6
    assert all(re.fullmatch(r"[\d.e+-]+", tick.label) for tick in axis.ticks())


def test_few_labels_at_round_numbers_and_gaps_in_lines() -> None:
    assert [tick.label for tick in column_ticks([str(i) for i in range(80)])] == ["0", "20", "40", "60"]
    drawn = lines("t", "layer", ["0", "1", "2", "3"], {("a", "after"): [1.0, 2.0, None, 3.0]})
    assert drawn.lines[0].path.count("M") == 2
    assert len(drawn.lines[0].dots) == 3


def test_the_top_says_what_it_is_how_good_and_what_next() -> None:
    changes = {"date": "2026-01-02 03:04 UTC", "embedding_bytes": 2_097_152, "calibration": "my chats.jsonl"}
    found = report(2, **changes)
    for record in found["layers"]:
        record |= {"relative_error": 0.0123, "relative_error_rounded": 0.05}
    header = render(found).partition("</header>")[0]
    for words in (
        "<h1>OUT</h1>",
        "<dt>16-bit model</dt><dd>tiny-llama</dd>",
        "2026-01-02 03:04 UTC",
        "squawq quantize tiny-llama OUT --calibration &#39;my chats.jsonl&#39; --method awq",
        "off by 1.23% on calibration text",
        "Next: squawq eval OUT --reference tiny-llama",
        "stay in 16 bits, the embedding is 2.1 MB of them",
    ):
        assert words in header, words
    measured = render({**found, "evaluation": evaluation()}).partition("</header>")[0]
    assert "KL 0.0123: small" in measured
    assert "Next: squawq generate OUT" in measured
    elsewhere = render({**found, "evaluation": evaluation(), "runs_in": ["transformers"]}).partition("</header>")[0]
    assert "squawq generate" not in elsewhere


def test_the_folder_that_was_read_back() -> None:
    row = {"text": "calibration text", "tokens": 512, "kl_mean": 0.00736, "top1_agreement": 0.9395}
    said = (
        "The folder was read back and compared with the 16-bit model on 512 tokens (calibration text): mean KL 0.00736 "
        "nats, same greedy token at 94.0% of positions."
    )
    header, _, rest = render(report(2, read_back=row)).partition("</header>")
    assert said in header
    assert said not in rest
    header, _, rest = render(report(2, read_back=row, evaluation=evaluation())).partition("</header>")
    assert said not in header
    assert said in rest
    for key, value in (("kl_mean", float("nan")), ("top1_agreement", 1.5), ("text", "# other"), ("tokens", "many")):
        with pytest.raises(CheckpointError, match=f"read_back.{key}"):
            Report.read(report(2, read_back={**row, key: value}))


def test_tuned_scales() -> None:
    row = {"steps": 300, "rows": 600, "held_back": 40, "loss_before": 0.118, "loss": 0.0983, "seconds": 93.2}
    said = "Tuning scales lowered the mean KL on 40 rows held back from 0.118 to 0.0983 nats, in 93 s."
    assert said in render(report(2, tuning=row))
    assert "they stay as they were" in render(report(2, tuning={**row, "loss": 0.118}))
    assert "Tuning" not in render(report(2))


@pytest.mark.parametrize(
    ("kl", "words"),
    [(0.0, "hardly any difference"), (0.01, "small"), (0.15, "noticeable"), (0.2, "large"), (9.0, "large")],
)
def test_a_verdict_in_words(kl: float, words: str) -> None:
    assert verdict(kl) == f"KL {kl:.3g}: {words}"
    assert limits() == "hardly any difference below 0.01, small below 0.05, noticeable below 0.2, otherwise large"


def test_the_command_has_what_differs_from_the_defaults_and_is_read_again() -> None:
    config = QuantConfig(
        method="squawq", group_size=64, zero_point=False, clip=False, sequential=False, dtype="bfloat16", seqlen=128,
        samples=8, modules_to_not_convert=("layers.0", "a b"), damping=0.25,
    )  # fmt: skip
    found = report(1)
    found["job"] |= {"config": config.to_dict(), "device": "cuda"}
    assert command(Report.read(found)) == (
        "squawq quantize tiny-llama OUT --samples 8 --seqlen 128 --group-size 64 --damping 0.25 --symmetric --no-clip "
        "--no-sequential --skip layers.0 --skip 'a b' --dtype bfloat16 --device cuda"
    )
    for device, tune, flags in (("cuda", False, "--no-tune --device cuda"), ("cuda", True, "--device cuda")):
        found["job"] |= {"config": replace(config, tune=tune).to_dict(), "device": device}
        assert command(Report.read(found)).endswith(f"--dtype bfloat16 {flags}")
    weighed = replace(config, sequential=True)
    for device, chosen, flags in (
        ("cuda", False, "--no-token-weights --device cuda"),
        ("cuda", True, "--device cuda"),
        ("cpu", True, "--token-weights"),
    ):
        found["job"] |= {"config": replace(weighed, token_weights=chosen).to_dict(), "device": device}
        assert command(Report.read(found)).endswith(f"--dtype bfloat16 {flags}")
    found["job"] |= {"config": replace(config, tune=True).to_dict(), "device": "cpu"}
    assert command(Report.read(found)).endswith("--dtype bfloat16 --tune")
    awq = QuantConfig(method="awq", tune=False, dtype="bfloat16")
    for device in ("cuda", "mps"):
        found["job"] |= {"config": awq.to_dict(), "device": device}
        assert command(Report.read(found)).endswith(f"--dtype bfloat16 --device {device}")


def test_a_dtype_that_is_the_default_is_not_in_the_command() -> None:
    found = report(1)
    found["job"]["config"] = QuantConfig(method="awq", dtype="bfloat16").to_dict()
    for by_default, shown in (("bfloat16", False), ("float16", True)):
        found["stored_dtype"] = {"dtype": "bfloat16", "by_default": by_default, "logits_error": 0.01}
        assert ("--dtype bfloat16" in command(Report.read(found))) == shown


def test_the_next_step_can_be_pasted() -> None:
    found = report(1, model="my model; rm -rf x")
    said = headline(Report.read(found), "my result")[1]
    assert said == "Next: squawq eval 'my result' --reference 'my model; rm -rf x'"
    measured = headline(Report.read({**found, "evaluation": evaluation()}), "my result")[1]
    assert measured.startswith("Next: squawq generate 'my result' -p ")


def test_the_page_names_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "tiny-awq"
    folder.mkdir()
    write_report(folder, report(), folder.name)
    assert "<title>tiny-awq: what quantization did</title>" in (folder / PAGE).read_text(encoding="utf-8")
    add_evaluation(folder, "model", evaluation())
    page = (folder / PAGE).read_text(encoding="utf-8")
    assert "Next: squawq generate tiny-awq -p" in page
    assert "squawq quantize tiny-llama tiny-awq" in page
