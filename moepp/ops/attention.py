"""Scaled dot-product attention, and the masks that it takes.

Masks are made once per forward and used by every layer. On accelerators a mask within documents is FlexAttention's
block mask, whose empty blocks cost nothing; elsewhere a tensor for torch's SDPA.

Letters: B batch, Q queries, K keys, H query heads, G key/value heads, d head size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from moepp.ops.matmul import multiplies_in_float32

AttentionMask: TypeAlias = Any
"""A tensor (bool: True where a query may attend; else added to the scores) [1 or B, 1, Q, K], a ``BlockMask`` of
FlexAttention, or None: causal, the last query sees the last key."""

_FLASH_HEAD_SIZE = 256  # the largest that flash attention takes
_FLEX_HEAD_SIZE = 16  # the smallest that FlexAttention's kernels take


def attend(query_BHQd: Tensor, key_BGKd: Tensor, value_BGKd: Tensor, mask: AttentionMask = None) -> Tensor:
    """Compute ``softmax(q k^T / sqrt(d) + mask) v``, [B, H, Q, d]; query head j reads key head ``j // (H / G)``."""
    dtype = query_BHQd.dtype
    if multiplies_in_float32(query_BHQd):
        query_BHQd, key_BGKd, value_BGKd = query_BHQd.float(), key_BGKd.float(), value_BGKd.float()
        mask = mask.float() if isinstance(mask, Tensor) and mask.is_floating_point() else mask
    is_grouped = query_BHQd.shape[1] != key_BGKd.shape[1]
    if mask is not None and not isinstance(mask, Tensor):
        out_BHQd = _attend_in_blocks(query_BHQd, key_BGKd, value_BGKd, mask, is_grouped)  # pyright: ignore[reportCallIssue]
        return out_BHQd.to(dtype)
    num_queries, num_keys = query_BHQd.shape[2], key_BGKd.shape[2]
    is_causal, is_last = mask is None and num_queries == num_keys, mask is None and 1 < num_queries < num_keys
    # The kernels that know of the last key do not all know of groups.
    if is_grouped and (is_last or not _takes_groups(query_BHQd, mask)):
        groups, is_grouped = query_BHQd.shape[1] // key_BGKd.shape[1], False
        key_BGKd, value_BGKd = (t.repeat_interleave(groups, dim=1) for t in (key_BGKd, value_BGKd))
    if is_last:
        mask = _causal_to_the_last_key(num_queries, num_keys)
    return F.scaled_dot_product_attention(
        query_BHQd, key_BGKd, value_BGKd, attn_mask=mask, is_causal=is_causal, enable_gqa=is_grouped
    ).to(dtype)


def _takes_groups(query_BHQd: Tensor, mask: AttentionMask) -> bool:
    """Return whether a fused kernel for such inputs reads a key head for several query heads.

    On accelerators flash attention alone does, which takes neither float32 nor masks nor large heads. For all else
    torch would hold the scores of all pairs, without a word (pytorch/pytorch#154363).
    """
    if query_BHQd.device.type == "cpu":
        return True
    is_short = query_BHQd.dtype in (torch.bfloat16, torch.float16)
    return mask is None and is_short and query_BHQd.shape[3] <= _FLASH_HEAD_SIZE


def document_mask(
    documents_BS: Tensor, positions_Q: Tensor, num_keys: int, head_dim: int, *, blocks: bool | None = None
) -> AttentionMask:
    """Make a mask that is causal and stays within documents: query q sees keys k <= q of the same document.

    Args:
        documents_BS: number of each token's document, of the whole sequences.
        positions_Q: where the queries lie in their sequence.
        num_keys: the keys are those at positions 0 .. num_keys - 1.
        head_dim: d.
        blocks: make a ``BlockMask``; None: where there is a kernel for it.
    """
    batch, num_queries = documents_BS.shape[0], positions_Q.shape[0]

    def may_attend(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        at = positions_Q[q]
        return (k <= at) & (documents_BS[b, at] == documents_BS[b, k])

    if blocks is None:
        blocks = documents_BS.device.type == "cuda" and head_dim >= _FLEX_HEAD_SIZE
    if blocks:
        return _create_block_mask()(may_attend, batch, None, num_queries, num_keys, device=documents_BS.device)
    keys_K = torch.arange(num_keys, device=documents_BS.device)
    causal_QK = keys_K <= positions_Q[:, None]
    same_BQK = documents_BS[:, positions_Q, None] == documents_BS[:, None, :num_keys]
    return (causal_QK & same_BQK)[:, None]


@functools.lru_cache(maxsize=8)
def _causal_to_the_last_key(num_queries: int, num_keys: int) -> Tensor:
    from torch.nn.attention.bias import causal_lower_right

    return causal_lower_right(num_queries, num_keys)


@torch.compiler.disable
def _attend_in_blocks(
    query_BHQd: Tensor, key_BGKd: Tensor, value_BGKd: Tensor, mask: AttentionMask, is_grouped: bool
) -> Tensor:
    """FlexAttention, compiled by itself: a layer that is compiled around it must not trace what makes and keeps it.

    Nor does such a layer depend on what the mask of a batch holds.
    """
    return _flex_attention()(query_BHQd, key_BGKd, value_BGKd, block_mask=mask, enable_gqa=is_grouped)


@functools.cache
def _flex_attention() -> Callable[..., Tensor]:
    """Import FlexAttention, as a kernel where there is an accelerator; on the CPU torch's own operations."""
    from torch.nn.attention.flex_attention import flex_attention

    return _compiled(flex_attention)


@functools.cache
def _create_block_mask() -> Callable[..., Any]:
    """Import what makes block masks; compiled, it never holds the whole [Q, K]."""
    from torch.nn.attention.flex_attention import create_block_mask

    return _compiled(create_block_mask)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function) if torch.accelerator.is_available() else function
