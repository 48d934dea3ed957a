"""Sampling from the model. Letters: B batch, S prompt, P positions so far, V vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from moepp import comm
from moepp.errors import ConfigError
from moepp.model.attention import KVCache
from moepp.model.transformer import Transformer


@torch.no_grad()
def generate(
    model: Transformer,
    input_ids_BS: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_id: int | None = None,
    generator: torch.Generator | None = None,
    cache: bool = True,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """Continue the prompts, in eval mode (dropless routing); the model's training flag is restored.

    With expert parallelism every rank of the group must call it with the same prompts and arguments. All compute the
    same, and the first rank's choice of each token counts for all, so that they stay in step.

    Args:
        input_ids_BS: [B, S] int64, S >= 1; padding on the left.
        max_new_tokens: tokens to add.
        temperature: 0: greedy. Otherwise logits are divided by it and a token is drawn.
        top_k: draw among the k most likely tokens only.
        top_p: draw among the fewest most likely tokens whose probability reaches p only (nucleus sampling).
        eos_id: a sequence that drew it is filled with it; stops when all have.
        generator: on the device of the logits; None: torch's global one.
        cache: keep keys and values of earlier positions; False computes them again for every token.
        attention_mask: [B, S], 0 marks padding. Positions then count real tokens only.

    Returns:
        [B, S + at most max_new_tokens]: prompts and new tokens.

    Raises:
        ConfigError: an empty prompt or a sampling option out of range.
    """
    _check(input_ids_BS, max_new_tokens, temperature, top_k, top_p)
    was_training = model.training
    model.eval()
    try:
        ids_BP, mask_BP = input_ids_BS, attention_mask
        kv_cache = KVCache(model.cfg.num_layers, ids_BP.shape[1] + max_new_tokens) if cache else None
        finished_B1 = torch.zeros_like(ids_BP[:, :1], dtype=torch.bool)
        for _ in range(max_new_tokens):
            num_past = 0 if kv_cache is None else kv_cache.length
            positions_BP = None if mask_BP is None else (mask_BP.long().cumsum(-1) - 1).clamp(min=0)[:, num_past:]
            out = model(ids_BP[:, num_past:], positions_BP, mask_BP, kv_cache)
            next_B1 = sample(
                model.logits(out.hidden[:, -1]), temperature=temperature, top_k=top_k, top_p=top_p, generator=generator
            )
            next_B1 = _agree(next_B1, model.ep_group)
            if eos_id is not None:
                next_B1 = torch.where(finished_B1, eos_id, next_B1)
                finished_B1 = finished_B1 | (next_B1 == eos_id)
            ids_BP = torch.cat((ids_BP, next_B1), dim=1)
            if mask_BP is not None:
                mask_BP = torch.cat((mask_BP, torch.ones_like(mask_BP[:, :1])), dim=1)
            if eos_id is not None and finished_B1.all():
                break
        return ids_BP
    finally:
        model.train(was_training)


def sample(
    logits_BV: Tensor,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One token per row, [B, 1] int64; arguments as in :func:`generate`."""
    if temperature == 0:
        return logits_BV.argmax(dim=-1, keepdim=True)
    probs_BV, ids_BV = torch.softmax(logits_BV.float() / temperature, dim=-1).sort(dim=-1, descending=True, stable=True)
    if top_p is not None:
        # A token stays while those before it have not reached p; the first always does.
        probs_BV = probs_BV.masked_fill(probs_BV.cumsum(-1) - probs_BV >= top_p, 0.0)
    if top_k is not None:
        probs_BV = probs_BV[:, :top_k]
    return ids_BV.gather(1, torch.multinomial(probs_BV, 1, generator=generator))


def _agree(next_B1: Tensor, group: comm.Group | None) -> Tensor:
    """The first rank's tokens on every rank: the others' logits may differ from its in the last bit."""
    if group is None or comm.size(group) == 1:
        return next_B1
    return comm.all_reduce_sum(next_B1 if comm.rank(group) == 0 else torch.zeros_like(next_B1), group)


def _check(
    input_ids_BS: Tensor, max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None
) -> None:
    if input_ids_BS.dim() != 2 or input_ids_BS.numel() == 0:
        raise ConfigError(
            f"prompt has shape {list(input_ids_BS.shape)}, expected [B, S] with at least one token; "
            "start from the end-of-document token"
        )
    if max_new_tokens < 0:
        raise ConfigError(f"max_new_tokens={max_new_tokens} is negative; ask for 0 or more")
    if temperature < 0:
        raise ConfigError(f"temperature={temperature} is negative; use 0 for greedy decoding or a positive number")
    if top_k is not None and top_k < 1:
        raise ConfigError(f"top_k={top_k} leaves no token to draw; use 1 or more, or None")
    if top_p is not None and not 0 < top_p <= 1:
        raise ConfigError(f"top_p={top_p} must lie in (0, 1]; use None to switch it off")
