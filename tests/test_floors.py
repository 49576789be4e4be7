"""A file imports only from lower floors, or beside it without a loop; foreign packages have one door."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "squawq"
FLOORS: dict[str, float] = {
    "errors": 0,
    "showing": 0,
    "distributed": 2,
    "strict": 0.5,
    "config": 2,
    "config_values": 1.5,
    "delta_config": 1.6,
    "moe_config": 1.6,
    "rope_config": 1.7,
    "quant_config": 1,
    "stored_quant": 1.5,
    "progress": 2,
    "memory": 2,
    "format": 3,
    "decoder_traits": 1,
    "families": 4,
    "decoder_support": 4.5,
    "report": 4,
    "hub.cache": 4,
    "hub.download": 4,
    "hub.stream": 4,
    "text": 4,
    "text.child": 2,
    "backends": 5,
    "backends.devices": 5.2,
    "backends.cpu": 5.5,
    "backends.cuda": 5.5,
    "local_ranks": 6,
    "nn": 6,
    "compatibility": 6.5,
    "layerwise": 6.5,
    "engine": 7,
    "engine.request": 2,
    "quantization": 7,
    "quantization.self_calibration": 7.2,
    "quantization.token_weights": 7.2,
    "quantization.tuning": 7.2,
    "local_models": 7.2,
    "inspection": 7.5,
    "fitting": 7.6,
    "publish": 8,
    "evaluation": 8,
    "evaluation.metrics": 2,
    "export": 8,
    "integrations": 8,
    "transformers": 9,
    "llm": 8,
    "bench": 8,
    "demo": 9,
    "serve": 9,
    "serve.errors": 7,
    "serve.tools": 8,
    "serve.openai": 9.3,
    "serve.tgi": 9.3,
    "serve.web": 9,
    "serve.openapi_document": 9.4,
    "serve.app": 9.5,
    "serve.welcome": 9.3,
    "serve.server": 9.6,
    "serve.launcher": 9.7,
    "serve.tgi_launcher": 9.7,
    "commands": 10,
    "commands.chatting": 9.9,
    "cli": 11,
    "__main__": 12,
}
DOORS = {
    "safetensors": ("format.",),
    "transformers": ("layerwise.meta_model", "layerwise.text_models", "layerwise.attention", "integrations."),
    "typer": ("cli", "commands.", "serve.flags", "serve.launcher", "serve.tgi_launcher"),
    "yaml": ("serve.launcher",),
    "datasets": ("quantization.calibration",),
    "squawq_demo": ("demo",),
    "markupsafe": ("report.page",),
    "matplotlib": ("evaluation.plots",),
    "huggingface_hub": ("hub.", "publish."),
    "tokenizers": ("text.tokenizer",),
    "jinja2": ("text.chat_template", "report.page", "publish.usage"),
    "llguidance": ("engine.grammar",),
    "gguf": ("export.gguf", "export.gguf_metadata", "export.gguf_tensors"),
    "prompt_toolkit": ("commands.chatting.editor",),
    "markdown_it": ("commands.chatting.markdown",),
    "triton": ("backends.cuda.",),
    "vllm": ("engine.vllm", "integrations.vllm", "integrations.vllm_kernel"),
}


@cache
def modules() -> dict[str, ast.Module]:
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        name = ".".join(path.relative_to(SOURCE).with_suffix("").parts)
        found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def imports(tree: ast.Module) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                names.add(inner if node.module == "squawq" or is_module(inner) else node.module)
    return names


def is_module(name: str) -> bool:
    return (SOURCE.parent / (name.replace(".", "/") + ".py")).is_file()


def floor(module: str) -> float:
    module = module.removesuffix(".__init__")
    while module and module not in FLOORS:
        module = module.rpartition(".")[0]
    if not module:
        raise AssertionError("a module stands on no floor: give it one in FLOORS")
    return FLOORS[module]


def folder(module: str) -> str:
    return module.rpartition(".")[0]


@pytest.mark.parametrize("name", sorted(set(modules()) - {"__init__", "hub.__init__"}))
def test_imports_go_down(name: str) -> None:
    for imported in imports(modules()[name]):
        target = imported.removeprefix("squawq.")
        if not imported.startswith("squawq.") or target == "__version__":
            continue
        beside = folder(name) and folder(name) == folder(target)
        assert beside or floor(target) < floor(name), f"{name} imports {target}, which is not below it"


def test_no_loops_inside_a_folder() -> None:
    graph = {
        name: {i.removeprefix("squawq.") for i in imports(tree) if i.startswith("squawq.")}
        for name, tree in modules().items()
    }

    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"import loop: {' -> '.join((*path, name))}"
        if name in done:
            return
        for target in graph.get(name, ()):
            if folder(target) == folder(name):
                visit(target, (*path, name))
        done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("name", sorted(modules()))
def test_foreign_packages_have_one_door(name: str) -> None:
    for imported in imports(modules()[name]):
        doors = DOORS.get(imported.partition(".")[0])
        assert doors is None or name.startswith(doors), f"{name} imports {imported}; its door is {doors}"


@pytest.mark.parametrize("name", sorted(name for name in modules() if not name.startswith("backends.")))
def test_backends_are_found_by_the_registry(name: str) -> None:
    """Nothing outside of a backend imports one by name."""
    kept = ("squawq.backends.cpu", "squawq.backends.reference")
    for imported in imports(modules()[name]):
        assert not imported.startswith(kept), f"{name} imports {imported}; take it from the registry"
