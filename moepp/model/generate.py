"""Sampling from the model. Letters: B batch, S prompt, P positions so far, V vocabulary."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moepp.distributed import comm
from moepp.distributed.device import to_device
from moepp.errors import ConfigError
from moepp.model.attention import KVCache
from moepp.model.transformer import Transformer

_SMALLEST_TEMPERATURE = torch.finfo(torch.float32).tiny  # below it, 0 / temperature is not a number


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Raises:
        ConfigError: an option out of range.
    """

    temperature: float = 0.0  # 0: the most likely token. Otherwise logits are divided by it and a token is drawn
    top_k: int | None = None  # draw among the k most likely tokens only
    top_p: float | None = None  # draw among the fewest most likely tokens whose probability reaches p (nucleus)
    never: tuple[int, ...] = ()  # ids that are not chosen: rows of the embedding that no token of the tokenizer has

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"temperature={self.temperature} is out of range; use 0 (greedy) or a positive number")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k={self.top_k} leaves no token to draw; use 1 or more, or None")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p} must lie in (0, 1]; use None to switch it off")


GREEDY = Sampling()


def generate(
    model: Transformer,
    input_ids_BS: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    never: Sequence[int] = (),
    **options: Any,
) -> Tensor:
    """Continue the prompts; options as in :class:`Sampling` and :func:`stream`.

    Returns:
        [B, S + at most max_new_tokens]: prompts and new tokens.
    """
    sampling = Sampling(temperature, top_k, top_p, tuple(never))
    return torch.cat((input_ids_BS, *stream(model, input_ids_BS, max_new_tokens, sampling, **options)), dim=1)


def stream(
    model: Transformer,
    input_ids_BS: Tensor,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    *,
    eos_id: int | None = None,
    pad_id: int | None = None,
    generator: torch.Generator | None = None,
    cache: bool = True,
    attention_mask: Tensor | None = None,
) -> Iterator[Tensor]:
    """Yield the next token of every prompt, [B, 1], one at a time, in eval mode (dropless routing).

    With expert parallelism every rank of the group must call it with the same prompts and arguments. All compute the
    same, and the first rank's choice of each token counts for all, so that they stay in step.

    Args:
        input_ids_BS: [B, S] int64, S >= 1; padding on the left.
        max_new_tokens: tokens to add.
        eos_id: a sequence that drew it is filled with ``pad_id``; stops when all have.
        pad_id: None: ``eos_id``.
        generator: on the device of the logits; None: torch's global one.
        cache: keep keys and values of earlier positions; False computes them again for every token.
        attention_mask: [B, S], 0 marks padding. Positions then count real tokens only.

    Raises:
        ConfigError: an empty prompt, or a negative number of tokens.
    """
    _check(input_ids_BS, max_new_tokens)
    ids_BP, mask_BP = input_ids_BS, attention_mask
    kv_cache = KVCache(model.cfg.num_layers, ids_BP.shape[1] + max_new_tokens) if cache else None
    finished_B1 = torch.zeros_like(ids_BP[:, :1], dtype=torch.bool)
    for _ in range(max_new_tokens):
        next_B1 = _next_token(model, ids_BP, mask_BP, kv_cache, sampling, generator)
        if eos_id is not None:
            next_B1 = torch.where(finished_B1, eos_id if pad_id is None else pad_id, next_B1)
            finished_B1 = finished_B1 | (next_B1 == eos_id)
        yield next_B1
        if eos_id is not None and finished_B1.all():
            return
        ids_BP = torch.cat((ids_BP, next_B1), dim=1)
        if mask_BP is not None:
            mask_BP = torch.cat((mask_BP, torch.ones_like(mask_BP[:, :1])), dim=1)


@torch.no_grad()
def _next_token(
    model: Transformer,
    ids_BP: Tensor,
    mask_BP: Tensor | None,
    kv_cache: KVCache | None,
    sampling: Sampling,
    generator: torch.Generator | None,
) -> Tensor:
    """Run one forward over the tokens that the cache lacks, choose, and restore the training flag."""
    was_training = model.training
    model.eval()
    try:
        num_past = 0 if kv_cache is None else kv_cache.length
        positions_BP = None if mask_BP is None else (mask_BP.long().cumsum(-1) - 1).clamp(min=0)[:, num_past:]
        out = model(ids_BP[:, num_past:], positions_BP, mask_BP, kv_cache)
        return _agree(sample(model.logits(out.hidden[:, -1]), sampling, generator), model.parallel.group)
    finally:
        model.train(was_training)


def sample(logits_BV: Tensor, sampling: Sampling = GREEDY, generator: torch.Generator | None = None) -> Tensor:
    """Return one token per row, [B, 1] int64."""
    if sampling.never:
        never = to_device(torch.tensor(sampling.never), logits_BV.device)
        logits_BV = logits_BV.index_fill(1, never, -math.inf)
    if sampling.temperature == 0:
        return logits_BV.argmax(dim=-1, keepdim=True)
    # The largest logit is taken off first, or a temperature near 0 would make it infinite.
    logits_BV = logits_BV.float() - logits_BV.float().amax(dim=-1, keepdim=True)
    probs_BV = torch.softmax(logits_BV / max(sampling.temperature, _SMALLEST_TEMPERATURE), dim=-1)
    probs_BV, ids_BV = probs_BV.sort(dim=-1, descending=True, stable=True)
    if sampling.top_p is not None:
        # A token stays while those before it have not reached p; the first always does.
        probs_BV = probs_BV.masked_fill(probs_BV.cumsum(-1) - probs_BV >= sampling.top_p, 0.0)
    if sampling.top_k is not None:
        probs_BV = probs_BV[:, : sampling.top_k]
    return ids_BV.gather(1, torch.multinomial(probs_BV, 1, generator=generator))


def _agree(next_B1: Tensor, group: comm.Group | None) -> Tensor:
    """Return the first rank's tokens on every rank: logits may differ in the last bit."""
    if group is None or comm.size(group) == 1:
        return next_B1
    return comm.all_reduce_sum(next_B1 if comm.rank(group) == 0 else torch.zeros_like(next_B1), group)


def _check(input_ids_BS: Tensor, max_new_tokens: int) -> None:
    if input_ids_BS.dim() != 2 or input_ids_BS.numel() == 0:
        raise ConfigError(
            f"prompt has shape {list(input_ids_BS.shape)}, expected [B, S] with at least one token; "
            "start from the end-of-document token"
        )
    if max_new_tokens < 0:
        raise ConfigError(f"max_new_tokens={max_new_tokens} is negative; ask for 0 or more")
