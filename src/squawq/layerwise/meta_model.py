"""Builds transformers' causal LM on the meta device: its layers, their call arguments, its embedding and head.

No weights are loaded; only the final norm and buffers computed from the config (rotary frequencies, scales) exist.
Nothing outside the layers is reimplemented: the model's own forward runs, with layers replaced by functions that
capture their arguments.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from squawq.config import with_text_config
from squawq.config_values import MAX_LAYERS, MAX_REAL, MAX_SIZE
from squawq.errors import CheckpointError, ConfigError, SquawqError
from squawq.families import Family, ScalingGroup
from squawq.nn.experts import Expert, Experts, gating, is_interleaved, is_stacked, is_transposed, stacked_sizes

Arguments = dict[str, Any]
PER_LAYER = "embed_tokens_per_layer"  # transformers' name of the per-layer embedding
SHARED = "shared_kv_states"  # transformers' name of the argument that has keys and values of earlier layers
MAX_MODULES = 2**17
MAX_CONSTANTS = 2**28  # bytes
MAX_COUNTS = {"layers": MAX_LAYERS, "experts": 4096}  # by a part of the key; MAX_SIZE for others
LEGACY_KEYS = (  # that transformers' configs read and do not keep
    *("rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor", "rotary_dim"),
    *("sliding_window_pattern", "full_attention_interval"),
)


class MetaModel:
    """A transformers model without weights.

    Attributes:
        layers: transformers' decoder layers on the meta device. Stacked experts are split into linears, named as in
            checkpoints.
        outer: Shapes of the tensors outside the layers, by name in the text model.
        outer_linears: Names of linears outside the layers, without the head.
        per_layer: Names in `outer` of what per-layer inputs are computed from (Gemma 4 E2B, E4B), their embedding
            first; none where layers have no inputs of their own.
        shares: Whether some layers read keys and values of earlier ones instead of their own.
        ignored: Patterns of checkpoint names that transformers does not load.
        transposed: Whether the architecture stacks its experts' weights as [in, out].
        interleaved: Whether gate and up alternate in them.
    """

    def __init__(self, raw: Mapping[str, Any], where: str, family: Family, device: str = "cpu") -> None:
        """Build the model.

        Args:
            raw: Contents of config.json.
            where: Its path, for messages.
            family: Row of its model_type.
            device: Where hidden states are computed.

        Raises:
            CheckpointError: transformers cannot use the config.
        """
        self.family, self.device, self.where = family, device, where
        with refusing(where), _few_modules():
            self.model = _build(raw, where)
            self.config = self.model.config
            self.layers: Any = self.model.get_submodule(family.layers)
            stacks = [stack for layer in self.layers for stack in _unstack(layer, family)]
        self.transposed, self.interleaved = any(map(is_transposed, stacks)), any(map(is_interleaved, stacks))
        self.ignored: list[str] = list(self.model._keys_to_ignore_on_load_unexpected or ())
        state = self.model.state_dict()
        self.outer = {n: tuple(t.shape) for n, t in state.items() if not n.startswith(f"{family.layers}.")}
        if self.config.tie_word_embeddings:
            self.outer.pop(f"{family.head}.weight", None)
        inside = set(self.layers.modules())
        outer = {name: part for name, part in self.model.named_modules() if part not in inside and name != family.head}
        self.outer_linears = [name for name, part in outer.items() if isinstance(part, nn.Linear)]
        self._text: Any = self.model.get_submodule(family.layers.rpartition(".")[0])
        self.per_layer = sorted((name for name in self.outer if "per_layer" in name), key=lambda n: PER_LAYER not in n)
        self.shares = getattr(self.config, "num_kv_shared_layers", 0) > 0
        self._check_per_layer()
        self.fill_constants(part for part in self.model.modules() if part not in inside)
        self._arguments: dict[tuple[int, int, torch.dtype], list[Arguments]] = {}

    def _check_per_layer(self) -> None:
        if self.shares and SHARED not in signature(self.layers[0].forward).parameters:
            raise CheckpointError(f"{self.where}: sharing keys and values between layers needs a newer transformers")
        for name in self.per_layer[:1]:
            tokens, needed = self.outer[name][0], self.outer[f"{self.family.embedding}.weight"][0]
            if tokens < needed:
                raise CheckpointError(
                    f"{self.where}: the per-layer embedding has {tokens} rows, the token embedding {needed}"
                )

    def groups(self, index: int) -> tuple[ScalingGroup, ...]:
        """A layer's scaling groups. Raises ConfigError for a linear that the family's row does not know."""
        modules = dict(self.layers[index].named_modules())
        groups = self.family.layer_groups(list(modules))
        known = {name for group in groups for name in (*group.linears, *group.unquantized_consumers)}
        known.update(self.family.routers)
        for name, module in modules.items():
            if isinstance(module, nn.Linear) and name not in known:
                raise ConfigError(
                    f"{self.family.layer(index)}.{name}: the row of {self.family.model_type} in squawq/families.py "
                    "does not say what to do with this linear"
                )
        return groups

    def shapes(self, index: int) -> dict[str, tuple[int, int]]:
        """(out_features, in_features) of a layer's linears and routers, as the architecture has them."""
        names = [name for group in self.groups(index) for name in (*group.linears, *group.unquantized_consumers)]
        modules: dict[str, Any] = dict(self.layers[index].named_modules())
        weights = {name: modules[name].weight for name in (*names, *self.family.routers) if name in modules}
        return {name: (weight.shape[0], weight.shape[1]) for name, weight in weights.items()}

    def fill_constants(self, parts: Iterable[nn.Module]) -> None:
        """Compute the buffers of modules that checkpoints do not store, such as rotary frequencies."""
        lost = {part: names for part in parts if (names := part._non_persistent_buffers_set)}
        found = [
            (part, name, buffer) for part in lost for name in lost[part] if (buffer := part._buffers[name]) is not None
        ]
        if sum(buffer.nbytes for _, _, buffer in found) > MAX_CONSTANTS:
            raise CheckpointError(f"{self.where}: its rotary frequencies take more than {MAX_CONSTANTS:,} bytes")
        with refusing(self.where):
            for part, name, buffer in found:
                part._buffers[name] = torch.empty_like(buffer, device=self.device)
            for part in lost:
                self.model._init_weights(part)

    @torch.no_grad()
    def embed(self, ids: Tensor, table: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Input of the first layer.

        Args:
            ids: int64 [blocks, tokens].
            table: Embedding weight [vocab, hidden]; only the rows of `ids` are read.
            dtype: Computation dtype.

        Returns:
            Hidden states [blocks, tokens, hidden] of `dtype`.
        """
        used, compact = torch.unique(ids, return_inverse=True)
        given: list[Tensor] = []

        def first(hidden: Tensor, *_: object, **__: Any) -> Tensor:
            given.append(hidden)
            return hidden

        self._run(self._base, compact.to(self.device), table[used].to(dtype), lambda _: first)
        return given[0].to(dtype)

    @torch.no_grad()
    def per_layer_inputs(self, rows: Tensor, own: Tensor) -> Tensor:
        """What each layer is given beside hidden states; `put` has loaded the rest of `per_layer`.

        Args:
            rows: Rows of the embedding [tokens, hidden], float32.
            own: Rows of the per-layer embedding [tokens, layers * size], float32.

        Returns:
            float32 [tokens, layers, size].
        """
        ids, text = torch.arange(len(rows), device=self.device)[None], self._text
        embedding = self.model.get_submodule(self.family.embedding)
        with self._rows(embedding, rows), self._rows(getattr(text, PER_LAYER), own), refusing(self.where):
            states = embedding(ids)
            found: Tensor = text.project_per_layer_inputs(states, text.get_per_layer_inputs(ids, states))[0]
            return found

    @torch.no_grad()
    def arguments(self, blocks: int, tokens: int, dtype: torch.dtype = torch.float32) -> list[Arguments]:
        """Keyword arguments of each layer (masks, rotary embeddings) for hidden states of this shape and dtype."""
        if (found := self._arguments.get((blocks, tokens, dtype))) is None:
            found = self._arguments[blocks, tokens, dtype] = [{} for _ in self.layers]

            def keep(index: int) -> Callable[..., Tensor]:
                def layer(hidden: Tensor, *_: object, **kwargs: Any) -> Tensor:
                    found[index] = kwargs
                    return hidden

                return layer

            self._run(self._base, self._no_ids(blocks, tokens), self._no_rows(dtype), keep)
        return found

    def put(
        self, outer: Mapping[str, Tensor], dtype: torch.dtype = torch.float32, vocabulary: slice = slice(None)
    ) -> None:
        """Load what `logits` needs: tensors outside the layers that come after them, and a head even if tied.

        Args:
            outer: The tensors by name in the model, in any dtype on any device.
            dtype: Computation dtype.
            vocabulary: The tokens whose logits are computed.
        """
        for name, tensor in outer.items():
            owner, _, kind = name.rpartition(".")
            part = tensor[vocabulary] if name.startswith(f"{self.family.head}.") else tensor
            parameter = nn.Parameter(part.to(self.device, dtype), requires_grad=False)
            setattr(self.model.get_submodule(owner), kind, parameter)

    def logits(self, states: Tensor) -> Tensor:
        """[blocks, tokens, vocab] from the last layer's output: final norm, head, and what the model does to logits."""
        ids = self._no_ids(*states.shape[:2])
        found: Tensor = self._run(
            self.model, ids, self._no_rows(states.dtype), lambda _: lambda *_, **__: states
        ).logits
        return found

    def renaming(self) -> Callable[[str], str]:
        """From names on disk to the model's, as transformers maps them."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming

        entries = [e for e in get_model_conversion_mapping(self.model) if isinstance(e, WeightRenaming)]

        def rename(name: str) -> str:
            for entry in entries:
                name, _ = entry.rename_source_key(name)
            return name

        return rename

    def _base(self, ids: Tensor, use_cache: bool) -> None:
        with _acting(self.model.get_submodule(self.family.norm), lambda hidden: hidden):
            self._text(ids, use_cache=use_cache)

    def _run(
        self, model: Callable[..., Any], ids: Tensor, rows: Tensor, layer: Callable[[int], Callable[..., Tensor]]
    ) -> Any:
        """Run `model` on ids that index `rows` of an embedding, each layer replaced by layer(index)."""
        embedding = self.model.get_submodule(self.family.embedding)
        with self._rows(embedding, rows), ExitStack() as stack:
            for index, module in enumerate(self.layers):
                stack.enter_context(_acting(module, layer(index)))
            if self.per_layer:  # no layer runs that would read them
                stack.enter_context(_acting(self._text, lambda *_: None, "get_per_layer_inputs"))
                stack.enter_context(_acting(self._text, self._no_inputs, "project_per_layer_inputs"))
            stack.enter_context(refusing(self.where))
            return model(ids, use_cache=False)

    @contextmanager
    def _rows(self, embedding: Any, rows: Tensor) -> Iterator[None]:
        """Give an embedding these rows while open."""
        kept, padding = embedding.weight, embedding.padding_idx
        embedding.weight, embedding.padding_idx = nn.Parameter(rows.to(self.device), requires_grad=False), None
        try:
            yield
        finally:
            embedding.weight, embedding.padding_idx = kept, padding

    def _no_inputs(self, states: Tensor, _: None) -> Tensor:
        return states.new_empty(*states.shape[:2], len(self.layers), 0)

    def _no_ids(self, blocks: int, tokens: int) -> Tensor:
        return torch.zeros(blocks, tokens, dtype=torch.int64, device=self.device)

    def _no_rows(self, dtype: torch.dtype) -> Tensor:
        return torch.zeros(1, self.config.hidden_size, dtype=dtype)


@contextmanager
def _acting(module: nn.Module, instead: Callable[..., Any], method: str = "forward") -> Iterator[None]:
    """Replace a module's method while open."""
    setattr(module, method, instead)
    try:
        yield
    finally:
        delattr(module, method)


@contextmanager
def refusing(where: str) -> Iterator[None]:
    """Turn the many exceptions that transformers raises for a bad config.json into CheckpointError."""
    try:
        yield
    except (SquawqError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if "allocate memory" in str(error):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise CheckpointError(f"{where}: transformers refuses it: {reason}") from error


@contextmanager
def _few_modules() -> Iterator[None]:
    """Bound how many modules are built while open: one number in a config can ask for millions."""
    left, thread = MAX_MODULES, threading.get_ident()

    def count(*_: object) -> None:
        nonlocal left
        if threading.get_ident() == thread:
            left -= 1
            if left < 0:
                raise ValueError(f"it has more than {MAX_MODULES:,} modules")

    handle = nn.modules.module.register_module_module_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def transformers_config(raw: Mapping[str, Any], where: str) -> Any:
    """transformers' config of the text model.

    Only the architecture's own keys are passed on: others name kernels to fetch, code to run or labels to count.

    Raises:
        CheckpointError: transformers cannot use the config.
    """
    from transformers import CONFIG_MAPPING

    with refusing(where):
        raw = with_text_config(raw)
        kind = raw.get("model_type")
        if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
            raise CheckpointError(f"{where}: transformers has no model_type {kind!r:.100}")
        settings = _known_keys(CONFIG_MAPPING[kind], raw, where)
        text = raw.get("text_config")
        if isinstance(text, Mapping) and (found := CONFIG_MAPPING[kind].sub_configs.get("text_config")) is not None:
            if not hasattr(found, "attribute_map"):  # AutoConfig
                found = CONFIG_MAPPING[text["model_type"]]
            inner = _known_keys(found, text, where)
            settings["text_config"] = inner | ({"model_type": text["model_type"]} if "model_type" in text else {})
        config = CONFIG_MAPPING[kind].from_dict(settings).get_text_config()
        tied = getattr(config, "tie_word_embeddings", raw.get("tie_word_embeddings"))  # some keep it outside
        if tied is not None:
            config.tie_word_embeddings = bool(tied)
        if getattr(config, "attn_logit_softcapping", None) is not None:
            config._attn_implementation = "eager"  # sdpa leaves the cap out
        return config


def _known_keys(kind: Any, raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Keys of the architecture itself, without those of parts beside the text model; numbers are range-checked."""
    from transformers import PretrainedConfig

    own = {field.name for field in fields(kind)} - {field.name for field in fields(PretrainedConfig)}
    for alias, name in kind.attribute_map.items():  # two names of one key, of which either may be the architecture's
        own |= {name} if alias in own else {alias} if name in own and name not in raw else set()
    known = {k: v for k, v in raw.items() if k in {*own, *LEGACY_KEYS} and k not in kind.sub_configs}
    for key, value in known.items():
        _check_numbers(key, value, where)
    return known


def _check_numbers(key: str, value: Any, where: str) -> None:
    if isinstance(value, Mapping):
        for inner, each in value.items():
            _check_numbers(inner, each, where)
    elif isinstance(value, list):
        for each in value:
            _check_numbers(key, each, where)
    elif isinstance(value, int | float):
        most = next((most for part, most in MAX_COUNTS.items() if part in key), MAX_SIZE)
        if not abs(value) <= (most if isinstance(value, int) else MAX_REAL):
            raise CheckpointError(f"{where}: {key:.100} is {value!r:.100}; no model has that much")


def _build(raw: Mapping[str, Any], where: str) -> Any:
    from squawq.layerwise.text_models import causal_lm

    config = transformers_config(raw, where)
    with torch.device("meta"):
        return causal_lm(config).eval()


def _unstack(layer: nn.Module, family: Family) -> list[nn.Module]:
    """Split stacked experts into linears on the meta device. Returns what was replaced."""
    stacks = {name: module for name, module in layer.named_modules() if is_stacked(module)}
    for name, module in stacks.items():
        count, hidden, inner = stacked_sizes(module)
        shapes = dict(zip(family.experts, ((hidden, inner), (hidden, inner), (inner, hidden)), strict=True))
        bias = is_interleaved(module)
        with torch.device("meta"):
            linears = [{n: nn.Linear(*shape, bias=bias) for n, shape in shapes.items()} for _ in range(count)]
        layer.set_submodule(name, Experts([Expert(each, gating(module)) for each in linears]))
    return list(stacks.values())
