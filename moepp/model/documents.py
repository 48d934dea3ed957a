"""Documents within a sequence: what attention may see where it stays within them.

The token that ends documents belongs to the one that it ends; the next token begins another one, at position 0.

Letters: B batch, S sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor


def number_documents(ids_BS: Tensor, end_id: int) -> Tensor:
    """Give each token the number of its document within the sequence, from 0; [B, S] int64."""
    ends_BS = (ids_BS == end_id).long()
    return ends_BS.cumsum(dim=1) - ends_BS


def positions_in_documents(documents_BS: Tensor) -> Tensor:
    """Count each token's position from the beginning of its document, [B, S]; ``documents_BS`` numbers them."""
    position_BS = torch.arange(documents_BS.shape[1], device=documents_BS.device).expand_as(documents_BS)
    begins_BS = torch.ones_like(documents_BS, dtype=torch.bool)
    begins_BS[:, 1:] = documents_BS[:, 1:] != documents_BS[:, :-1]
    return position_BS - torch.where(begins_BS, position_BS, 0).cummax(dim=1).values
