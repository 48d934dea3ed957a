"""The released model's forward pass, operation by operation.

:class:`moepp.model.Transformer` computes the same function and is what trains; it differs in the last bits, because it
fuses, reorders, and keeps more in fp32. Here every product is rounded where the released code rounds it, so that
routing decisions are the same and bf16 too can be compared.

Letters: B batch, S new positions, P positions seen, T = B·S tokens, D width, H query heads, G key/value heads, d head
size, N experts of every kind (FFN, constant, copy, zero), K = 2 experts per token, R rows of one expert, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moepp.config import ModelConfig
from moepp.errors import ConfigError
from moepp.interop.token_ids import TokenIds
from moepp.model import KVCache, ModelOutput, Transformer, generate
from moepp.model.attention import Attention, rotary_table
from moepp.model.norm import RMSNorm
from moepp.model.transformer import TransformerLayer
from moepp.moe import MoELayer
from moepp.moe.router import LinearRouter, MLPRouter


@dataclass(frozen=True)
class LayerRouting:
    """What one layer's router did, in fp32; see :class:`OfficialOutput`."""

    logits_TN: Tensor
    topk_ids_TK: Tensor
    topk_weights_TK: Tensor


@dataclass(frozen=True)
class ReleasedOutput(ModelOutput):
    """As :class:`moepp.model.ModelOutput`, with what happened inside."""

    hidden_states: tuple[Tensor, ...]
    routing: tuple[LayerRouting, ...]


@dataclass(frozen=True)
class OfficialOutput:
    """Result of :class:`OfficialModel`.

    Attributes:
        logits: [B, S, V] fp32.
        hidden_states: [B, S, D] before each layer, and after the final norm.
        router_logits: [T, N] fp32 per layer: with the gating residual, before any normalisation.
        topk_ids: [T, 2] int64 per layer, the chosen experts in ascending order.
        topk_weights: [T, 2] fp32 per layer, in the order of topk_ids.
    """

    logits: Tensor
    hidden_states: tuple[Tensor, ...]
    router_logits: tuple[Tensor, ...]
    topk_ids: tuple[Tensor, ...]
    topk_weights: tuple[Tensor, ...]


class ReleasedTransformer(Transformer):
    """A :class:`Transformer` whose forward rounds like the released code. For inference on one process."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__(cfg)
        self.longest = 0  # positions seen in one call so far: the released "dynamic" RoPE never goes back

    def forward(
        self,
        input_ids_BS: Tensor,
        position_ids_BS: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: KVCache | None = None,
        selection_share_LE: Tensor | None = None,
    ) -> ReleasedOutput:
        """Arguments as in :meth:`Transformer.forward`."""
        hidden_BSD = self.embed_tokens(input_ids_BS)
        num_new = input_ids_BS.shape[1]
        num_positions = num_new + (0 if cache is None else cache.length)
        self.longest = max(self.longest, num_positions)
        if position_ids_BS is None:
            position_ids_BS = torch.arange(num_positions - num_new, num_positions, device=input_ids_BS.device)[None]
        cos, sin = rotary_table(position_ids_BS, self.cfg, self.longest, hidden_BSD.dtype)
        rotation = torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1)
        mask = _attention_mask(attention_mask, num_new, num_positions, hidden_BSD)
        hidden_states, routing = [], []
        prev_TN: Tensor | None = None
        for module in self.layers:
            layer = _checked(module)
            hidden_states.append(hidden_BSD)
            normed_BSD = _rms_norm(hidden_BSD, layer.input_layernorm)
            hidden_BSD = hidden_BSD + _attention(layer.self_attn, normed_BSD, rotation, mask, cache)
            normed_TD = _rms_norm(hidden_BSD, layer.post_attention_layernorm).flatten(0, 1)
            routing.append(_route(layer.moe, normed_TD, prev_TN))
            prev_TN = routing[-1].logits_TN
            hidden_BSD = hidden_BSD + _experts(layer.moe, normed_TD, routing[-1]).view_as(hidden_BSD)
        hidden_BSD = _rms_norm(hidden_BSD, self.norm)
        return ReleasedOutput(hidden_BSD, None, (*hidden_states, hidden_BSD), tuple(routing))


class OfficialModel(nn.Module):
    """A released MoE++ model with the interface of its Hugging Face code.

    Attributes:
        cfg: shapes and flags.
        token_ids: begin, end and padding of texts.
        transformer: the decoder with its weights.
    """

    def __init__(self, cfg: ModelConfig, token_ids: TokenIds) -> None:
        super().__init__()
        self.cfg = cfg
        self.token_ids = token_ids
        self.transformer = ReleasedTransformer(cfg)

    def forward(
        self, input_ids_BS: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> OfficialOutput:
        """Return logits of every position.

        Args:
            input_ids_BS: [B, S] int64.
            attention_mask: [B, S], 0 marks padding, on any side. None: no padding.
            position_ids: [B, S] or [1, S]. None: 0 to S - 1, padding counted.

        Raises:
            ConfigError: an attention mask of another shape.
        """
        out = self.transformer(input_ids_BS, position_ids, attention_mask)
        return OfficialOutput(
            self.transformer.logits(out.hidden).float(),
            out.hidden_states,
            tuple(r.logits_TN for r in out.routing),
            tuple(r.topk_ids_TK for r in out.routing),
            tuple(r.topk_weights_TK for r in out.routing),
        )

    def generate(
        self, input_ids: Tensor, max_new_tokens: int, attention_mask: Tensor | None = None, **options: Any
    ) -> Tensor:
        """Continue prompts, greedily by default, with a key/value cache; [B, S] -> [B, S + at most max_new_tokens].

        As in the released code a sequence ends with ``token_ids.eos`` and is filled with ``token_ids.pad`` (or, where
        there is none, with eos); positions count real tokens only; and without an attention mask the padding token
        marks padding, unless it is the end token too.

        Args:
            options: of :func:`moepp.model.generate`, for example ``temperature``; ``eos_id=None`` never ends early.
        """
        ids = self.token_ids
        if attention_mask is None and ids.pad is not None and ids.pad != ids.eos and (input_ids == ids.pad).any():
            attention_mask = (input_ids != ids.pad).long()
        options = {"eos_id": ids.eos, "pad_id": ids.pad} | options
        return generate(self.transformer, input_ids, max_new_tokens, attention_mask=attention_mask, **options)


def _checked(module: nn.Module) -> TransformerLayer:
    assert isinstance(module, TransformerLayer) and module.is_moe  # the released format has no dense layers
    return module


def _rms_norm(x_D: Tensor, norm: RMSNorm) -> Tensor:
    wide_D = x_D.float()
    wide_D = wide_D * torch.rsqrt(wide_D.pow(2).mean(-1, keepdim=True) + norm.eps)
    return norm.weight * wide_D.to(x_D.dtype)


def _attention_mask(mask_BP: Tensor | None, num_new: int, num_positions: int, like: Tensor) -> Tensor:
    """[1 or B, 1, S, P]: lowest number in the future, plus lowest number on padding."""
    lowest = torch.finfo(like.dtype).min
    total = torch.full((num_new, num_positions), lowest, dtype=like.dtype, device=like.device)
    total = total.triu(num_positions - num_new + 1)[None, None]
    if mask_BP is None:
        return total
    expected = (like.shape[0], num_positions)
    if tuple(mask_BP.shape) != expected:
        raise ConfigError(
            f"attention_mask has shape {list(mask_BP.shape)}, expected {list(expected)} (batch, positions); correct it"
        )
    padding_BP = torch.zeros(mask_BP.shape, dtype=like.dtype, device=like.device)
    return total + padding_BP.masked_fill(~mask_BP.bool(), lowest)[:, None, None, :]


def _rotate(x_BHSd: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    first, second = x_BHSd.chunk(2, dim=-1)
    return x_BHSd * rotation[0] + torch.cat((-second, first), dim=-1) * rotation[1]


def _attention(
    attention: Attention,
    x_BSD: Tensor,
    rotation: tuple[Tensor, Tensor],
    mask: Tensor,
    cache: KVCache | None,
) -> Tensor:
    def heads(projection: nn.Linear) -> Tensor:
        return projection(x_BSD).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)

    query_BHSd = _rotate(heads(attention.q_proj), rotation)
    key_BGPd, value_BGPd = _rotate(heads(attention.k_proj), rotation), heads(attention.v_proj)
    if cache is not None:
        key_BGPd, value_BGPd = cache.append(attention.layer_index, key_BGPd, value_BGPd)
    group = query_BHSd.shape[1] // key_BGPd.shape[1]
    key_BHPd, value_BHPd = key_BGPd.repeat_interleave(group, dim=1), value_BGPd.repeat_interleave(group, dim=1)
    scores_BHSP = torch.matmul(query_BHSd, key_BHPd.transpose(2, 3)) / math.sqrt(attention.head_dim) + mask
    weights_BHSP = torch.softmax(scores_BHSP, dim=-1, dtype=torch.float32).to(x_BSD.dtype)
    out_BHSd = torch.matmul(weights_BHSP, value_BHPd)
    return attention.o_proj(out_BHSd.transpose(1, 2).reshape(x_BSD.shape))


def _route(moe: MoELayer, x_TD: Tensor, prev_TN: Tensor | None) -> LayerRouting:
    """Router weights act in fp32; the gating residual in its own dtype, its result added in fp32."""
    cfg, router, x_TD = moe.cfg, moe.router, x_TD.float()
    if isinstance(router, LinearRouter):
        logits_TN = F.linear(x_TD, router.weight.float())
    else:
        assert isinstance(router, MLPRouter)
        logits_TN = F.linear(torch.tanh(F.linear(x_TD, router.fc1.weight.float())), router.fc2.weight.float())
    if prev_TN is not None:
        assert router.gate_map is not None
        logits_TN = logits_TN + router.gate_map(prev_TN.to(router.gate_map.weight.dtype))
    z_TN = logits_TN
    if cfg.logits_norm_std is not None:
        z_TN = z_TN / (z_TN.std(dim=-1, keepdim=True) / cfg.logits_norm_std)
    if cfg.gate_normalization == "topk_softmax":
        z_TK, ids_TK = torch.topk(z_TN, cfg.top_k, dim=-1)
        weights_TK = torch.softmax(z_TK, dim=-1)
    else:
        weights_TK, ids_TK = torch.topk(torch.softmax(z_TN, dim=-1), cfg.top_k, dim=-1)
        weights_TK = weights_TK.masked_fill(ids_TK == cfg.num_experts - 1, 0.0)
        # With a zero expert and a partner whose probability underflows the released code gives NaN; here nothing.
        total_T1 = weights_TK.sum(dim=-1, keepdim=True)
        weights_TK = weights_TK / torch.where(total_T1 > 0, total_T1, 1.0)
    ids_TK, order_TK = ids_TK.sort(dim=-1)
    return LayerRouting(logits_TN, ids_TK, weights_TK.gather(-1, order_TK))


def _experts(moe: MoELayer, x_TD: Tensor, routing: LayerRouting) -> Tensor:
    """Weighted outputs added by ascending expert, each rounded to the dtype of ``x_TD`` once."""
    cfg = moe.cfg
    if cfg.scale_input_by_top_k:
        x_TD = x_TD * cfg.top_k
    out_TD = torch.zeros_like(x_TD)
    for expert in range(cfg.num_experts - 1):  # the last is the zero expert
        tokens_R, choices_R = torch.where(routing.topk_ids_TK == expert)
        if tokens_R.numel() == 0:
            continue
        rows_RD = _expert(moe, expert, x_TD[tokens_R])
        weighted_RD = (routing.topk_weights_TK[tokens_R, choices_R, None] * rows_RD).to(x_TD.dtype)
        out_TD.index_add_(0, tokens_R, weighted_RD)
    return out_TD


def _expert(moe: MoELayer, expert: int, x_RD: Tensor) -> Tensor:
    slices = moe.cfg.kind_slices
    if expert < slices["ffn"].stop:
        gate, up = F.linear(x_RD, moe.experts.gate_up_proj[expert]).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, moe.experts.down_proj[expert])
    if expert < slices["constant"].stop:
        constant = expert - slices["constant"].start
        alpha_R2 = torch.softmax(F.linear(x_RD, moe.zero_computation.alpha_proj[constant]), dim=-1)
        return alpha_R2[:, :1] * x_RD + alpha_R2[:, 1:] * moe.zero_computation.value[constant]
    return x_RD
