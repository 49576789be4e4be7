"""Writes the reference pages of the documentation site from the code: `make docs` runs it before the site is built.

python tools/docs_reference.py docs/reference
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import docs_fields
import typer
from prometheus_client.parser import text_string_to_metric_families

import squawq
from squawq.cli import app as cli
from squawq.engine.config import EngineConfig
from squawq.engine.protocol import Stats
from squawq.engine.request import Output, TokenLogprob
from squawq.quant_config import QuantConfig
from squawq.serve import launcher, tgi_launcher
from squawq.serve.app import ROUTES
from squawq.serve.flags import Flag, FlagTable
from squawq.serve.metrics import Metrics
from squawq.serve.openapi_document import EXAMPLES, document

Schema = Mapping[str, Any]


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table without columns that have no text; empty if there are no rows."""
    columns = [column for column in zip(head, *rows, strict=True) if any(column[1:])]
    names, *lines = [f"| {' | '.join(map(cell, row))} |" for row in zip(*columns, strict=True)] or [""]
    return "\n".join([names, "|" + "---|" * len(columns), *lines, ""]) if lines else ""


def cell(text: str) -> str:
    """A cell's text with escaped bars, but for those in code, which need none in Python-Markdown."""
    parts = text.replace("\n", " ").split("`")
    return "`".join(part if index % 2 else part.replace("|", r"\|") for index, part in enumerate(parts))


def code(text: object) -> str:
    return f"`{text}`" if text not in (None, "") else ""


def fenced(text: str, language: str) -> str:
    return f"```{language}\n{text.rstrip()}\n```\n"


def cli_page() -> str:
    """One section a command: its help, arguments and options."""
    group: Any = typer.main.get_command(cli)
    parts = [
        "# Command line\n",
        "Results go to stdout, everything else to stderr. The exit code is 0, 1 for an error of the system (a full"
        " disk, for example), 2 for an error in the command, its files or its model, and 130 or 143 after Ctrl-C "
        "or SIGTERM. The flags of `squawq serve` have [a page of their own](serve.md).\n",
    ]
    for name, command in group.commands.items():
        parts += [f"## squawq {name}\n", *command_help(command, f"squawq {name}", options=name != "serve")]
    return "\n".join(parts)


def command_help(command: Any, name: str, *, options: bool) -> list[str]:
    """A command's usage, help text and examples, arguments, and options."""
    context = typer.main.get_command(cli).make_context("squawq", [], resilient_parsing=True)
    text, _, examples = inspect.cleandoc(command.help or "").replace("\b\n", "").partition("Examples:\n")
    usage = re.sub(r"[{}]", "", " ".join([name, *command.collect_usage_pieces(context)]))
    records = [(param, help_record(param, context)) for param in command.params]
    arguments = [record for param, record in records if record and param.param_type_name == "argument"]
    others = [record for param, record in records if record and param.param_type_name == "option"]
    parts = [fenced(usage, "text"), text.strip() + "\n"]
    if examples:
        parts.append(fenced(inspect.cleandoc(examples), "text"))
    parts.append(table(("argument", "meaning"), ((code(left), right) for left, right in arguments)))
    if options:
        parts.append(table(("option", "meaning"), ((code(left), right) for left, right in others)))
    return [part for part in parts if part]


def help_record(param: Any, context: Any) -> tuple[str, str] | None:
    """A parameter's names and help as `--help` prints them."""
    record = param.get_help_record(context)
    return record and (record[0].replace(" range>", ">"), record[1])


def flags_page(title: str, intro: str, flags: FlagTable) -> str:
    """A launcher's flags by section: names, environment variables, defaults."""
    parts = [f"# {title}\n", intro + "\n"]
    for section, rows in flags.sections.items():
        parts += [
            f"## {section}\n",
            table(("flag, environment variables", "meaning"), map(flag_row, rows)),
        ]
    return "\n".join(parts)


def flag_row(flag: Flag) -> tuple[str, str]:
    option = flag.parameter("").annotation.__metadata__[0]
    names = (f"{flag.name} / --no-{flag.name[2:]}" if flag.switch == "no" else flag.name, *flag.names)
    value = f" {option.metavar}" if option.metavar else ""
    return (
        ", ".join(code(name + value) for name in names) + "".join(f"<br>{code(name)}" for name in flag.variables),
        option.help,
    )


def http_page() -> str:
    """The routes of the OpenAPI document, and the fields of their bodies."""
    found = document(ROUTES)
    schemas, paths = found["components"]["schemas"], found["paths"]
    parts = [
        "# HTTP API\n",
        "A running server has the same document for programs at `GET /openapi.json`. "
        "[The server](../explanation/serving.md) explains dialects, limits and errors.\n",
        "## Routes\n",
    ]
    rows = [
        (code(f"{method.upper()} {path}"), row) for path, methods in paths.items() for method, row in methods.items()
    ]
    common = set.intersection(*({*row["responses"]} for _, row in rows))
    parts += [
        f"Every route may answer {', '.join(sorted(common))}.\n",
        table(
            ("route", "what it does", "bodies", "further status codes"),
            (
                (
                    name,
                    row["summary"],
                    ", ".join(map(link, body_names(row))),
                    ", ".join(sorted({*row["responses"]} - common)),
                )
                for name, row in rows
            ),
        ),
    ]
    examples = {model.__name__: value for model, (_, value) in EXAMPLES.items()}
    bodies = dict.fromkeys(name for _, row in rows for name in body_names(row))
    inner = dict.fromkeys(name for body in bodies for name in referenced(schemas[body], schemas))
    for name in [*bodies, *(name for name in inner if name not in bodies)]:
        parts += [f"## {name}\n", fields_table(schemas[name])]
        parts += ["Example:\n", fenced(json.dumps(examples[name], indent=2), "json")] if name in examples else []
    return "\n".join(parts)


def link(name: str) -> str:
    return f"[{name}](#{name.lower()})"


def body_names(row: Schema) -> list[str]:
    schema = row.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
    return [part["$ref"].rpartition("/")[2] for part in schema.get("anyOf", [schema]) if "$ref" in part]


def referenced(schema: Any, schemas: Schema, seen: frozenset[str] = frozenset()) -> list[str]:
    """Names of the schemas that a schema refers to, directly or not."""
    items = schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ()
    names = [schema["$ref"].rpartition("/")[2]] if isinstance(schema, dict) and "$ref" in schema else []
    names += [name for item in items for name in referenced(item, schemas, seen)]
    new = [name for name in dict.fromkeys(names) if name not in seen]
    return new + [n for name in new for n in referenced(schemas[name], schemas, seen | frozenset(new))]


def fields_table(schema: Schema) -> str:
    if "properties" not in schema:
        return fenced(json.dumps(schema, indent=2), "json")
    required = schema.get("required", ())
    rows = (
        (
            code(name) + (" (required)" if name in required else ""),
            kind(row),
            code(default(row)),
            row.get("description", ""),
        )
        for name, row in schema["properties"].items()
    )
    return table(("field", "type", "default", "meaning"), rows)


def default(row: Schema) -> str:
    return "" if row.get("default") is None else json.dumps(row["default"])


def kind(row: Any) -> str:
    """A JSON schema in a few words."""
    if not isinstance(row, dict):
        return "any"
    if "$ref" in row:
        return link(row["$ref"].rpartition("/")[2])
    for key in ("anyOf", "oneOf"):
        if key in row:
            return " or ".join(dict.fromkeys(kind(part) for part in row[key] if part.get("type") != "null"))
    if "enum" in row:
        return ", ".join(code(json.dumps(value)) for value in row["enum"])
    if "const" in row:
        return code(json.dumps(row["const"]))
    limits = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    stated = ", ".join(f"{word} {row[key]}" for key, word in limits.items() if key in row)
    name = str(row.get("type", "any"))
    if name == "array" and row.get("items"):
        name = f"list of {kind(row['items'])}"
    return f"{name}, {stated}" if stated else name


def python_page() -> str:
    """squawq.__all__: docstrings by mkdocstrings, fields by our own table, whose types are short."""
    homes = squawq._HOMES
    names = [name for name in squawq.__all__ if name in homes]
    parts = [
        "# Python API\n",
        "Everything below is imported from `squawq`, on first use. `import squawq.transformers` is "
        "[a page of its own](../how-to/transformers.md), and so is the package "
        "[`awq`](../migrate/autoawq.md).\n",
        table(("name", "module"), ((f"[`squawq.{n}`][{homes[n]}.{n}]", code(homes[n])) for n in sorted(names))),
        *(documented(getattr(squawq, name), f"{homes[name]}.{name}") for name in names),
        "## Settings of the engine\n",
        "`LLM` takes every field of `EngineConfig` by name.\n",
        documented(EngineConfig, "squawq.engine.config.EngineConfig", level=3),
        "## Results\n",
        *(documented(kind, f"squawq.engine.request.{kind.__name__}", level=3) for kind in (Output, TokenLogprob)),
        "## Errors\n",
        "Every error that squawq raises for its user is a `SquawqError`.\n",
        fenced(inspect.cleandoc(sys.modules["squawq.errors"].__doc__ or "").partition("\n\n")[2], "text"),
    ]
    return "\n".join(parts)


def documented(thing: Any, path: str, level: int = 2) -> str:
    """What mkdocstrings makes of a docstring; of a dataclass without methods, but with a table of its fields."""
    if not is_dataclass(thing):
        return f"::: {path}\n"
    cells = ((code(name), code(kind), code(value), text) for name, kind, value, text in docs_fields.rows(thing))  # type: ignore[arg-type]
    options = f"options: {{heading_level: {level}, members: false, show_docstring_attributes: false}}"
    return f"::: {path}\n    {options}\n\n" + table(("field", "type", "default", "meaning"), cells)


def config_page() -> str:
    """QuantConfig, and what it becomes in config.json."""
    written = QuantConfig().to_quantization_config([])
    return "\n".join(
        [
            "# Quantization config\n",
            "`squawq quantize` writes this `quantization_config` to `config.json`. "
            "[The file format](../explanation/format.md) says what it means for the tensors, and what is read of other "
            "writers' settings.\n",
            fenced(json.dumps(written, indent=2), "json"),
            "From Python, a run is set by `squawq.QuantConfig`; "
            "[its fields](python.md#squawq.quant_config.QuantConfig) are explained with the Python API. "
            "The command line has [a flag for each](cli.md#squawq-quantize).\n",
        ]
    )


def metrics_page() -> str:
    """What GET /metrics of a new server has."""
    idle = Stats(**{field.name: 0 for field in fields(Stats)})
    text = Metrics("model", lambda: idle).render()[0].decode()
    rows = ((code(m.name), m.type, ", ".join(map(code, labels(m))), m.documentation) for m in sorted_families(text))
    return "\n".join(
        [
            "# Metrics\n",
            "`GET /metrics` has these, as Prometheus text or, where the request asks for it, as OpenMetrics. Names"
            " that begin with `vllm:` are vLLM's, those with `tgi_` are TGI's. Counters end in `_total` in the "
            "output, except TGI's. [The server](../explanation/serving.md#operation) says which metrics of vLLM "
            "and TGI are absent.\n",
            table(("metric", "type", "labels", "meaning"), rows),
        ]
    )


def sorted_families(text: str) -> list[Any]:
    found = (family for family in text_string_to_metric_families(text) if not family.name.endswith("_created"))
    return sorted(found, key=lambda family: str(family.name))


def labels(family: Any) -> list[str]:
    """A family's labels, without those of histograms."""
    return sorted({name for sample in family.samples for name in sample.labels} - {"le", "quantile"})


def index_page() -> str:
    return "\n".join(
        [
            "# Reference\n",
            "These pages are generated from the code of this version.\n",
            "- [Command line](cli.md): every command and option",
            "- [squawq serve](serve.md): flags, environment variables and keys of the YAML file",
            "- [text-generation-launcher](launcher.md): TGI's flags and variables",
            "- [HTTP API](http.md): routes and the fields of their bodies",
            "- [Python API](python.md)",
            "- [Quantization config](quantization-config.md)",
            "- [Metrics](metrics.md)",
            "",
        ]
    )


SERVE = (
    "Each flag is an environment variable too (`SQUAWQ_MAX_MODEL_LEN` for `--max-model-len`), and a key of the "
    "YAML file of `--config` (`max-model-len: 4096`). Flags win over variables, and variables over the file. Where"
    " vLLM has the flag, its name is vLLM's. [The server](../explanation/serving.md) explains what they do "
    "together."
)
LAUNCHER = (
    "`text-generation-launcher` takes TGI's flags and environment variables. A flag wins over its variable. "
    "[Moving from TGI](../migrate/tgi.md) says what differs."
)


def pages() -> dict[str, str]:
    """Every reference page by its file name."""
    return {
        "index.md": index_page(),
        "cli.md": cli_page(),
        "serve.md": flags_page("squawq serve", SERVE, launcher.FLAGS),
        "launcher.md": flags_page("text-generation-launcher", LAUNCHER, tgi_launcher.FLAGS),
        "http.md": http_page(),
        "python.md": python_page(),
        "quantization-config.md": config_page(),
        "metrics.md": metrics_page(),
    }


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
