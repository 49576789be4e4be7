"""transformers' causal LM of a text config, and one for text models that transformers has inside multimodal ones alone.

Their own position embeddings run: with text alone, multimodal rotary embedding (M-RoPE, Qwen2-VL) is the plain one.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from transformers import AutoModel, AutoModelForCausalLM, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

TEXT_MODELS = ("qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text", "qwen3_vl_moe_text")


class TextCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A text model and an output head [vocab, hidden]; called as transformers' causal LMs are."""

    base_model_prefix = "model"
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 (transformers' own form)
    _supports_sdpa = _supports_flash_attn = _supports_attention_backend = True

    def __init__(self, config: PretrainedConfig) -> None:
        config.tie_word_embeddings = bool(getattr(config, "tie_word_embeddings", False))
        super().__init__(config)
        self.model = AutoModel.from_config(config)
        self.lm_head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: Any) -> None:
        self.model._init_weights(module)

    def forward(
        self, input_ids: Any = None, logits_to_keep: int | torch.Tensor = 0, **kwargs: Any
    ) -> CausalLMOutputWithPast:
        """logits_to_keep: of so many last tokens, 0: of all; or their indices."""
        found = self.model(input_ids=input_ids, **kwargs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        rest = {name: value for name, value in found.items() if name != "last_hidden_state"}
        return CausalLMOutputWithPast(logits=self.lm_head(found.last_hidden_state[:, kept]), **rest)


@cache
def own_classes() -> dict[type[PretrainedConfig], type[TextCausalLM]]:
    """Our classes by config, as far as this transformers has TEXT_MODELS; `AutoModelForCausalLM` finds them, too."""
    found = {}
    for name in TEXT_MODELS:
        if name not in CONFIG_MAPPING:
            continue
        kind = CONFIG_MAPPING[name]
        if kind not in AutoModelForCausalLM._model_mapping:
            own = type(f"{kind.__name__.removesuffix('Config')}CausalLM", (TextCausalLM,), {"config_class": kind})
            AutoModelForCausalLM.register(kind, own, exist_ok=True)  # transformers has the config
            found[kind] = own
    return found


def causal_lm(config: PretrainedConfig) -> Any:
    """The model of a text config, in float32, on torch's default device."""
    own = own_classes().get(type(config))
    if own is not None:
        return own._from_config(config, dtype=torch.float32)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
