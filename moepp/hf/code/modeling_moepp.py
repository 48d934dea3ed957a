"""MoE++ language models (arXiv 2410.07348) for Hugging Face transformers 4.46 to 5.x. Needs torch and transformers.

Letters: B batch, S new positions, P positions seen (cached + new), D width, G key/value heads, d head size, N experts
of every kind, T = B·S tokens, V vocabulary.
"""

# What the base classes declare differs between versions.
# pyright: reportCallIssue=false, reportArgumentType=false, reportAssignmentType=false

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast

from .configuration_moepp import MoeppConfig
from .layers_moepp import (
    MoeppDecoderLayer,
    MoeppExperts,
    MoeppRMSNorm,
    MoeppRouter,
    MoeppZeroComputation,
    attention_mask_table,
    rotation_table,
)

# The cache's name in outputs and arguments: "cache" from transformers 5.24 on.
_CACHE = "cache" if "cache" in MoeModelOutputWithPast.__dataclass_fields__ else "past_key_values"


class MoeppPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation."""

    config_class = MoeppConfig
    base_model_prefix = "model"
    _no_split_modules: ClassVar = ["MoeppDecoderLayer"]
    _supports_sdpa = True
    _supports_cache_class = True
    _skip_keys_device_placement: ClassVar = ["past_key_values", "cache"]

    def _init_weights(self, module: nn.Module) -> None:
        # nn.init functions leave alone what was loaded already (transformers 5 sees to that).
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Embedding | MoeppRouter | MoeppExperts | MoeppZeroComputation):
            for name, parameter in module.named_parameters(recurse=False):
                nn.init.normal_(parameter, std=1.0 if name == "value" else std)
        elif isinstance(module, MoeppRMSNorm):
            nn.init.ones_(module.weight)


class MoeppModel(MoeppPreTrainedModel):
    """The decoder up to its final norm."""

    _auto_class = "AutoModel"  # save_pretrained copies this code too

    def __init__(self, config: MoeppConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(MoeppDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = MoeppRMSNorm(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed_tokens = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | tuple | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast:
        """``attention_mask``: [B, P], 0 marks padding. ``position_ids``: [B, S]; None: counted on, padding included.

        ``cache`` is another name of ``past_key_values``.
        """
        past_key_values = past_key_values if cache is None else cache
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        hidden_BSD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        is_legacy = isinstance(past_key_values, tuple | list)
        cache = _to_cache(past_key_values) if is_legacy else past_key_values
        if use_cache and cache is None:
            cache = DynamicCache()
        (batch, num_new), num_past = hidden_BSD.shape[:2], 0 if cache is None else int(cache.get_seq_length())
        if position_ids is None:
            position_ids = torch.arange(num_past, num_past + num_new, device=hidden_BSD.device).unsqueeze(0)
        rotation = rotation_table(self.config, position_ids, num_past + num_new, hidden_BSD.dtype)
        mask = attention_mask_table(attention_mask, (batch, num_new, num_past), hidden_BSD)
        hidden_states, router_logits, present = [], [], []
        previous_TN = None
        for layer in self.layers:
            hidden_states.append(hidden_BSD)
            attended_BSD, key_value = layer.self_attn(layer.input_layernorm(hidden_BSD), rotation, mask, cache)
            present.append(key_value)
            hidden_BSD = hidden_BSD + attended_BSD
            normed_BSD = layer.post_attention_layernorm(hidden_BSD)
            if layer.is_moe:
                out_BSD, previous_TN = layer.moe(normed_BSD, previous_TN)
                router_logits.append(previous_TN)
            else:
                out_BSD = layer.mlp(normed_BSD)
            hidden_BSD = hidden_BSD + out_BSD
        hidden_BSD = self.norm(hidden_BSD)
        return MoeModelOutputWithPast(
            last_hidden_state=hidden_BSD,
            hidden_states=(*hidden_states, hidden_BSD) if output_hidden_states else None,
            router_logits=tuple(router_logits),
            **{_CACHE: (tuple(present) if is_legacy else cache) if use_cache else None},
        )


class MoeppForCausalLM(MoeppPreTrainedModel, GenerationMixin):
    """The decoder with its output matrix."""

    _auto_class = "AutoModelForCausalLM"
    _tied_weights_keys: ClassVar = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MoeppConfig) -> None:
        super().__init__(config)
        self.model = MoeppModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | tuple | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int = 0,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast | tuple:
        """Logits of the last ``logits_to_keep`` positions (0: of all), and the mean cross-entropy of ``labels``.

        ``labels``: [B, S], equal to ``input_ids`` (they are shifted here), -100 where no loss is wanted. The balance
        loss of pretraining is not added. ``cache`` is another name of ``past_key_values``.
        """
        past = past_key_values if cache is None else cache
        out = self.model(input_ids, attention_mask, position_ids, past, inputs_embeds, use_cache, output_hidden_states)
        hidden_BSD = out.last_hidden_state
        logits_BSV = self.lm_head(hidden_BSD[:, -logits_to_keep:] if logits_to_keep else hidden_BSD)
        loss = None
        if labels is not None:
            if logits_to_keep:
                raise ValueError("labels need the logits of all positions; leave logits_to_keep at 0")
            shifted_T = labels[:, 1:].flatten().to(logits_BSV.device)
            loss = F.cross_entropy(logits_BSV[:, :-1].flatten(0, 1).float(), shifted_T)
        result = MoeCausalLMOutputWithPast(
            loss=loss,
            logits=logits_BSV,
            hidden_states=out.hidden_states,
            router_logits=out.router_logits,
            **{_CACHE: getattr(out, _CACHE)},
        )
        return result.to_tuple() if return_dict is False else result

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: Cache | tuple | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The tokens that the cache does not hold yet; positions count real tokens only."""
        past = past_key_values if cache is None else cache
        if past is None:
            num_past = 0
        elif isinstance(past, tuple | list):
            num_past = past[0][0].shape[2]
        else:
            num_past = int(past.get_seq_length())
        inputs: dict[str, Any] = {_CACHE: past, "use_cache": use_cache}
        inputs["attention_mask"] = attention_mask
        if inputs_embeds is not None and num_past == 0:
            inputs["inputs_embeds"] = inputs_embeds
            num_new = inputs_embeds.shape[1]
        else:
            # With inputs_embeds as the prompt, input_ids hold the new tokens only.
            num_new = 1 if inputs_embeds is not None else input_ids.shape[1] - num_past
            inputs["input_ids"] = input_ids[:, -num_new:].contiguous()
        if attention_mask is not None:
            positions_BP = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
            inputs["position_ids"] = positions_BP[:, -num_new:]
        if "logits_to_keep" in kwargs:
            inputs["logits_to_keep"] = kwargs["logits_to_keep"]
        return inputs


def _to_cache(past: tuple | list) -> DynamicCache:
    """From one (keys, values) per layer, as older code passes them."""
    cache = DynamicCache()
    for layer, (key_BGPd, value_BGPd) in enumerate(past):
        cache.update(key_BGPd, value_BGPd, layer)
    return cache
