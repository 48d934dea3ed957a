"""The decoder: pre-norm, grouped-query attention with RoPE, MoE++ layers or dense SwiGLU (Llama style, no biases).

Letters: B batch, S sequence, T = B·S tokens, P positions including cached ones, D width, V vocabulary, L MoE layers,
E experts of every kind.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moepp.config import ModelConfig
from moepp.errors import ConfigError
from moepp.model.attention import Attention, AttentionInputs, KVCache, build_attention_mask, rotary_table
from moepp.model.dense_ffn import DenseFFN
from moepp.model.linear import Linear
from moepp.model.norm import RMSNorm
from moepp.moe import ExpertParallel, MoELayer, MoEStats
from moepp.moe.router import Router
from moepp.ops import chunked_cross_entropy, linear


@dataclass(frozen=True)
class ModelOutput:
    """Result of one forward.

    Attributes:
        hidden: [B, S, D], after the final norm.
        aux_loss: sum of the MoE layers' auxiliary losses, already weighted; scalar, fp32.
        stats: one entry per MoE layer, first layer first.
    """

    hidden: Tensor
    aux_loss: Tensor
    stats: tuple[MoEStats, ...]


@dataclass(frozen=True)
class LossOutput:
    """Result of :meth:`Transformer.loss`.

    Attributes:
        ce_sum: cross-entropy in nats, summed over the counted tokens; scalar, fp32.
        num_tokens: labels that are not -100; scalar, int64.
        aux_loss, stats: as in :class:`ModelOutput`.
    """

    ce_sum: Tensor
    num_tokens: Tensor
    aux_loss: Tensor
    stats: tuple[MoEStats, ...]


class TransformerLayer(nn.Module):
    """``h += attention(norm(h)); h += moe_or_mlp(norm(h))``."""

    def __init__(
        self,
        cfg: ModelConfig,
        layer_index: int,
        parallel: ExpertParallel | None = None,
    ) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.norm_eps)
        self.self_attn = Attention(cfg, layer_index)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.norm_eps)
        self.is_moe = layer_index in cfg.moe_layers
        if self.is_moe:
            moe_index = cfg.moe_layers.index(layer_index)
            self.moe = MoELayer(cfg.moe, cfg.hidden_size, moe_index, parallel=parallel)
        else:
            assert cfg.dense_ffn_hidden_size is not None  # ModelConfig refuses dense layers without a width
            self.mlp = DenseFFN(cfg.hidden_size, cfg.dense_ffn_hidden_size)

    def forward(
        self,
        hidden_BSD: Tensor,
        attention_inputs: AttentionInputs,
        prev_logits_TE: Tensor | None,
        selection_share_E: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, MoEStats | None]:
        """Return (hidden, router logits for the next MoE layer, aux loss, statistics).

        A dense layer hands the previous logits on and has neither loss nor statistics.
        """
        hidden_BSD = hidden_BSD + self.self_attn(self.input_layernorm(hidden_BSD), attention_inputs)
        normed_BSD = self.post_attention_layernorm(hidden_BSD)
        if not self.is_moe:
            return hidden_BSD + self.mlp(normed_BSD), prev_logits_TE, None, None
        out = self.moe(normed_BSD, prev_logits_TE, selection_share_E)
        return hidden_BSD + out.hidden, out.router_logits, out.aux_loss, out.stats


class Transformer(nn.Module):
    """A decoder-only language model with MoE++ layers.

    Built under ``torch.device("meta")`` it takes no memory; ``to_empty`` and
    :func:`moepp.model.init.init_parameters` make it usable.

    Args:
        cfg: shapes.
        parallel: how the FFN experts are spread over ranks.

    Raises:
        ConfigError: the FFN experts cannot be divided over its group.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        parallel: ExpertParallel | None = None,
    ) -> None:
        super().__init__()
        self.cfg = cfg
        self.parallel = parallel if parallel is not None else ExpertParallel()
        self.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        self.layers = nn.ModuleList(TransformerLayer(cfg, i, self.parallel) for i in range(cfg.num_layers))
        self.norm = RMSNorm(cfg.hidden_size, cfg.norm_eps)
        if not cfg.tie_embeddings:
            self.lm_head = Linear(cfg.hidden_size, cfg.vocab_size)
        self.recompute = False

    def set_recompute(self, enabled: bool) -> None:
        """Store only each layer's input and run its forward again in backward (losses and gradients stay the same)."""
        self.recompute = enabled

    @property
    def routers(self) -> tuple[Router, ...]:
        """Of the MoE layers, first layer first."""
        return tuple(layer.moe.router for layer in self.layers if isinstance(layer, TransformerLayer) and layer.is_moe)

    @property
    def output_weight(self) -> Tensor:
        """[V, D]: ``lm_head``, or the embedding where they are tied."""
        return self.embed_tokens.weight if self.cfg.tie_embeddings else self.lm_head.weight

    def forward(
        self,
        input_ids_BS: Tensor,
        position_ids_BS: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: KVCache | None = None,
        selection_share_LE: Tensor | None = None,
    ) -> ModelOutput:
        """Run the decoder up to the final norm; :meth:`logits` turns the result into logits.

        Args:
            input_ids_BS: [B, S] int64; the new tokens only where a cache is given.
            position_ids_BS: [B, S] or [1, S]; None: counted from the start of the cache, padding included.
            attention_mask: [B, P], P = cached + S; 0 or False marks padding. None: none.
            cache: keys and values of earlier positions; the new ones are appended.
            selection_share_LE: [L, E], f_i of every MoE layer's balance loss when it was counted elsewhere.

        Raises:
            ConfigError: an attention mask of another shape, or a cache that is full.
        """
        hidden_BSD = self.embed_tokens(input_ids_BS)
        inputs = self._attention_inputs(input_ids_BS, position_ids_BS, attention_mask, cache, hidden_BSD.dtype)
        recompute = self.recompute and torch.is_grad_enabled() and cache is None
        aux_loss = torch.zeros((), dtype=torch.float32, device=hidden_BSD.device)
        prev_logits_TE: Tensor | None = None
        stats: list[MoEStats] = []
        for layer in self.layers:
            share_E = selection_share_LE[len(stats)] if layer.is_moe and selection_share_LE is not None else None
            run = partial(_run_recomputed, layer) if recompute else layer
            hidden_BSD, prev_logits_TE, layer_loss, layer_stats = run(hidden_BSD, inputs, prev_logits_TE, share_E)
            if layer_stats is not None:
                aux_loss = aux_loss + layer_loss
                stats.append(layer_stats)
        return ModelOutput(self.norm(hidden_BSD), aux_loss, tuple(stats))

    def logits(self, hidden_BSD: Tensor) -> Tensor:
        """[B, S, D] after the final norm -> [B, S, V], in the dtype of the model."""
        return linear(hidden_BSD, self.output_weight)

    def loss(self, input_ids_BS: Tensor, labels_BS: Tensor, selection_share_LE: Tensor | None = None) -> LossOutput:
        """Forward and cross-entropy in chunks; logits of all tokens are never held.

        Args:
            input_ids_BS: [B, S] int64.
            labels_BS: [B, S] int64; ``labels[b, s]`` is the token that follows ``input_ids[b, s]`` (already shifted),
                or -100 where no loss is wanted.
            selection_share_LE: as in :meth:`forward`.
        """
        out = self(input_ids_BS, selection_share_LE=selection_share_LE)
        ce_sum, num_tokens = chunked_cross_entropy(out.hidden.flatten(0, 1), self.output_weight, labels_BS.flatten())
        return LossOutput(ce_sum, num_tokens, out.aux_loss, out.stats)

    def _attention_inputs(
        self,
        input_ids_BS: Tensor,
        position_ids_BS: Tensor | None,
        padding_mask_BP: Tensor | None,
        cache: KVCache | None,
        dtype: torch.dtype,
    ) -> AttentionInputs:
        (batch, num_new), device = input_ids_BS.shape, input_ids_BS.device
        num_past = 0 if cache is None else cache.length
        if padding_mask_BP is not None and tuple(padding_mask_BP.shape) != (batch, num_past + num_new):
            raise ConfigError(
                f"attention_mask has shape {list(padding_mask_BP.shape)}, expected {[batch, num_past + num_new]} "
                "(batch, cached + new positions); extend it with the sequence"
            )
        if position_ids_BS is None:
            position_ids_BS = torch.arange(num_past, num_past + num_new, device=device).unsqueeze(0)
        cos, sin = rotary_table(position_ids_BS, self.cfg, num_past + num_new, dtype)
        valid_BP = None if padding_mask_BP is None else padding_mask_BP.bool()
        mask = build_attention_mask(valid_BP, num_new, num_past, dtype, device)
        return AttentionInputs(cos, sin, mask, cache)


def _run_recomputed(layer: nn.Module, *args: Any) -> Any:
    # No random numbers are drawn in a layer. Without early stop every rank runs the whole layer again, so that the
    # collectives inside always find their partners.
    return checkpoint(layer, *args, use_reentrant=False, preserve_rng_state=False, early_stop=False)
