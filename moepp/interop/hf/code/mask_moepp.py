"""Attention masks: what transformers passes and allows, made into what attention adds to its scores.

Letters: B batch, H query heads, S new positions, P keys (cached + new; with a static cache all its places).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .cache_moepp import Places


def attention_mask_table(
    given: Any, places: Places, sequences_BS: Tensor | None, like_BSD: Tensor, num_heads: int
) -> Tensor | None:
    """Return the mask to add to the scores, [1 or B, 1 or H, S, P], or None if none is needed.

    It is the lowest number in the future, on padding and between packed sequences. None: all positions are new, or a
    single one sees all keys.

    Args:
        given: [B, P], 0 or False on padding; or [1 or B, 1 or H, S, P] instead of the causal mask, boolean (True:
            attend) or added to the scores; or None.
        sequences_BS: number of the packed sequence that a position belongs to; None: one sequence per row.

    Raises:
        ValueError: another form or size of ``given``.
    """
    batch, num_new = like_BSD.shape[:2]
    if given is not None and not isinstance(given, Tensor):
        raise ValueError(
            f"attention_mask is a {type(given).__name__}, expected a tensor [batch, positions] or [batch, heads, new "
            "positions, keys]"
        )
    if given is not None and given.dim() == 4:
        return _prepared(given, (batch, num_heads, num_new, places.num_keys), like_BSD)
    if given is None and sequences_BS is None and _sees_all(places, num_new):
        return None
    keys_P = torch.arange(places.num_keys, device=like_BSD.device)
    mask_BHSP = _lowest_where(keys_P > places.positions_S[:, None], like_BSD)[None, None]
    if sequences_BS is not None:
        other_BSP = sequences_BS[:, :, None] != sequences_BS[:, None, :]
        mask_BHSP = mask_BHSP + _lowest_where(other_BSP, like_BSD)[:, None]
    if given is not None:
        padding_BP = ~_real_positions(given, batch, places, num_new).to(like_BSD.device)
        mask_BHSP = mask_BHSP + _lowest_where(padding_BP, like_BSD)[:, None, None]
    return mask_BHSP


def packed_sequences(position_ids_BS: Tensor, batch: int) -> Tensor | None:
    """Return the number of each position's sequence, or None if positions count up by one throughout.

    As for Llama in transformers: this is how collators that pack several sequences into a row mark their starts.
    """
    steps_BS = torch.diff(position_ids_BS, prepend=position_ids_BS[:, :1] - 1, dim=-1)
    sequences_BS = (steps_BS != 1).cumsum(-1)
    if not torch.compiler.is_compiling() and not sequences_BS.any():
        return None
    return sequences_BS.expand(batch, -1)


def _sees_all(places: Places, num_new: int) -> bool:
    if not isinstance(places.num_past, int):
        return False
    return places.num_keys == places.num_past + num_new and (places.num_past == 0 or num_new == 1)


def _lowest_where(hidden: Tensor, like: Tensor) -> Tensor:
    return torch.zeros(hidden.shape, dtype=like.dtype, device=like.device).masked_fill(
        hidden, torch.finfo(like.dtype).min
    )


def _prepared(given_BHSP: Tensor, sizes: tuple[int, int, int, int], like: Tensor) -> Tensor:
    batch, num_heads, num_new, num_keys = sizes
    shape = tuple(given_BHSP.shape)
    if shape[0] not in (1, batch) or shape[1] not in (1, num_heads) or shape[2:] != (num_new, num_keys):
        raise ValueError(
            f"attention_mask has shape {list(shape)}, expected [1 or {batch}, 1 or {num_heads}, {num_new}, {num_keys}] "
            "(batch, heads, new positions, keys)"
        )
    if given_BHSP.dtype == torch.bool:
        return _lowest_where(~given_BHSP.to(like.device), like)
    if not given_BHSP.is_floating_point():
        raise ValueError(
            f"attention_mask of 4 dimensions is {given_BHSP.dtype}, expected bool (True: attend) or numbers to add"
        )
    return given_BHSP.to(like.device, like.dtype).clamp(min=torch.finfo(like.dtype).min)


def _real_positions(given_BP: Tensor, batch: int, places: Places, num_new: int) -> Tensor:
    """[B, P], True where a key is no padding; places of a static cache that are not filled count as padding."""
    num_seen = places.num_past + num_new if isinstance(places.num_past, int) else num_new
    shape = tuple(given_BP.shape)
    if len(shape) != 2 or shape[0] != batch or not num_seen <= shape[1] <= places.num_keys:
        raise ValueError(
            f"attention_mask has shape {list(shape)}, expected {[batch, num_seen]} (batch, cached + new positions)"
        )
    is_added = given_BP.is_floating_point() and not torch.compiler.is_compiling() and bool((given_BP < 0).any())
    if is_added:
        raise ValueError(
            "attention_mask of 2 dimensions holds negative numbers, expected 1 for real positions, 0 for padding"
        )
    return F.pad(given_BP.bool(), (0, places.num_keys - shape[1]))
