"""Writes the model card (README.md) of a quantized folder: front matter, measured figures, usage for each engine.

It says only what the folder, its report and an evaluation say: no licence and no original is guessed. Its last line is
a checksum that tells whether a person changed the card, and for which repository and model it was written. A card that
is written again keeps what earlier options gave it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from squawq.compatibility import may_fuse
from squawq.errors import CheckpointError, ConfigError, OutputError
from squawq.format.files import clear_temporary, has_file, locked, parse_json, read_bytes, read_json, write_text
from squawq.format.reader import Checkpoint
from squawq.hub.download import find_hub_file
from squawq.inspection import inspect
from squawq.publish.scores import Scores, figures, plain, read_scores, stored_scores
from squawq.publish.usage import usage
from squawq.quant_config import METHODS, QuantConfig
from squawq.quantization.job import identity
from squawq.report.files import PAGE, REPORT, public_name
from squawq.report.schema import Report
from squawq.report.words import errors, read_back, size, tuned

README = "README.md"
TAGS = ["awq", "int4", "4-bit", "quantized", "squawq"]
FROM_SOURCE = ("license", "license_name", "license_link", "language")
MAX_MATTER = 2**16  # characters of a card in which its front matter must end
_KEPT = re.compile(r"<!-- squawq push (\{.*\}) -->\n\Z")
_MARK = re.compile(r"<!-- squawq card of (\S+), model ([0-9a-f]{64}): [0-9a-f]{64} -->\n\Z")
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)", re.ASCII)


@dataclass(frozen=True)
class Origin:
    """What the folder itself does not say."""

    source: str | None = None  # the 16-bit model, folder or Hub id: its licence, languages and Hub id
    license: str | None = None  # instead of the source's
    base_model: str | None = None  # instead of the source's Hub id
    evaluation: Path | None = None  # a file that `squawq eval --json` printed; instead of the report's evaluation

    @property
    def given(self) -> bool:
        return any(value is not None for value in (self.source, self.license, self.base_model, self.evaluation))


@dataclass(frozen=True)
class Kept:
    """What options gave an earlier card of the same model, which the next one keeps where no option replaces it."""

    matter: dict[str, Any] = field(default_factory=dict)  # FROM_SOURCE and base_model
    source: str | None = None  # the 16-bit model's name
    evaluation: Scores | None = None


def check_id(name: str, what: str) -> None:
    """Raise ConfigError unless `name` is a Hub id; `what` it is."""
    if not _ID.fullmatch(name) or len(name) > 128:
        raise ConfigError(f"{what} is {name!r}; it must be a Hub id such as 'owner/name'")


def check_gemm(folder: Path, method: str, layout: str) -> None:
    """Raise ConfigError for another method or layout than AWQ's GEMM, the one that all engines run."""
    if (method, layout) != ("awq", "gemm"):
        raise ConfigError(
            f"{folder}: holds {method} ({layout}); squawq publishes AWQ in the GEMM layout alone. Convert it first: "
            f"squawq export {folder} OUT --format awq"
        )


def model_card(folder: str | Path, repo: str, origin: Origin | None = None, kept: Kept | None = None) -> str:
    """The text of the card of a folder to be published as the Hub id `repo`. kept: from an earlier card.

    Raises:
        ConfigError: The folder is not quantized in the GEMM layout, or the evaluation is of another model.
        CheckpointError: The report or the source's card cannot be read.
    """
    from huggingface_hub import ModelCard, ModelCardData

    folder, origin, kept = Path(folder), origin or Origin(), kept or Kept()
    check_id(repo, "the repository")
    found = inspect(folder)
    if found["quantization"] is None:
        raise ConfigError(f"{folder}: is not quantized; squawq writes cards for AWQ folders")
    check_gemm(folder, found["quantization"]["method"], found["quantization"]["format"])
    report = _report(folder / REPORT)
    source = public_name(origin.source) if origin.source else kept.source
    other = origin.source is not None and kept.source not in (None, plain(source or ""))  # the card was of another one
    matter = front_matter(origin, {} if other else kept.matter)
    name = source or (report.model if report else None)
    given = kept.evaluation if origin.evaluation is None else read_scores(origin.evaluation, folder, repo)
    scores = given or stored_scores(report)
    card = ModelCard.from_template(
        ModelCardData(**matter),
        template_str=(files("squawq") / "publish" / "card.md").read_text(encoding="utf-8"),
        title=repo.partition("/")[2],
        base_model=matter.get("base_model"),
        name=plain(name) if name else None,
        found=found,
        quant=found["quantization"],
        memory=found["memory"],
        kept=len(found["kept_in_16_bits"]),
        size=size,
        report=report,
        scores=scores,
        read_back=read_back(report.read_back) if report and report.read_back else None,
        tuned=tuned(report.tuning) if report and report.tuning else None,
        errors=errors(report) if report else [],
        method=_method(report) if report else "",
        drawn=has_file(folder / PAGE),
        usage=usage(repo, has_template(folder), found["runs_in"], fused=may_fuse(Checkpoint(folder).config)),
    )
    text = f"{card}\n\n{_keeping(source, given)}"
    return text + _mark(text, repo, _fingerprint(folder))


def write_card(
    folder: Path,
    repo: str,
    origin: Origin | None = None,
    *,
    force: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Path:
    """Write `folder`/README.md. A card of ours that is there hands on what options gave it, unless the model changed.

    say: hears what was done, and which option adds what the card lacks.
    Raises OutputError over a card that a person wrote or changed, unless `force`.
    """
    path, origin = folder / README, origin or Origin()
    kept = _kept(path, folder)
    text = model_card(folder, repo, origin, kept)
    with locked(folder, wait=True):
        clear_temporary(folder)
        before = _read(path) if path.exists() else None
        if before is not None and not force and not is_ours(before):
            raise OutputError(f"{path} is not as squawq wrote it; edit it by hand, or give --force to write it anew")
        if text != before:
            write_text(path, text)
    say(f"{path}: {'kept as it is' if text == before else _written(origin, kept)}")
    matter = _matter(text, path)
    if lost := [key for key in ("license", "base_model") if key not in matter]:
        flags = " and ".join(f"--{key.replace('_', '-')}" for key in lost)
        say(f"{path} has no {' and no '.join(lost)}; {flags} {'set them' if len(lost) > 1 else 'sets it'}")
    return path


def _written(origin: Origin, kept: Kept) -> str:
    """What was done, and what of the card before is still in it."""
    replaced = {"license": origin.license, "base_model": origin.base_model, "evaluation": origin.evaluation}
    names = [*kept.matter, *(["evaluation"] if kept.evaluation else [])]
    names = [name for name in names if replaced.get(name) is None and not name.startswith("license_")]
    return f"written; kept from the card before: {', '.join(names)} (remove it to begin anew)" if names else "written"


def _keeping(source: str | None, evaluation: Scores | None) -> str:
    """The line of a card that keeps what its front matter does not."""
    values = {"source": plain(source) if source else None, "evaluation": evaluation}
    known = {key: value for key, value in values.items() if value is not None}
    return f"<!-- squawq push {json.dumps(known)} -->\n" if known else ""


def _kept(path: Path, folder: Path) -> Kept:
    """What the card that is there keeps: nothing, if it is not ours or of another model."""
    text = _read(path) if has_file(path) else ""
    written = _written_for(text)
    if written is None or written[1] != _fingerprint(folder):
        return Kept()
    line = _KEPT.search(_MARK.sub("", text))
    values = parse_json(line[1].encode()) if line else {}
    source = values.get("source")
    return Kept(_matter(text, path), source if isinstance(source, str) else None, figures(values.get("evaluation")))


def is_ours(text: str) -> bool:
    """Whether squawq wrote this card and nobody changed it since."""
    return _written_for(text) is not None


def outdated(folder: Path, repo: str) -> str | None:
    """Why the card that squawq wrote is not of this model or not for `repo`; None if it is, if there is none, or if a
    person wrote or changed it."""
    path = folder / README
    written = _written_for(_read(path)) if has_file(path) else None
    if written is None or written == (repo, _fingerprint(folder)):
        return None
    return f"was written for {written[0]}" if written[0] != repo else "was written before the model changed"


def _read(path: Path) -> str:
    return read_bytes(path).decode(errors="replace")


def _written_for(text: str) -> tuple[str, str] | None:
    """The repository and the model's fingerprint in the mark of an unchanged card of ours."""
    mark = _MARK.search(text)
    return (mark[1], mark[2]) if mark and mark[0] == _mark(text[: mark.start()], mark[1], mark[2]) else None


def _mark(text: str, repo: str, model: str) -> str:
    digest = hashlib.sha256(f"{text}{repo} {model}".encode()).hexdigest()
    return f"<!-- squawq card of {repo}, model {model}: {digest} -->\n"


def _fingerprint(folder: Path) -> str:
    """Hash of config.json and samples of the weights, as in a job's identity."""
    return str(identity(Checkpoint(folder), QuantConfig(), None, "")["source"])


def has_template(folder: Path) -> bool:
    """Whether the folder has a chat template."""
    config = folder / "tokenizer_config.json"
    return has_file(folder / "chat_template.jinja") or (has_file(config) and "chat_template" in read_json(config))


def front_matter(origin: Origin, kept: dict[str, Any] | None = None) -> dict[str, Any]:
    """The card's metadata as the Hub wants it: of the options, then of an earlier card (`kept`), then of the source."""
    matter = _replaced(_source_matter(origin.source) if origin.source else {}, kept or {})
    if origin.license is not None:
        matter = _replaced(matter, {"license": origin.license})
    base = origin.base_model or matter.get("base_model") or (_hub_id(origin.source) if origin.source else None)
    if base is not None:
        check_id(base, "base_model")
        matter |= {"base_model": base, "base_model_relation": "quantized"}
    return matter | {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": TAGS}


def _replaced(matter: dict[str, Any], by: dict[str, Any]) -> dict[str, Any]:
    """Front matter with other values; a licence goes with its name and link."""
    return {k: v for k, v in matter.items() if "license" not in by or not k.startswith("license")} | by


def _hub_id(source: str) -> str | None:
    """Hub id of a source, also of a folder in the Hub's cache."""
    if not Path(source).exists():
        return source
    cached = _CACHED.search(str(Path(source).resolve()))
    return f"{cached[1]}/{cached[2]}" if cached else None


def _source_matter(source: str) -> dict[str, Any]:
    """Keys that a card takes over from the source's front matter."""
    path = Path(source) / README if Path(source).is_dir() else find_hub_file(source, README)
    if path is None or not has_file(path):
        return {}
    return {key: value for key, value in _matter(_read(path), path).items() if key in FROM_SOURCE}


def _matter(text: str, path: Path) -> dict[str, Any]:
    """FROM_SOURCE and base_model of a card's front matter. Raises CheckpointError, naming `path`."""
    from huggingface_hub import RepoCard

    text = text.removeprefix("\ufeff")[:MAX_MATTER]
    if not text.startswith("---"):
        return {}
    try:
        if "<<" in text.partition("\n---")[0]:
            raise ValueError("it has YAML's merge keys, with which a few lines become gigabytes")
        known = RepoCard(text).data.to_dict()  # type: ignore[no-untyped-call]
    except Exception as error:  # of the YAML reader, which is huggingface_hub's own affair
        raise CheckpointError(f"{path}: its front matter cannot be read: {error!s:.200}") from error
    if bad := next((key for key in FROM_SOURCE if not _is_plain(known.get(key))), None):
        raise CheckpointError(f"{path}: its front matter has a {bad} that is no text; quote it there")
    base = known.get("base_model")
    return {key: known[key] for key in FROM_SOURCE if known.get(key)} | ({"base_model": base} if base else {})


def _is_plain(value: object) -> bool:
    """Whether a value is None, a string or a list of strings, of usual length."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    return len(values) <= 200 and all(isinstance(v, str) and len(v) <= 500 for v in values)


def _report(path: Path) -> Report | None:
    """The report; None where there is none. Raises CheckpointError for one that a card cannot quote."""
    if not has_file(path):
        return None
    report = Report.read(read_json(path), str(path))
    if not re.fullmatch(r"[\w.+-]+", report.squawq, re.ASCII) or report.method not in METHODS:
        raise CheckpointError(f"{path} is not as squawq quantize writes it; write it again, or remove it")
    return report


def _method(report: Report) -> str:
    """What the method is made of; earlier reports lack some settings."""
    config, searched = report.job.config, report.method != "rtn"
    parts = [
        ("activation-aware scales", searched),
        ("clipping", searched and config.clip),
        ("error-compensated rounding", config.compensate),
        ("each layer calibrated after quantized layers", config.sequential),
    ]
    return ", ".join(name for name, used in parts if used) or "plain rounding"
