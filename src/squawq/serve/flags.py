"""Flags as tables: each row has a flag, its setting and the reader of its text. Values come from the command line
(typer), the environment or a YAML file. The tables are in launcher.py and tgi_launcher.py.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import json
import math
import re
import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from typer.core import TyperCommand
from typer.exceptions import TyperException

from squawq.errors import ConfigError, SquawqError, printable
from squawq.progress import discard_stdout
from squawq.serve.settings import ServerSettings

Reader = Callable[[str], Any]  # raises ConfigError with what the text should have been
SETTINGS = {entry.name: entry for entry in fields(ServerSettings)}
SCALES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}


def type_name(kind: Any) -> str:
    """A setting's type as KINDS has it. Python 3.13 calls Path pathlib._local.Path."""
    return getattr(kind, "__name__", None) or re.sub(r"\bpathlib[\w.]*\.", "", str(kind))


TYPES = {name: type_name(kind) for name, kind in get_type_hints(ServerSettings).items()}


def whole(least: int) -> Reader:

    def read(text: str) -> int:
        if not re.fullmatch(r"-?[0-9]{1,18}", text) or int(text) < least:
            raise ConfigError(f"it must be a whole number of at least {least}")
        return int(text)

    return read


def scaled(text: str) -> int:
    """A number as vLLM writes it: 4096, 4k (4000), 4K (4096), 1.5k (1500); 0 for any other text."""
    match = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]{1,9}(?=[kmg]))?)([kmgKMG]?)", text)
    return int(Decimal(match[1]) * SCALES[match[2]]) if match else 0


def tokens(text: str) -> int | None:
    """A number of tokens, `scaled`; None for auto and -1."""
    if text in ("auto", "-1"):
        return None
    count = scaled(text)
    if count < 1:
        raise ConfigError("it must be a whole number of at least 1, such as 4096, 4K (4096), 4k (4000) or 1.5k (1500)")
    return count


def number(text: str) -> float:
    """A finite number of at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise ConfigError("it must be a number of at least 0")
    return value


def share(text: str) -> float:
    """A fraction above 0, at most 1."""
    value = number(text)
    if not 0 < value <= 1:
        raise ConfigError("it must be a number above 0, at most 1, such as 0.9")
    return value


def listed(text: str) -> tuple[str, ...]:
    """One text, or a JSON list of texts."""
    try:
        return tuple(map(str, json.loads(text))) if text.startswith("[") else (text,)
    except ValueError:
        raise ConfigError('it must be a text or a JSON list such as ["https://a.example"]') from None


def arguments(text: str) -> dict[str, Any]:
    """A JSON object."""
    with contextlib.suppress(ValueError):
        if isinstance(found := json.loads(text), dict):
            return found
    raise ConfigError('it must be a JSON object such as {"enforce_eager": true}')


@dataclass(frozen=True)
class Choice:
    """Reads one of the keys, ignoring case, as its value."""

    known: Mapping[str, Any]

    def __call__(self, text: str) -> Any:
        if text.lower() not in self.known:
            raise ConfigError(f"choose one of {', '.join(self.known)}")
        return self.known[text.lower()]

    @property
    def metavar(self) -> str:
        return "|".join(self.known)


def among(names: Iterable[str]) -> Choice:
    return Choice({name: name for name in names})


@dataclass(frozen=True)
class Only:
    """Reads `value`, and refuses all else with `why`."""

    value: object
    reader: Reader
    why: str

    def __call__(self, text: str) -> Any:
        if self.reader(text) != self.value:
            raise ConfigError(self.why)
        return self.value

    @property
    def metavar(self) -> str:
        return "TEXT" if self.value is None else str(self.value).lower()


truth = Choice({"true": True, "false": False, "1": True, "0": False})
KINDS: dict[str, tuple[Reader, str]] = {  # by a setting's type: how its text is read, what help calls it
    "str": (str, "TEXT"),
    "bool": (truth, "true|false"),
    "int": (whole(1), "N"),
    "int | None": (whole(1), "N"),
    "float | None": (number, "NUMBER"),
    "float": (number, "SECONDS"),
    "Path | None": (Path, "FILE"),
    "tuple": (lambda text: (text,), "TEXT"),
}


def completed_by(metavar: str) -> Callable[[str], list[str]]:
    """A completion for the shell: the words of a metavar such as auto|cpu|FILE that stand for themselves."""
    words = [word for word in metavar.split("|") if word == word.lower()] if "|" in metavar else []
    return lambda incomplete: [word for word in words if word.startswith(incomplete)]


def complete_model(incomplete: str) -> list[str]:
    """A completion for the shell: the models on this machine."""
    from squawq.local_models import complete

    return complete(incomplete)


@dataclass(frozen=True)
class FromFile:
    """A flag's value in the file of --config."""

    path: str
    texts: Sequence[str]


@dataclass(frozen=True)
class Flag:
    """The flag `--key`.

    Attributes:
        to: Its setting, if not `key`. A flag without a setting is read all the same, which may refuse it.
        read: Reads its text; by default the setting's type says how.
        names: Further names.
        switch: It takes no value; "no": there is --no-key as well.
        variables: Environment variables. Without the flag, the first that is set is read.
        default: If it is not the setting's.
        noted: It has no effect; the log gives its help text as the reason.
        metavar: The value's name in the help, if not the reader's. The shell completes its lower-case words.
        is_model: The shell completes the models on this machine.
    """

    key: str
    help: str
    to: str = ""
    read: Reader | None = None
    names: tuple[str, ...] = ()
    switch: bool | str = False
    variables: tuple[str, ...] = ()
    default: object = None
    noted: bool = False
    metavar: str = ""
    is_model: bool = False

    @property
    def name(self) -> str:
        return "--" + self.key.replace("_", "-")

    @property
    def setting(self) -> str:
        return "" if self.noted else self.to or (self.key if self.key in SETTINGS else "")

    @property
    def kind(self) -> str:
        kind = TYPES[self.setting] if self.setting else "str"
        return kind if kind in KINDS else "str"

    def parameter(self, panel: str) -> inspect.Parameter:
        """The parameter for typer: texts and switches."""
        default = self.default or (SETTINGS[self.setting].default if self.setting else None)
        shown = not isinstance(default, bool) and isinstance(default, str | int | float)
        metavar = self.metavar or getattr(self.read, "metavar", KINDS[self.kind][1])
        option = typer.Option(
            f"{self.name}/--no-{self.name[2:]}" if self.switch == "no" else self.name,
            *self.names,
            help=f"{self.help} (default: {default})" if shown else self.help,
            rich_help_panel=panel,
            metavar=None if self.switch else metavar,
            autocompletion=complete_model if self.is_model else completed_by(metavar),
        )
        kind: Any = bool if self.switch else list[str] if self.kind.startswith("tuple") else str
        annotation = Annotated[kind | None, option]
        return inspect.Parameter(self.key, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)

    def texts(self, given: Any, environ: Mapping[str, str]) -> tuple[str, Sequence[str]]:
        """The source of a value and its texts: the command line (typer's `given`), the environment, or a file."""
        file = given if isinstance(given, FromFile) else None
        texts = [] if given is None or file else given if isinstance(given, list | tuple) else [str(given)]
        if texts:
            return self.name, texts
        for variable in self.variables:
            text = environ.get(variable)
            if text or (text == "" and self.setting == "api_keys"):  # an empty key opens no server
                return variable, [text]
        return (self.name, ()) if file is None else (f"{file.path}: {self.key}", file.texts)

    def value(self, given: Any, environ: Mapping[str, str]) -> Any:
        source, texts = self.texts(given, environ)
        read, found = self.read or (truth if self.switch else KINDS[self.kind][0]), []
        if len(texts) > 1 and not self.kind.startswith("tuple"):
            raise ConfigError(f"{source} is {list(texts)!r}; give one value")
        for text in texts:
            try:
                found.append(read(text))
            except ConfigError as error:
                raise ConfigError(f"{source} is {text!r}; {error}") from None
        if not found:
            return self.default
        return sum(found, ()) if self.kind.startswith("tuple") else found[0]


@dataclass(frozen=True)
class FlagTable:
    """A launcher's flags by their section of the help. host: the variable that names the address to listen on."""

    sections: Mapping[str, Sequence[Flag]]
    host: str

    def __iter__(self) -> Iterator[Flag]:
        return itertools.chain(*self.sections.values())

    def signature(self, *first: inspect.Parameter) -> inspect.Signature:
        """The signature for a function that typer calls with these flags."""
        rows = (flag.parameter(section) for section, flags in self.sections.items() for flag in flags)
        return inspect.Signature([*first, *rows])

    def read(self, given: Mapping[str, Any], environ: Mapping[str, str]) -> dict[str, Any]:
        """Values by flag. Raises ConfigError with the source (flag, variable or file), the value and the choices.

        `host` is ignored if it is the machine's name: containers and some shells set HOST and HOSTNAME so, which is no
        choice of an address to listen on.
        """
        environ = {**environ, self.host: ""} if environ.get(self.host) == socket.gethostname() else environ
        found = {flag.key: flag.value(given[flag.key], environ) for flag in self}
        return {key: value for key, value in found.items() if value is not None}

    def notes(self, given: Mapping[str, Any], environ: Mapping[str, str]) -> dict[str, str]:
        """For each given flag or variable without effect, the reason."""
        found = {}
        for flag in (flag for flag in self if flag.noted):
            source, texts = flag.texts(given[flag.key], environ)
            if texts and (flag.switch == "no" or flag.value(given[flag.key], environ) not in (False, None)):
                found[source] = flag.help
        return found

    def settings(self, found: Mapping[str, Any], **others: Any) -> ServerSettings:
        known = {flag.setting: found[flag.key] for flag in self if flag.key in found}
        known.pop("", None)
        return ServerSettings(**{**known, **others})


HELP = {"help_option_names": ["-h", "--help"]}


class Command(TyperCommand):
    """A typer command that accepts `--flag a b` for repeatable flags, as vLLM does, and has plain help in sections."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        repeatable = {name for param in self.params if getattr(param, "multiple", False) for name in param.opts}
        spread: list[str] = []
        flag = None
        for argument in args:
            if argument.startswith("-"):
                flag = argument if argument in repeatable else None
            elif flag is not None and spread[-1] != flag:
                spread.append(flag)
            spread.append(argument)
        return super().parse_args(ctx, spread)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                sections.setdefault(getattr(param, "rich_help_panel", None) or "Other", []).append(record)
        for name, records in sections.items():
            with formatter.section(name):
                formatter.write_dl(records)


def parse(function: Callable[..., None], arguments: Sequence[str]) -> dict[str, Any]:
    """Parse arguments as typer would for `function`."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None, context_settings=HELP)
    app.command(cls=Command)(function)
    with typer.main.get_command(app).make_context(function.__name__, list(arguments)) as context:
        return context.params


def _misuse(error: TyperException, program: str) -> str:
    context = getattr(error, "ctx", None)
    message = error.format_message().replace(": Value error, ", ": ").removesuffix(".")
    return f"{message} (see {program if context is None else context.command_path} --help)"


def finish(app: typer.Typer, program: str, arguments: list[str] | None, stopped: str = "stopped") -> int:
    """Run a command line. Returns the exit code: 0, 1 for system errors, 2 for usage errors, 130 when interrupted."""
    try:
        code = app(arguments, standalone_mode=False, prog_name=program)
        sys.stdout.flush()  # now, while an error can be told
    except (TyperException, SquawqError) as error:
        message = _misuse(error, program) if isinstance(error, TyperException) else str(error)
        print(f"{program}: error: {printable(' '.join(message.split()))}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except BrokenPipeError:
        discard_stdout()
        return 1
    except (OSError, MemoryError, RuntimeError) as error:  # disk full, CUDA out of memory
        message = printable(" ".join(str(error).split())) or type(error).__name__
        print(f"{program}: error: {message}", file=sys.stderr)
        try:
            sys.stdout.flush()
        except OSError:  # it was stdout's
            discard_stdout()
        return 1
    if code == 130:
        print(f"{program}: {stopped}", file=sys.stderr)
    return code if isinstance(code, int) else 0
