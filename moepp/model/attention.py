"""Grouped-query attention with rotary position embeddings, and the cache of its keys and values.

Letters: B batch, S new positions, P positions seen in all (cached + new), D width, H query heads, G key/value heads,
d head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moepp.config import ModelConfig
from moepp.errors import ConfigError
from moepp.model.linear import Linear
from moepp.ops import multiplies_in_float32, rotate


@dataclass(frozen=True)
class AttentionInputs:
    """What every layer's attention needs besides the hidden state; computed once per forward."""

    cos: Tensor  # [1 or B, 1, S, d/2], in the model's dtype
    sin: Tensor  # like cos
    mask: Tensor | None = None  # added to the scores, [1 or B, 1, S, P]; None: causal, or one query that sees all
    cache: KVCache | None = None


class KVCache:
    """Keys and values of the positions already seen, for decoding without computing them again.

    Memory is taken at the first forward: 2 x layers x B x G x max_length x d elements.
    """

    def __init__(self, num_layers: int, max_length: int) -> None:
        self.max_length = max_length  # positions
        self._lengths = [0] * num_layers
        self._keys: list[Tensor | None] = [None] * num_layers
        self._values: list[Tensor | None] = [None] * num_layers

    @property
    def length(self) -> int:
        """Positions held by every layer."""
        return min(self._lengths)

    def append(self, layer: int, key_BGSd: Tensor, value_BGSd: Tensor) -> tuple[Tensor, Tensor]:
        """Store S new positions of ``layer`` and return its keys and values of all P positions, [B, G, P, d].

        Raises:
            ConfigError: more positions than ``max_length``, or another batch size than before.
        """
        start, stop = self._lengths[layer], self._lengths[layer] + key_BGSd.shape[2]
        if stop > self.max_length:
            raise ConfigError(f"KV cache: position {stop} is beyond max_length={self.max_length}; make a longer cache")
        keys, values = self._keys[layer], self._values[layer]
        if keys is None or values is None:
            batch, heads, _, head_dim = key_BGSd.shape
            keys = key_BGSd.new_empty(batch, heads, self.max_length, head_dim)
            values = torch.empty_like(keys)
            self._keys[layer], self._values[layer] = keys, values
        if keys.shape[0] != key_BGSd.shape[0]:
            raise ConfigError(
                f"KV cache: batch of {key_BGSd.shape[0]} does not match the {keys.shape[0]} cached sequences; "
                "make a new cache"
            )
        keys[:, :, start:stop] = key_BGSd
        values[:, :, start:stop] = value_BGSd
        self._lengths[layer] = stop
        return keys[:, :, :stop], values[:, :, :stop]


class Attention(nn.Module):
    """Causal self-attention; query head j reads key/value head ``j // (H / G)``."""

    def __init__(self, cfg: ModelConfig, layer_index: int) -> None:
        super().__init__()
        self.layer_index = layer_index
        self.head_dim = cfg.head_dim
        kv_size = cfg.num_kv_heads * cfg.head_dim
        self.q_proj = Linear(cfg.hidden_size, cfg.hidden_size)
        self.k_proj = Linear(cfg.hidden_size, kv_size)
        self.v_proj = Linear(cfg.hidden_size, kv_size)
        self.o_proj = Linear(cfg.hidden_size, cfg.hidden_size)

    def forward(self, x_BSD: Tensor, inputs: AttentionInputs) -> Tensor:
        """[B, S, D] -> [B, S, D]."""
        query_BHSd = rotate(self._split_heads(self.q_proj(x_BSD)), inputs.cos, inputs.sin)
        key_BGPd = rotate(self._split_heads(self.k_proj(x_BSD)), inputs.cos, inputs.sin)
        value_BGPd = self._split_heads(self.v_proj(x_BSD))
        if inputs.cache is not None:
            key_BGPd, value_BGPd = inputs.cache.append(self.layer_index, key_BGPd, value_BGPd)
        mask = inputs.mask
        if multiplies_in_float32(x_BSD):
            query_BHSd, key_BGPd, value_BGPd = query_BHSd.float(), key_BGPd.float(), value_BGPd.float()
            mask = None if mask is None else mask.float()
        out_BHSd = F.scaled_dot_product_attention(
            query_BHSd,
            key_BGPd,
            value_BGPd,
            attn_mask=mask,
            # Without a mask either the keys are those of the queries, or the one query may attend to all keys.
            is_causal=mask is None and query_BHSd.shape[2] == key_BGPd.shape[2],
            enable_gqa=query_BHSd.shape[1] != key_BGPd.shape[1],
        )
        return self.o_proj(out_BHSd.transpose(1, 2).reshape(x_BSD.shape).to(x_BSD.dtype))

    def _split_heads(self, x_BSD: Tensor) -> Tensor:
        return x_BSD.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


def rotary_table(
    position_ids_BS: Tensor, cfg: ModelConfig, num_positions: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of ``position / theta^(2i/d)``, i < d/2 (RoPE, arXiv 2104.09864), scaled as ``cfg`` says.

    Angles are computed in fp32 and the results rounded to ``dtype``. Returns two [B, 1, S, d/2].

    Args:
        num_positions: P; "dynamic" scaling depends on it, and keys that a cache holds keep the angles of their time.
    """
    theta, divisor = _scaled_rope(cfg, num_positions)
    exponent_d = torch.arange(0, cfg.head_dim, 2, dtype=torch.float32, device=position_ids_BS.device) / cfg.head_dim
    angle_B1Sd = position_ids_BS[:, None, :, None].float() / divisor * (1.0 / theta**exponent_d)
    return angle_B1Sd.cos().to(dtype), angle_B1Sd.sin().to(dtype)


def _scaled_rope(cfg: ModelConfig, num_positions: int) -> tuple[float, float]:
    """(theta, what positions are divided by) under :class:`moepp.config.RopeScalingConfig`."""
    scaling, theta = cfg.rope_scaling, cfg.rope_theta
    if scaling is None:
        return theta, 1.0
    if scaling.type == "linear":
        return theta, scaling.factor
    if scaling.type == "ntk":
        return theta * scaling.factor, 1.0
    if num_positions <= cfg.max_seq_len:
        return theta, 1.0
    stretch = scaling.factor * num_positions / cfg.max_seq_len - (scaling.factor - 1)
    return theta * stretch ** (cfg.head_dim / (cfg.head_dim - 2)), 1.0


def build_attention_mask(
    valid_BP: Tensor | None, num_new: int, num_past: int, dtype: torch.dtype, device: torch.device
) -> Tensor | None:
    """Return the mask added to the attention scores; None where SDPA needs none.

    Each of "in the future" and "padding" adds the dtype's lowest number rather than -inf. So a padding position that
    may attend to nothing gets some finite output instead of NaN, the same as in the released code.

    Args:
        valid_BP: bool, [B, P]; False marks padding. None: no padding.
        num_new: S. num_past: positions in the cache; P = num_past + S.

    Returns:
        [1 or B, 1, S, P] in ``dtype``, 0 where a new position may attend.
    """
    if valid_BP is None and (num_past == 0 or num_new == 1):
        return None
    lowest = torch.finfo(dtype).min
    mask_SP = torch.full((num_new, num_past + num_new), lowest, dtype=dtype, device=device).triu(num_past + 1)
    if valid_BP is None:
        return mask_SP[None, None]
    padding_BP = torch.zeros(valid_BP.shape, dtype=dtype, device=device).masked_fill(~valid_BP, lowest)
    return mask_SP[None, None] + padding_BP[:, None, None, :]
