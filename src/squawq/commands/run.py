"""`squawq run`: fetch a model, quantize it if it is too large in 16 bits, and talk to it."""

from __future__ import annotations

import hashlib
import inspect
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from squawq.commands.chat import chat
from squawq.commands.inspect import size
from squawq.errors import CheckpointError, ConfigError, printable
from squawq.progress import console
from squawq.quant_config import QuantConfig

if TYPE_CHECKING:
    from squawq.engine.config import EngineConfig
    from squawq.fitting import Fitting

SETTINGS = QuantConfig()
COPIES = 1  # raise it when quantization's result changes: INT4 copies of earlier versions are then not used again
QUANTIZE = Annotated[
    bool | None,
    typer.Option(
        "--quantize/--no-quantize",
        help="Quantize a 16-bit model to INT4 first, or run it as it is",
        show_default="quantize what is too large for the free memory",
    ),
]


def run(model: str, quantize: bool | None, **options: Any) -> None:
    """Fetch a model, quantize it to INT4 if it is too large for this machine in 16 bits, and talk to it.

    The INT4 copy is kept in squawq's cache folder (XDG_CACHE_HOME) and reused. Run the command again to resume an
    interrupted quantization. The other options are those of squawq chat.

    \b
    Examples:
      squawq run Qwen/Qwen3-8B
      squawq run Llama-3.1-8B-Instruct --quantize --system "You are a friendly storyteller."
      squawq run Qwen/Qwen3-8B --model-impl transformers
    """
    from squawq.config import ModelConfig
    from squawq.engine.loaded_model import why_transformers
    from squawq.families import family_of
    from squawq.fitting import fitting
    from squawq.format.files import read_config
    from squawq.hub.download import resolve, resolve_small

    settings = _checked(options)
    with console.status(escape(printable(f"looking at {model}"))):
        small = resolve_small(model)
        config = ModelConfig.from_dict(read_config(small), model)
        family_of(config.model_type)  # these raise for a model that cannot be run
        why_transformers(config, settings)
        _check_text(model, small)
        place = small if Path(model).is_dir() else small / "config.json"  # of a Hub model the weights are not here yet
        gpus = options["tensor_parallel_size"]
        room = fitting(place, options["device"], exact=options["exact"], gpus=gpus)
    if config.quant is not None:
        if quantize:
            raise ConfigError(f"{model} is quantized already; leave out --quantize")
        _require(room.int4.fits, model, room, room.int4.needed)
        console.print(f"{_needs('INT4', room.int4.needed, room)}: running it")
    elif quantize or (quantize is None and not room.dense.fits):
        _require(room.int4.fits, f"{model} in INT4", room, room.int4.needed)
        why = "" if quantize else f"{_needs('16-bit', room.dense.needed, room)}: "
        model = str(_quantized(model, small, room, why))
    else:
        _require(room.dense.fits, f"{model} in 16 bits", room, room.dense.needed)
        console.print(f"{_needs('16-bit', room.dense.needed, room)}: running it as it is")
    chat(str(resolve(model)), **options)


def _signature() -> inspect.Signature:
    """MODEL, --quantize, and the options of `squawq chat`."""
    model, *others = inspect.signature(chat, eval_str=True).parameters.values()
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Signature([model, inspect.Parameter("quantize", kind, default=None, annotation=QUANTIZE), *others])


run.__signature__ = _signature()  # type: ignore[attr-defined]


def _checked(options: dict[str, Any]) -> EngineConfig:
    """The engine's settings. Raises ConfigError for options of the chat that cannot be, before anything is fetched."""
    from squawq.engine.config import EngineConfig
    from squawq.engine.request import SamplingParams

    def given(*names: str) -> dict[str, Any]:
        return {name: options[name] for name in names if options[name] is not None}

    SamplingParams(**given("max_tokens", "temperature", "top_p", "seed"))
    numbers = given("threads", "tensor_parallel_size")
    return EngineConfig(**numbers, **given("device", "model_impl", "exact", "head", "dtype", "kv_cache_dtype"))


def _check_text(model: str, folder: Path) -> None:
    """Raise CheckpointError for a model that cannot chat, before its weights are fetched."""
    from squawq.format.files import has_file
    from squawq.publish.card import has_template

    if not has_file(folder / "tokenizer.json"):
        raise CheckpointError(f"{model}: has no tokenizer.json, so squawq cannot run it")
    if not has_template(folder):
        raise CheckpointError(f"{model}: has no chat template; use squawq generate")


def _needs(form: str, needed: int, room: Fitting) -> str:
    tokens = f"{room.context:,} tokens"
    return f"{form} weights and {tokens} need {_gb(needed)}, and {_gb(room.free)} are free ({room.device})"


def _gb(count: int) -> str:
    return size(count).partition(" (")[0]


def _require(fits: bool, what: str, room: Fitting, needed: int) -> None:
    if not fits:
        raise ConfigError(
            f"{what} needs {_gb(needed)} with {room.context:,} tokens, and {_gb(room.free)} are free ({room.device}); "
            "choose a smaller model or a larger machine"
        )


def _quantized(model: str, small: Path, room: Fitting, why: str) -> Path:
    """The INT4 copy in squawq's cache: an earlier one, or made now."""
    from squawq.commands.stopping import StoppableProgress
    from squawq.hub.download import resolve
    from squawq.quantization.pipeline import quantize

    out = _place(model, small, room.device)
    if (out / "config.json").is_file():
        console.print(f"{why}using the INT4 copy that was made earlier, {out}")
        return out
    console.print(f"{why}quantizing to INT4 ({_gb(room.int4.weights)}) first")
    folder = resolve(model)
    with StoppableProgress() as observer:
        quantize(folder, out, SETTINGS, device=room.device, observer=observer, progress=False)
    console.print(f"the INT4 copy is in {out}")
    return out


def _place(model: str, small: Path, device: str) -> Path:
    """The copy's folder, named by the model, its version, the settings and the kind of device."""
    from squawq.local_models import quantized_models
    from squawq.report.files import public_name

    name = public_name(model)
    if Path(model).is_dir():
        files = sorted(path for pattern in ("config.json", "*.safetensors") for path in small.glob(pattern))
        version = [str(small.resolve()), *((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files)]
    else:
        version = [name, small.name]  # the snapshot's commit
    same = json.dumps([version, SETTINGS.to_dict(), device.partition(":")[0], COPIES])
    key = hashlib.sha256(same.encode()).hexdigest()[:12]
    return quantized_models() / f"{name.replace('/', '--')}-{key}"
