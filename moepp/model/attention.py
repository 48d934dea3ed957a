"""Grouped-query attention with rotary position embeddings, and the cache of its keys and values.

Letters: B batch, S new positions, P positions seen in all (cached + new), Q queries, D width, H query heads, G
key/value heads, d head size. Where ranks share a sequence, S are the positions of a context part and H, G the heads of
this rank (:mod:`moepp.distributed.sequence`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from moepp.config import ModelConfig
from moepp.distributed.sequence import SequenceParallel
from moepp.errors import ConfigError
from moepp.model.linear import Linear
from moepp.ops import AttentionMask, attend, document_mask, rotate


@dataclass(frozen=True)
class QueryRun:
    """Queries ``start .. stop - 1``, which follow each other in the sequence, and the first ``num_keys`` keys."""

    start: int
    stop: int
    num_keys: int
    mask: AttentionMask = None  # [1 or B, 1, stop - start, num_keys]; None: causal, the last query sees the last key


@dataclass(frozen=True)
class AttentionInputs:
    """What every layer's attention needs besides the hidden state; computed once per forward."""

    cos: Tensor  # [1 or B, 1, S, d/2], in the model's dtype
    sin: Tensor  # like cos
    runs: tuple[QueryRun, ...]  # they cover the queries in their order
    cache: KVCache | None = None


class KVCache:
    """Keys and values of the positions already seen, for decoding without computing them again.

    Memory is taken at the first forward: 2 x layers x B x G x max_length x d elements.
    """

    def __init__(self, num_layers: int, max_length: int) -> None:
        self.max_length = max_length  # positions
        self._lengths = [0] * num_layers
        self._ids: Tensor | None = None  # [B, P], where attention stays within documents
        self._keys: list[Tensor | None] = [None] * num_layers
        self._values: list[Tensor | None] = [None] * num_layers

    @property
    def length(self) -> int:
        """Positions held by every layer."""
        return min(self._lengths)

    def append_ids(self, ids_BS: Tensor) -> Tensor:
        """Store the tokens of S new positions and return those of all P positions, [B, P]."""
        self._ids = ids_BS if self._ids is None else torch.cat((self._ids, ids_BS), dim=1)
        return self._ids

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
    """Causal self-attention; query head j reads key/value head ``j // (H / G)``.

    Args:
        cfg: shapes.
        layer_index: of the transformer layer, for the cache.
        sequence: how ranks share sequences; each tensor-parallel rank holds consecutive heads.

    Raises:
        ConfigError: the heads cannot be divided so.
    """

    def __init__(self, cfg: ModelConfig, layer_index: int, sequence: SequenceParallel | None = None) -> None:
        super().__init__()
        self.layer_index = layer_index
        self.head_dim = cfg.head_dim
        self.sequence = sequence if sequence is not None else SequenceParallel()
        _check_heads(cfg, self.sequence)
        size = cfg.hidden_size // self.sequence.tensor_size
        kv_size = cfg.num_kv_heads * cfg.head_dim // self.sequence.tensor_size
        self.q_proj = Linear(cfg.hidden_size, size)
        self.k_proj = Linear(cfg.hidden_size, kv_size)
        self.v_proj = Linear(cfg.hidden_size, kv_size)
        self.o_proj = Linear(size, cfg.hidden_size)

    def forward(self, x_BSD: Tensor, inputs: AttentionInputs) -> Tensor:
        """[B, S, D] -> [B, S, D], of this rank's own tokens."""
        x_BSD = self.sequence.gather_tensor(x_BSD)
        query_BHSd = rotate(self._split_heads(self.q_proj(x_BSD)), inputs.cos, inputs.sin)
        key_BGPd = rotate(self._split_heads(self.k_proj(x_BSD)), inputs.cos, inputs.sin)
        value_BGPd = self._split_heads(self.v_proj(x_BSD))
        if inputs.cache is not None:
            key_BGPd, value_BGPd = inputs.cache.append(self.layer_index, key_BGPd, value_BGPd)
        out_BHSd = self._attend(query_BHSd, key_BGPd, value_BGPd, inputs.runs)
        return self.sequence.sum_scatter_tensor(self.o_proj(out_BHSd.transpose(1, 2).flatten(2)))

    def _attend(self, query_BHSd: Tensor, key_BGPd: Tensor, value_BGPd: Tensor, runs: tuple[QueryRun, ...]) -> Tensor:
        sequence = self.sequence
        if sequence.context_size == 1:
            return _attend_in_runs(query_BHSd, key_BGPd, value_BGPd, runs)
        if sequence.method == "gather":
            return _attend_in_runs(query_BHSd, *sequence.gather_context(key_BGPd, value_BGPd), runs=runs)
        return sequence.gather_heads(
            _attend_in_runs(*sequence.scatter_heads(query_BHSd, key_BGPd, value_BGPd), runs=runs)
        )

    def _split_heads(self, x_BSD: Tensor) -> Tensor:
        return x_BSD.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


def _check_heads(cfg: ModelConfig, sequence: SequenceParallel) -> None:
    parts = sequence.tensor_size * (sequence.context_size if sequence.method == "ulysses" else 1)
    for name, heads in (("num_heads", cfg.num_heads), ("num_kv_heads", cfg.num_kv_heads)):
        if heads % parts:
            raise ConfigError(
                f"model.{name}={heads} cannot be divided over {parts} ranks (tensor parallel, times context parallel "
                "with ulysses); use fewer of them, or gathered keys and values"
            )


def _attend_in_runs(query_BHQd: Tensor, key_BGKd: Tensor, value_BGKd: Tensor, runs: tuple[QueryRun, ...]) -> Tensor:
    if len(runs) == 1:
        return attend(query_BHQd, key_BGKd, value_BGKd, runs[0].mask)
    outputs = []
    for run in runs:
        key_BGkd, value_BGkd = key_BGKd[:, :, : run.num_keys], value_BGKd[:, :, : run.num_keys]
        outputs.append(attend(query_BHQd[:, :, run.start : run.stop], key_BGkd, value_BGkd, run.mask))
    return torch.cat(outputs, dim=2)


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


def query_runs(
    positions_Q: Tensor,
    num_positions: int,
    sequence: SequenceParallel,
    *,
    head_dim: int,
    dtype: torch.dtype,
    valid_BP: Tensor | None = None,
    documents_BP: Tensor | None = None,
    is_cached: bool = False,
) -> tuple[QueryRun, ...]:
    """Return which keys the queries see: those before them, that are no padding, of their own document.

    Args:
        positions_Q: where the queries lie in the sequence.
        num_positions: P.
        sequence: with gathered keys and values and zigzag there are two runs.
        head_dim: d.
        dtype: of masks that are added.
        valid_BP: bool; False marks padding. None: no padding.
        documents_BP: number of each position's document. None: attention crosses their borders.
        is_cached: there are keys of earlier calls.
    """
    num_queries = positions_Q.shape[0]
    runs = [QueryRun(0, num_queries, num_positions)]
    if sequence.is_zigzag:
        half, rank = num_queries // 2, sequence.context_rank
        keys = ((rank + 1) * half, num_positions - rank * half)
        runs = [QueryRun(i * half, (i + 1) * half, num_keys) for i, num_keys in enumerate(keys)]
    if valid_BP is None and documents_BP is None:
        return tuple(runs)
    masked = []
    for run in runs:
        at = positions_Q[run.start : run.stop]
        if valid_BP is None and documents_BP is not None:
            mask = document_mask(documents_BP, at, run.num_keys, head_dim, blocks=False if is_cached else None)
        else:
            mask = build_attention_mask(at, run.num_keys, valid_BP, documents_BP, dtype)
        masked.append(replace(run, mask=mask))
    return tuple(masked)


def build_attention_mask(
    positions_Q: Tensor,
    num_keys: int,
    valid_BP: Tensor | None,
    documents_BP: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Return what is added to the attention scores, [1 or B, 1, Q, num_keys] in ``dtype``; 0 where a query may attend.

    Each of "in the future", "padding" and "another document" adds the dtype's lowest number rather than -inf. So a
    padding position that may attend to nothing gets some finite output instead of NaN, the same as in the released
    code.

    Args: as in :func:`query_runs`; the keys are those at positions 0 .. num_keys - 1.
    """
    lowest, device = torch.finfo(dtype).min, positions_Q.device
    is_future_QK = torch.arange(num_keys, device=device) > positions_Q[:, None]
    mask = torch.zeros(is_future_QK.shape, dtype=dtype, device=device).masked_fill_(is_future_QK, lowest)[None, None]
    if valid_BP is not None:
        padding_BK = torch.zeros(valid_BP.shape, dtype=dtype, device=device).masked_fill(~valid_BP, lowest)
        mask = mask + padding_BK[:, None, None, :num_keys]
    if documents_BP is not None:
        other_BQK = documents_BP[:, positions_Q, None] != documents_BP[:, None, :num_keys]
        mask = mask + torch.zeros(other_BQK.shape, dtype=dtype, device=device).masked_fill_(other_BQK, lowest)[:, None]
    return mask
