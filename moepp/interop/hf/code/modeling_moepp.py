"""MoE++ language models (arXiv 2410.07348) for Hugging Face transformers 4.46 to 5.x. Needs torch and transformers.

Letters: B batch, S new positions, P keys (cached + new), D width, N experts of every kind, T = B·S tokens,
V vocabulary.
"""

# What the base classes declare differs between versions.
# pyright: reportCallIssue=false, reportArgumentType=false, reportAssignmentType=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from .cache_moepp import find_places, open_cache, to_legacy
from .configuration_moepp import MoeppConfig
from .layers_moepp import (
    MoeppDecoderLayer,
    MoeppExperts,
    MoeppRMSNorm,
    MoeppRouter,
    MoeppZeroComputation,
    rotation_table,
)
from .mask_moepp import attention_mask_table, packed_sequences

# Pipelines know their models, and Trainer's label smoothing the models whose labels it has to shift, by this table.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault(MoeppConfig.model_type, "MoeppForCausalLM")

_logger = logging.get_logger(__name__)

# The cache's name in outputs and arguments: "cache" from transformers 5.24 on.
_CACHE = "cache" if "cache" in MoeModelOutputWithPast.__dataclass_fields__ else "past_key_values"


class MoeppPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation."""

    config_class = MoeppConfig
    base_model_prefix = "model"
    _no_split_modules: ClassVar = ["MoeppDecoderLayer"]
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_cache_class = True
    _supports_static_cache = True
    _supports_quantized_cache = True
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
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        return_dict: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast | tuple:
        """``attention_mask``: [B, P], 0 marks padding, or [B or 1, heads or 1, S, P], True (or 0) where to attend.

        ``position_ids``: [B or 1, S]; None: counted on, padding included. Without a mask and a cache, positions that do
        not count up by one start another sequence in the same row. ``cache`` is another name of ``past_key_values``;
        ``cache_position`` among ``kwargs`` ([S], older code) must follow the cached positions.
        """
        config = self.config
        past = past_key_values if cache is None else cache
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        hidden_BSD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        batch, num_new = hidden_BSD.shape[:2]
        eager = self._is_eager() or _flag(output_attentions, config, "output_attentions")
        use_cache = self._use_cache(use_cache, past)
        cache = open_cache(past, use_cache, config.num_hidden_layers)
        places = find_places(cache, num_new, kwargs.get("cache_position"), hidden_BSD.device)
        sequences_BS = None
        if position_ids is None:
            position_ids = places.positions_S.unsqueeze(0)
        elif attention_mask is None and cache is None:
            sequences_BS = packed_sequences(position_ids, batch)
        rotation = rotation_table(config, position_ids, places.num_past + num_new, hidden_BSD.dtype)
        mask = attention_mask_table(attention_mask, places, sequences_BS, hidden_BSD, config.num_attention_heads)
        hidden_states, attentions, router_logits, previous_TN = [], [], [], None
        for layer in self.layers[: config.num_hidden_layers]:  # assisted decoding with an early exit shortens it
            hidden_states.append(hidden_BSD)
            hidden_BSD, previous_TN, weights_BHSP = layer(
                hidden_BSD, previous_TN, rotation, mask, places, eager, cache=cache
            )
            attentions.append(weights_BHSP)
            if layer.is_moe:
                router_logits.append(previous_TN)
        hidden_BSD = self.norm(hidden_BSD)
        if isinstance(past, tuple | list) and cache is not None:
            cache = to_legacy(cache)
        result = MoeModelOutputWithPast(
            last_hidden_state=hidden_BSD,
            hidden_states=_chosen((*hidden_states, hidden_BSD), output_hidden_states, config, "output_hidden_states"),
            attentions=_chosen(attentions, output_attentions, config, "output_attentions"),
            router_logits=_chosen(router_logits, output_router_logits, config, "output_router_logits"),
            **{_CACHE: cache if use_cache else None},
        )
        return result if _flag(return_dict, config, "return_dict") else result.to_tuple()

    @staticmethod
    def _prepare_4d_causal_attention_mask_with_cache_position(attention_mask: Tensor, **kwargs: Any) -> Tensor:
        """For generation with a static cache in transformers before 4.53; forward makes the mask itself."""
        return attention_mask

    def _is_eager(self) -> bool:
        implementation = getattr(self.config, "_attn_implementation", None)
        if implementation not in (None, "eager", "sdpa"):
            raise ValueError(f"attn_implementation={implementation!r} is not supported; use 'sdpa' or 'eager'")
        return implementation == "eager"

    def _use_cache(self, use_cache: bool | None, past: Any) -> bool:
        """As for Llama, but without being asked for no cache is kept in training."""
        if self.training and torch.is_grad_enabled() and any(layer.gradient_checkpointing for layer in self.layers):
            if past is not None:
                raise ValueError("gradient checkpointing and past_key_values exclude each other; leave one out")
            if use_cache:
                _logger.warning_once("use_cache=True is not compatible with gradient checkpointing; no cache is kept")
            return False
        return self.config.use_cache and not self.training if use_cache is None else use_cache


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

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, *args: Any, **kwargs: Any
    ) -> nn.Embedding:
        """As in transformers; generation may write every id below ``new_num_tokens`` from then on.

        An export suppresses the ids that its tokenizer has no token for, and added tokens take the first of these.
        """
        embeddings = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, *args, **kwargs)
        suppressed = self.generation_config.suppress_tokens
        if new_num_tokens is not None and suppressed:
            kept = [token_id for token_id in suppressed if new_num_tokens <= token_id < self.config.vocab_size]
            self.generation_config.suppress_tokens = kept or None
        return embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | tuple | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_logits_to_keep: int = 0,
        cache: Cache | None = None,
        **loss_kwargs: Any,  # the name that Trainer of transformers 4.46 looks for
    ) -> MoeCausalLMOutputWithPast | tuple:
        """Return the logits of the last ``logits_to_keep`` positions (0: of all), and the loss.

        ``logits_to_keep`` may list positions for all rows ([n]) or for each ([B, n], or boolean [B, S], whose logits
        come as one list).

        ``labels``: [B, S], equal to ``input_ids`` (they are shifted here), -100 where no loss is wanted. The loss is
        their mean cross-entropy; with ``num_items_in_batch=n`` among ``loss_kwargs`` their sum over n, as Trainer wants
        it to accumulate gradients. The balance loss of pretraining is not added. ``cache`` is another name of
        ``past_key_values``, ``num_logits_to_keep`` of ``logits_to_keep``. The rest as for :class:`MoeppModel`.
        """
        kept = num_logits_to_keep or logits_to_keep
        if labels is not None and (isinstance(kept, Tensor) or kept):
            raise ValueError("labels need the logits of all positions; leave logits_to_keep at 0")
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            output_router_logits=output_router_logits,
            return_dict=True,
            cache=cache,
            cache_position=loss_kwargs.pop("cache_position", None),
        )
        hidden_BSD = out.last_hidden_state
        logits_BSV = self.lm_head(_keep(hidden_BSD, kept))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits_BSV, labels=labels, vocab_size=logits_BSV.shape[-1], **loss_kwargs)
        result = MoeCausalLMOutputWithPast(
            loss=loss,
            logits=logits_BSV,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
            router_logits=out.router_logits,
            **{_CACHE: getattr(out, _CACHE)},
        )
        return result if _flag(return_dict, self.config, "return_dict") else result.to_tuple()

    def get_compiled_call(self, compile_config: Any) -> Any:
        """Leave generation with a static cache uncompiled unless asked.

        Which tokens an expert gets is known at run time only, so there is no one graph to compile; versions before
        4.53 would try without being asked.
        """
        return self.__call__ if compile_config is None else super().get_compiled_call(compile_config)


def _flag(given: bool | None, config: MoeppConfig, name: str) -> bool:
    """Return the argument, or the configuration's value."""
    return bool(getattr(config, name, False) if given is None else given)


def _keep(hidden_BSD: Tensor, kept: int | Tensor) -> Tensor:
    if isinstance(kept, int):
        return hidden_BSD[:, -kept:] if kept else hidden_BSD
    kept = kept.to(hidden_BSD.device)
    if kept.dim() != 2:
        return hidden_BSD[:, kept]
    return hidden_BSD[kept] if kept.dtype == torch.bool else hidden_BSD.take_along_dim(kept[..., None], dim=1)


def _chosen(values: Sequence[Tensor], given: bool | None, config: MoeppConfig, name: str) -> tuple | None:
    return tuple(values) if _flag(given, config, name) else None
