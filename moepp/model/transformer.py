"""The decoder: pre-norm, grouped-query attention with RoPE, MoE++ layers or dense SwiGLU (Llama style, no biases).

Letters: B batch, S sequence, s the part of it that this rank holds (all of it on one rank), T = B·s tokens, P positions
including cached ones, D width, V vocabulary, L MoE layers, E experts of every kind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moepp.config import ModelConfig
from moepp.distributed.sequence import SequenceParallel
from moepp.errors import ConfigError
from moepp.model.attention import Attention, AttentionInputs, KVCache, query_runs, rotary_table
from moepp.model.dense_ffn import DenseFFN
from moepp.model.documents import number_documents, positions_in_documents
from moepp.model.linear import Linear
from moepp.model.norm import RMSNorm
from moepp.model.part import LayerElsewhere, ModelPart
from moepp.moe import ExpertParallel, MoELayer, MoEStats
from moepp.moe.router import Router
from moepp.moe.summary import PendingSummary, RoutingRecord, start_summary
from moepp.ops import chunked_cross_entropy, linear

Result = TypeVar("Result")


@dataclass(frozen=True)
class ModelOutput:
    """Result of one forward.

    Attributes:
        hidden: [B, s, D], after the final norm.
        summary: losses and statistics of the MoE layers; their all-reduce may still run, which the first of the
            properties waits for. None: there is no MoE layer.
    """

    hidden: Tensor
    summary: PendingSummary | None

    @property
    def aux_loss(self) -> Tensor:
        """Sum of the MoE layers' auxiliary losses, already weighted; scalar, fp32."""
        return self._finished[0]

    @property
    def stats(self) -> tuple[MoEStats, ...]:
        """One entry per MoE layer, first layer first."""
        return self._finished[1]

    @cached_property
    def _finished(self) -> tuple[Tensor, tuple[MoEStats, ...]]:
        with torch.enable_grad():  # whoever asks first, and where
            aux_loss = torch.zeros((), dtype=torch.float32, device=self.hidden.device)
            if self.summary is None:
                return aux_loss, ()
            losses, stats = self.summary.finish()
            for loss in losses:
                aux_loss = aux_loss + loss
            return aux_loss, tuple(stats)


@dataclass(frozen=True)
class LayersOutput(ModelOutput):
    """Result of :meth:`Transformer.run_layers`: the hidden states are those before the final norm.

    Attributes:
        router_logits: [T, E] fp32, of the last MoE layer so far; None: there was none.
    """

    router_logits: Tensor | None


@dataclass(frozen=True)
class LossOutput:
    """Result of :meth:`Transformer.loss`.

    Attributes:
        ce_sum: cross-entropy in nats, summed over this rank's counted tokens; scalar, fp32.
        num_tokens: this rank's labels that are not -100; scalar, int64.
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
        sequence: SequenceParallel | None = None,
    ) -> None:
        super().__init__()
        self.compiled_attend: Callable[..., tuple[Tensor, Tensor]] | None = None  # see moepp.model.compiled
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.norm_eps)
        self.self_attn = Attention(cfg, layer_index, sequence)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.norm_eps)
        self.is_moe = layer_index in cfg.moe_layers
        if self.is_moe:
            moe_index = cfg.moe_layers.index(layer_index)
            self.moe = MoELayer(cfg.moe, cfg.hidden_size, moe_index, parallel=parallel, sequence=sequence)
        else:
            assert cfg.dense_ffn_hidden_size is not None  # ModelConfig refuses dense layers without a width
            self.mlp = DenseFFN(cfg.hidden_size, cfg.dense_ffn_hidden_size)

    def forward(
        self,
        hidden_BSD: Tensor,
        attention_inputs: AttentionInputs,
        prev_logits_TE: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, RoutingRecord | None]:
        """Return (hidden, router logits for the next MoE layer, what losses and statistics are made of).

        A dense layer hands the previous logits on and has neither loss nor statistics.
        """
        # A cache grows in Python, with every position that is decoded.
        attend = self.compiled_attend if self.compiled_attend and attention_inputs.cache is None else self.attend
        hidden_BSD, normed_BSD = attend(hidden_BSD, attention_inputs)
        if not self.is_moe:
            return hidden_BSD + self.mlp(normed_BSD), prev_logits_TE, None
        out = self.moe(normed_BSD, prev_logits_TE, summarize=False)
        return hidden_BSD + out.hidden, out.router_logits, out.record

    def attend(self, hidden_BSD: Tensor, inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
        """Return the hidden state with attention's output added, and its norm: what the feed-forward part takes."""
        hidden_BSD = hidden_BSD + self.self_attn(self.input_layernorm(hidden_BSD), inputs)
        return hidden_BSD, self.post_attention_layernorm(hidden_BSD)


class Transformer(nn.Module):
    """A decoder-only language model with MoE++ layers.

    Built under ``torch.device("meta")`` it takes no memory; ``to_empty`` and
    :func:`moepp.model.init.init_parameters` make it usable.

    Args:
        cfg: shapes.
        parallel: how the FFN experts are spread over ranks.
        sequence: how ranks share sequences; each is given them whole and holds its own tokens.
        document_end: id of the token that ends a document, if attention stays within documents. None: it does not.
        part: what this rank holds, under the names of the whole model; see :mod:`moepp.model.stage`. None: all.

    Raises:
        ConfigError: the FFN experts or the attention's heads cannot be divided over their ranks.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        parallel: ExpertParallel | None = None,
        sequence: SequenceParallel | None = None,
        document_end: int | None = None,
        part: ModelPart | None = None,
    ) -> None:
        super().__init__()
        self.cfg = cfg
        self.parallel = parallel if parallel is not None else ExpertParallel()
        self.sequence = sequence if sequence is not None else SequenceParallel()
        self.document_end = document_end
        self.part = part if part is not None else ModelPart.whole(cfg.num_layers)
        if self.part.has_embedding:
            self.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        self.layers = nn.ModuleList(
            TransformerLayer(cfg, i, self.parallel, self.sequence) if i in self.part.layers else LayerElsewhere()
            for i in range(cfg.num_layers)
        )
        if self.part.has_head:
            self.norm = RMSNorm(cfg.hidden_size, cfg.norm_eps)
            if not cfg.tie_embeddings:
                self.lm_head = Linear(cfg.hidden_size, cfg.vocab_size)
        self.recompute = False

    def set_recompute(self, enabled: bool) -> None:
        """Store only each layer's input and run its forward again in backward (losses and gradients stay the same)."""
        self.recompute = enabled

    def set_observed(self, enabled: bool) -> None:
        """Look closely at the routers in the calls that follow (:mod:`moepp.moe.observation`)."""
        for layer in self.moe_layers:
            layer.observes = enabled

    @property
    def moe_layers(self) -> tuple[MoELayer, ...]:
        """Those that this rank holds, first layer first."""
        return tuple(layer.moe for layer in self.layers if isinstance(layer, TransformerLayer) and layer.is_moe)

    @property
    def routers(self) -> tuple[Router, ...]:
        """Of the MoE layers that this rank holds, first layer first."""
        return tuple(layer.router for layer in self.moe_layers)

    @property
    def moe_rows(self) -> tuple[int, ...]:
        """Which of the model's MoE layers those are, counted from 0."""
        return tuple(row for row, layer in enumerate(self.cfg.moe_layers) if layer in self.part.layers)

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
            position_ids_BS: [B, S] or [1, S]; None: counted from the start of the cache, padding included, or from the
                start of the document where attention stays within documents.
            attention_mask: [B, P], P = cached + S; 0 or False marks padding. None: none.
            cache: keys and values of earlier positions; the new ones are appended.
            selection_share_LE: [L, E], f_i of every MoE layer's balance loss when it was counted elsewhere.

        Raises:
            ConfigError: an attention mask of another shape, a cache that is full, or sequences that cannot be split.
        """
        hidden_BSD = self.embed(input_ids_BS)
        inputs = self.attention_inputs(input_ids_BS, hidden_BSD.dtype, position_ids_BS, attention_mask, cache)
        out = self.run_layers(range(self.cfg.num_layers), hidden_BSD, inputs, None, selection_share_LE)
        return ModelOutput(self.norm(out.hidden), out.summary)

    def run_layers(
        self,
        layers: Sequence[int],
        hidden_BSD: Tensor,
        inputs: AttentionInputs,
        prev_logits_TE: Tensor | None,
        selection_share_LE: Tensor | None,
    ) -> LayersOutput:
        """Run layers that this rank holds one after the other.

        Args:
            layers: consecutive indices.
            hidden_BSD: [B, s, D], from the layer before or the embedding.
            inputs: of the attention of all layers.
            prev_logits_TE: [T, E] router logits of the last MoE layer before these; None: there is none.
            selection_share_LE: as in :meth:`forward`: of every MoE layer of the model.
        """
        recompute = self.recompute and torch.is_grad_enabled() and inputs.cache is None
        records: list[RoutingRecord] = []
        for index in layers:
            layer = self.layers[index]
            run = partial(_run_recomputed, layer) if recompute else layer
            hidden_BSD, prev_logits_TE, record = run(hidden_BSD, inputs, prev_logits_TE)
            if record is not None:
                records.append(record)
        if selection_share_LE is not None:
            before = sum(index < layers[0] for index in self.cfg.moe_layers)
            selection_share_LE = selection_share_LE[before : before + len(records)]
        return LayersOutput(hidden_BSD, self._start_summary(records, selection_share_LE), prev_logits_TE)

    def _start_summary(self, records: list[RoutingRecord], selection_share_LE: Tensor | None) -> PendingSummary | None:
        """Start the losses and statistics of these layers: one all-reduce, which runs until somebody asks for them."""
        if not records:
            return None
        return start_summary(records, self.cfg.moe, self.training, self.parallel, self.sequence, selection_share_LE)

    def run_as_forward(self, compute: Callable[..., Result], *args: Any) -> Result:
        """Return ``compute(*args)``, which uses the embedding, the last norm or the output layer outside of forward.

        An engine may surround it as it does forward. Tensors with gradients belong among ``args``, where hooks find
        them.
        """
        return compute(*args)

    def embed(self, input_ids_BS: Tensor) -> Tensor:
        """Look up the embeddings of this rank's tokens, [B, s, D], in whole sequences [B, S]."""
        return self.embed_tokens(self.sequence.own(input_ids_BS))

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
        ce_sum, num_tokens = self.cross_entropy(out.hidden, labels_BS)
        return LossOutput(ce_sum, num_tokens, out.aux_loss, out.stats)

    def cross_entropy(self, hidden_BSD: Tensor, labels_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cross-entropy of this rank's tokens, summed in nats, and how many those are; scalars.

        Args:
            hidden_BSD: [B, s, D], after the final norm.
            labels_BS: [B, S], of the whole sequences, as in :meth:`loss`.
        """
        labels_Bs = self.sequence.own(labels_BS)
        return chunked_cross_entropy(hidden_BSD.flatten(0, 1), self.output_weight, labels_Bs.flatten())

    def attention_inputs(
        self,
        input_ids_BS: Tensor,
        dtype: torch.dtype,
        position_ids_BS: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> AttentionInputs:
        """Prepare what all layers' attention needs; arguments as in :meth:`forward`, and the hidden state's dtype."""
        (batch, num_new), device = input_ids_BS.shape, input_ids_BS.device
        num_past = 0 if cache is None else cache.length
        if attention_mask is not None and tuple(attention_mask.shape) != (batch, num_past + num_new):
            raise ConfigError(
                f"attention_mask has shape {list(attention_mask.shape)}, expected {[batch, num_past + num_new]} "
                "(batch, cached + new positions); extend it with the sequence"
            )
        if cache is not None and self.sequence.size > 1:
            raise ConfigError(
                "a KV cache holds whole sequences and all heads; use a model without tensor and context "
                "parallelism for it"
            )
        documents_BP = None
        if self.document_end is not None:
            ids_BP = input_ids_BS if cache is None else cache.append_ids(input_ids_BS)
            documents_BP = number_documents(ids_BP, self.document_end)
        if position_ids_BS is None and documents_BP is not None:
            position_ids_BS = positions_in_documents(documents_BP)[:, num_past:]
        elif position_ids_BS is None:
            position_ids_BS = torch.arange(num_past, num_past + num_new, device=device).unsqueeze(0)
        part_S = None
        if self.sequence.context_size > 1:
            part_S = self.sequence.context_positions(num_new, device=device)
            position_ids_BS = position_ids_BS.index_select(1, part_S)
        cos, sin = rotary_table(position_ids_BS, self.cfg, num_past + num_new, dtype)
        # Ulysses attends with the queries of the whole sequence.
        if part_S is None or self.sequence.method == "ulysses":
            part_S = torch.arange(num_past, num_past + num_new, device=device)
        runs = query_runs(
            part_S,
            num_past + num_new,
            self.sequence,
            head_dim=self.cfg.head_dim,
            dtype=dtype,
            valid_BP=None if attention_mask is None else attention_mask.bool(),
            documents_BP=documents_BP,
            is_cached=cache is not None,
        )
        return AttentionInputs(cos, sin, runs, cache)


def _run_recomputed(layer: nn.Module, *args: Any) -> Any:
    # No random numbers are drawn in a layer. Without early stop every rank runs the whole layer again, so that the
    # collectives inside always find their partners.
    return checkpoint(layer, *args, use_reentrant=False, preserve_rng_state=False, early_stop=False)
