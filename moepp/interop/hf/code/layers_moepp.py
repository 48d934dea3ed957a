"""The layers of MoE++ language models (arXiv 2410.07348); plain torch.

Letters: B batch, S new positions, P keys (cached + new; with a static cache all its places), T = B·S tokens, D width,
H query heads, G key/value heads, d head size, F FFN width, E FFN experts, C constant experts, Z zero-computation
experts, N experts of every kind (order FFN, constant, copy, zero), K experts per token, R rows of one expert,
V vocabulary.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache

from .cache_moepp import Places
from .configuration_moepp import MoeppConfig

try:
    from transformers.modeling_layers import GradientCheckpointingLayer  # pyright: ignore[reportAssignmentType]
except ImportError:  # before transformers 4.52

    class GradientCheckpointingLayer(nn.Module):
        """Computes its forward anew in the backward pass while ``gradient_checkpointing`` is set."""

        gradient_checkpointing = False
        _gradient_checkpointing_func: Any = None

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            if self.gradient_checkpointing and self.training:
                return self._gradient_checkpointing_func(partial(super().__call__, **kwargs), *args)
            return super().__call__(*args, **kwargs)


class MoeppRMSNorm(nn.Module):
    """``weight * (x / sqrt(mean(x^2) + eps))``: the quotient in fp32, then rounded to the dtype of ``x``."""

    def __init__(self, config: MoeppConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.eps = config.rms_norm_eps

    def forward(self, x_D: Tensor) -> Tensor:
        return self.weight * F.rms_norm(x_D.float(), x_D.shape[-1:], eps=self.eps).to(x_D.dtype)


class MoeppAttention(nn.Module):
    """Causal self-attention with rotary embeddings; query head j reads key/value head ``j // (H / G)``."""

    def __init__(self, config: MoeppConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        kv_size = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self,
        x_BSD: Tensor,
        rotation: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: Cache | None,
        places: Places,
        eager: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output, and if ``eager`` the attention weights, [B, H, S, P]."""
        query_BHSd = _rotate(self._heads(self.q_proj(x_BSD)), rotation)
        key_BGPd = _rotate(self._heads(self.k_proj(x_BSD)), rotation)
        value_BGPd = self._heads(self.v_proj(x_BSD))
        if cache is not None:
            # Static caches before transformers 5.1 store where cache_position says; others do not read it.
            where = {"cache_position": places.positions_S.to(x_BSD.device)}
            key_BGPd, value_BGPd = cache.update(key_BGPd, value_BGPd, self.layer_idx, where)
        if key_BGPd.shape[2] != places.num_keys:
            raise ValueError(
                f"the {type(cache).__name__} returned {key_BGPd.shape[2]} keys, expected {places.num_keys}; "
                "use a DynamicCache"
            )
        group = query_BHSd.shape[1] // key_BGPd.shape[1]
        key_BHPd, value_BHPd = key_BGPd.repeat_interleave(group, dim=1), value_BGPd.repeat_interleave(group, dim=1)
        if eager:
            out_BHSd, weights_BHSP = _attend_eagerly(query_BHSd, key_BHPd, value_BHPd, mask)
        else:
            weights_BHSP, is_causal = None, mask is None and x_BSD.shape[1] > 1
            out_BHSd = F.scaled_dot_product_attention(query_BHSd, key_BHPd, value_BHPd, mask, is_causal=is_causal)
        return self.o_proj(out_BHSd.transpose(1, 2).reshape(x_BSD.shape)), weights_BHSP

    def _heads(self, x_BSD: Tensor) -> Tensor:
        return x_BSD.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class MoeppDenseFFN(nn.Module):
    """SwiGLU of the layers between MoE layers."""

    def __init__(self, config: MoeppConfig) -> None:
        super().__init__()
        assert config.dense_ffn_hidden_size is not None
        self.gate_proj = nn.Linear(config.hidden_size, config.dense_ffn_hidden_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.dense_ffn_hidden_size, bias=False)
        self.down_proj = nn.Linear(config.dense_ffn_hidden_size, config.hidden_size, bias=False)

    def forward(self, x_D: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_D)) * self.up_proj(x_D))


class MoeppLinearFp32(nn.Linear):
    """``W x`` in fp32 whatever the weights are stored in; a module, so that adapters and offloading reach it."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        with torch.autocast(x_TD.device.type, enabled=False):
            return _linear_fp32(x_TD, self.weight)


class MoeppRouter(nn.Module):
    """Logits with gating residual, in fp32: ``R(x) + W_g · previous logits``."""

    def __init__(self, config: MoeppConfig) -> None:
        super().__init__()
        n = config.num_experts
        if config.router == "linear":
            self.weight = nn.Parameter(torch.empty(n, config.hidden_size))
        else:
            self.fc1 = MoeppLinearFp32(config.hidden_size, 8 * n)
            self.fc2 = MoeppLinearFp32(8 * n, n)
        self.gate_map = MoeppLinearFp32(n, n) if config.gating_residual else None
        self.is_linear = config.router == "linear"

    def forward(self, x_TD: Tensor, previous_TN: Tensor | None) -> Tensor:
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TN = _linear_fp32(x_TD, self.weight) if self.is_linear else self.fc2(torch.tanh(self.fc1(x_TD)))
            if self.gate_map is not None and (previous_TN is not None or torch.is_grad_enabled()):
                # The first layer maps zeros: DistributedDataParallel wants a gradient for every parameter.
                previous_TN = torch.zeros_like(logits_TN) if previous_TN is None else previous_TN
                logits_TN = logits_TN + self.gate_map(previous_TN)
        return logits_TN


class MoeppExperts(nn.Module):
    """FFN experts, stacked: rows 0..F-1 of ``gate_up_proj`` are the gate, the others the linear half."""

    def __init__(self, config: MoeppConfig) -> None:
        super().__init__()
        experts, ffn, width = config.num_ffn_experts, config.ffn_hidden_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * ffn, width))
        self.down_proj = nn.Parameter(torch.empty(experts, width, ffn))

    def forward(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        out_TD = torch.zeros_like(x_TD)
        gate_up_proj, down_proj = self.gate_up_proj, self.down_proj  # read once: adapters compute them when read
        for expert in range(gate_up_proj.shape[0]):
            tokens_R, choices_R = torch.where(ids_TK == expert)
            gate_RF, up_RF = F.linear(x_TD[tokens_R], gate_up_proj[expert]).chunk(2, dim=-1)
            rows_RD = F.linear(F.silu(gate_RF) * up_RF, down_proj[expert])
            weighted_RD = (rows_RD * weights_TK[tokens_R, choices_R, None]).to(x_TD.dtype)
            out_TD = out_TD.index_add(0, tokens_R, weighted_RD)
        return out_TD


class MoeppZeroComputation(nn.Module):
    """Constant ``a x + b v`` with [a, b] = softmax(W x), copy ``x`` and zero experts as one expression."""

    def __init__(self, config: MoeppConfig) -> None:
        super().__init__()
        self.num_constant, self.num_copy = config.num_constant_experts, config.num_copy_experts
        if self.num_constant:
            self.alpha_proj = nn.Parameter(torch.empty(self.num_constant, 2, config.hidden_size))
            self.value = nn.Parameter(torch.empty(self.num_constant, config.hidden_size))

    def forward(self, x_TD: Tensor, gates_TZ: Tensor) -> Tensor:
        """``gates_TZ``: weight of every zero-computation expert, 0 where it was not chosen."""
        scale_T1 = gates_TZ[:, self.num_constant : self.num_constant + self.num_copy].sum(dim=-1, keepdim=True)
        if not self.num_constant:
            return x_TD * scale_T1.to(x_TD.dtype)
        gates_TC = gates_TZ[:, : self.num_constant]
        alpha_TC2 = F.linear(x_TD, self.alpha_proj.flatten(0, 1)).unflatten(-1, (-1, 2)).float().softmax(dim=-1)
        scale_T1 = scale_T1 + (gates_TC * alpha_TC2[..., 0]).sum(dim=-1, keepdim=True)
        value_weights_TC = (gates_TC * alpha_TC2[..., 1]).to(x_TD.dtype)
        return x_TD * scale_T1.to(x_TD.dtype) + value_weights_TC @ self.value


class MoeppSparseFFN(nn.Module):
    """One MoE++ layer; dropless, so that a token's output does not depend on the other tokens."""

    def __init__(self, config: MoeppConfig) -> None:
        super().__init__()
        self.config = config
        self.router = MoeppRouter(config)
        self.zero_computation = MoeppZeroComputation(config)
        self.experts = MoeppExperts(config)

    def forward(self, x_BSD: Tensor, previous_TN: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the output and the router logits."""
        x_TD = x_BSD.flatten(0, 1)
        logits_TN = self.router(x_TD, previous_TN)
        ids_TK, weights_TK = self.gates(logits_TN)
        if self.config.scale_input_by_top_k:
            x_TD = x_TD * self.config.num_experts_per_tok
        gates_TN = torch.zeros_like(logits_TN).scatter(1, ids_TK, weights_TK)
        out_TD = self.experts(x_TD, ids_TK, weights_TK)
        out_TD = out_TD + self.zero_computation(x_TD, gates_TN[:, self.config.num_ffn_experts :])
        return out_TD.view_as(x_BSD), logits_TN

    def gates(self, logits_TN: Tensor) -> tuple[Tensor, Tensor]:
        """Return the chosen experts and their weights, both [T, K]."""
        config = self.config
        if config.logits_norm_std is not None:
            logits_TN = logits_TN / (logits_TN.std(dim=-1, keepdim=True) / config.logits_norm_std)
        if config.gate_normalization == "topk_softmax":
            chosen_TK, ids_TK = torch.topk(logits_TN, config.num_experts_per_tok, dim=-1)
            return ids_TK, torch.softmax(chosen_TK, dim=-1)
        weights_TK, ids_TK = torch.topk(torch.softmax(logits_TN, dim=-1), config.num_experts_per_tok, dim=-1)
        if config.gate_normalization == "zero_masked":
            first_zero = config.num_experts - config.num_zero_experts
            weights_TK = weights_TK.masked_fill(ids_TK >= first_zero, 0.0)
            total_T1 = weights_TK.sum(dim=-1, keepdim=True)
            # A token that chose zero experts alone keeps weights of 0.
            weights_TK = weights_TK / torch.where(total_T1 > 0, total_T1, 1.0)
        return ids_TK, weights_TK


class MoeppDecoderLayer(GradientCheckpointingLayer):
    """``h += attention(norm(h)); h += moe_or_mlp(norm(h))``."""

    def __init__(self, config: MoeppConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = MoeppRMSNorm(config)
        self.self_attn = MoeppAttention(config, layer_idx)
        self.post_attention_layernorm = MoeppRMSNorm(config)
        self.is_moe = (layer_idx + 1) % config.moe_layer_interval == 0
        if self.is_moe:
            self.moe = MoeppSparseFFN(config)
        else:
            self.mlp = MoeppDenseFFN(config)

    def forward(
        self,
        x_BSD: Tensor,
        previous_TN: Tensor | None,
        rotation: tuple[Tensor, Tensor],
        mask: Tensor | None,
        places: Places,
        eager: bool,
        cache: Cache | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return the output, the router logits of the last MoE layer, and if ``eager`` the attention weights."""
        attended_BSD, weights_BHSP = self.self_attn(self.input_layernorm(x_BSD), rotation, mask, cache, places, eager)
        x_BSD = x_BSD + attended_BSD
        normed_BSD = self.post_attention_layernorm(x_BSD)
        if self.is_moe:
            out_BSD, previous_TN = self.moe(normed_BSD, previous_TN)
        else:
            out_BSD = self.mlp(normed_BSD)
        return x_BSD + out_BSD, previous_TN, weights_BHSP


def _attend_eagerly(
    query_BHSd: Tensor, key_BHPd: Tensor, value_BHPd: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return attention's output and weights; without a mask all positions are new, or one sees all."""
    scores_BHSP = query_BHSd @ key_BHPd.transpose(2, 3) / query_BHSd.shape[-1] ** 0.5
    if mask is not None:
        scores_BHSP = scores_BHSP + mask
    elif scores_BHSP.shape[2] > 1:
        future = torch.ones(scores_BHSP.shape[2:], dtype=torch.bool, device=query_BHSd.device).triu(1)
        scores_BHSP = scores_BHSP.masked_fill(future, torch.finfo(scores_BHSP.dtype).min)
    weights_BHSP = scores_BHSP.softmax(dim=-1, dtype=torch.float32).to(query_BHSd.dtype)
    return weights_BHSP @ value_BHPd, weights_BHSP


def _linear_fp32(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x.float(), weight.float())


def rotation_table(
    config: MoeppConfig, position_ids_BS: Tensor, num_positions: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return cosine and sine, [B, 1, S, d/2], computed anew each time: there is no buffer to lose."""
    head_dim = config.hidden_size // config.num_attention_heads
    theta, divisor, factor = config.rotary_theta, 1.0, config.rotary_scaling_factor
    if config.rotary_scaling_type == "linear":
        divisor = factor
    elif config.rotary_scaling_type == "ntk":
        theta *= factor
    elif config.rotary_scaling_type == "dynamic" and num_positions > config.max_position_embeddings:
        stretch = factor * num_positions / config.max_position_embeddings - (factor - 1)
        theta *= stretch ** (head_dim / (head_dim - 2))
    exponent_d = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids_BS.device) / head_dim
    angle_B1Sd = position_ids_BS[:, None, :, None].float() / divisor * (1.0 / theta**exponent_d)
    return angle_B1Sd.cos().to(dtype), angle_B1Sd.sin().to(dtype)


def _rotate(x_BHSd: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the pairs (i, i + d/2) of every head."""
    cos, sin = rotation
    first, second = x_BHSd.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
