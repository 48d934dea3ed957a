"""Log-likelihoods and continuations of token sequences, one batch on one rank.

Letters: B batch, S sequence, D width, V vocabulary, C tokens of all continuations of a batch, U tokens of a slice of C.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from moepp.data.tokenizer import Tokenizer
from moepp.distributed.device import to_device
from moepp.model.generate import GREEDY, Sampling, stream
from moepp.model.transformer import Transformer
from moepp.ops import log_softmax

SLICE_TOKENS = 1024  # logits [U, V] in fp32 are held for this many positions at a time
SAMPLING_SEED = 1234  # as lm-evaluation-harness's default


@dataclass(frozen=True)
class Row:
    """One sequence for the model, and what may follow.

    Attributes:
        input_ids: int32, at least one token.
        continuations: each int32 of n tokens, n at most the row's length: the last n positions of the row predict them.
            Answers of one token to one question share a row.
    """

    input_ids: np.ndarray
    continuations: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Prompt:
    """A prompt to continue.

    Attributes:
        input_ids: int32, at least one token.
        max_new_tokens: at least 1.
        until: texts that end the continuation; they are cut off.
        sampling: how tokens are chosen.
    """

    input_ids: np.ndarray
    max_new_tokens: int
    until: tuple[str, ...] = ()
    sampling: Sampling = GREEDY


@torch.no_grad()
def score_rows(model: Transformer, rows: Sequence[Row]) -> list[list[tuple[float, bool]]]:
    """Return the log-likelihood in nats of each continuation of each row, and whether greedy decoding would write it.

    The softmax is taken in fp32 and sums in fp64, whatever the dtype of the model. Rows are padded on the right, where
    causal attention never looks and dropless routing makes no difference, so no mask is needed. The model must be in
    eval mode.
    """
    device = model.embed_tokens.weight.device
    lengths = [len(row.input_ids) for row in rows]
    ids_BS = torch.zeros(len(rows), max(lengths), dtype=torch.int64)
    for i, row in enumerate(rows):
        ids_BS[i, : lengths[i]] = torch.from_numpy(row.input_ids)
    hidden_BSD = model(to_device(ids_BS, device)).hidden

    # Only positions that predict a token of a continuation go through the output matrix.
    spans = [(i, lengths[i] - len(tokens), tokens) for i, row in enumerate(rows) for tokens in row.continuations]
    row_C = torch.tensor([i for i, _, tokens in spans for _ in tokens])
    position_C = torch.tensor([start + k for _, start, tokens in spans for k in range(len(tokens))])
    target_C = torch.from_numpy(np.concatenate([tokens for *_, tokens in spans]).astype(np.int64))
    row_C, position_C, target_C = to_device(torch.stack((row_C, position_C, target_C)), device)
    logprob_C, greedy_C = _token_logprobs(model, hidden_BSD[row_C, position_C], target_C)

    scores: list[list[tuple[float, bool]]] = [[] for _ in rows]
    start = 0
    for i, _, tokens in spans:
        stop = start + len(tokens)
        scores[i].append((float(logprob_C[start:stop].sum()), bool(greedy_C[start:stop].all())))
        start = stop
    return scores


def _token_logprobs(model: Transformer, hidden_CD: Tensor, target_C: Tensor) -> tuple[Tensor, Tensor]:
    """(log-probability of each target in fp64, whether it is the most likely token), on the CPU."""
    logprobs, greedy = [], []
    for hidden_UD, target_U in zip(hidden_CD.split(SLICE_TOKENS), target_C.split(SLICE_TOKENS), strict=True):
        logits_UV = model.logits(hidden_UD).float()
        logprobs.append(log_softmax(logits_UV).gather(1, target_U[:, None])[:, 0].double().cpu())
        greedy.append((logits_UV.argmax(dim=-1) == target_U).cpu())
    return torch.cat(logprobs), torch.cat(greedy)


@torch.no_grad()
def token_losses(model: Transformer, hidden_BSD: Tensor, targets_BS: Tensor) -> Tensor:
    """Return the cross-entropy of every target in nats, [B, S] fp64 on the CPU; as :func:`score_rows`."""
    logprob_C, _ = _token_logprobs(model, hidden_BSD.flatten(0, 1), targets_BS.flatten())
    return -logprob_C.view(targets_BS.shape)


def continue_prompts(
    model: Transformer, tokenizer: Tokenizer, prompts: Sequence[Prompt], batch_index: int
) -> list[str]:
    """Return continuations up to the first stop text, the end-of-document token or ``max_new_tokens``.

    With expert parallelism every rank of the EP group calls it with the same prompts. All prompts of a batch have the
    same ``max_new_tokens``, ``until`` and ``sampling``. Prompts are padded on the left, with a mask.

    Args:
        batch_index: seeds the random numbers of sampled continuations, so that they do not depend on the ranks.
    """
    first, device = prompts[0], model.embed_tokens.weight.device
    longest = max(len(prompt.input_ids) for prompt in prompts)
    ids_BS = torch.full((len(prompts), longest), tokenizer.eod_id, dtype=torch.int64)
    mask_BS = torch.zeros_like(ids_BS)
    for i, prompt in enumerate(prompts):
        ids_BS[i, longest - len(prompt.input_ids) :] = torch.from_numpy(prompt.input_ids)
        mask_BS[i, longest - len(prompt.input_ids) :] = 1
    tokens = stream(
        model,
        to_device(ids_BS, device),
        first.max_new_tokens,
        replace(first.sampling, never=tuple(tokenizer.unused_ids(model.cfg.vocab_size))),
        eos_id=tokenizer.eod_id,
        generator=torch.Generator(device=device).manual_seed(SAMPLING_SEED + batch_index),
        attention_mask=to_device(mask_BS, device),
    )
    written: list[list[int]] = [[] for _ in prompts]
    texts = [""] * len(prompts)
    ended = [False] * len(prompts)
    for next_B1 in tokens:
        for i, token in enumerate(next_B1[:, 0].tolist()):
            if token == tokenizer.eod_id:  # no part of the text, whether the tokenizer marks it as special or not
                ended[i] = True
            if not ended[i]:
                written[i].append(token)
                texts[i], ended[i] = cut_at_stop(tokenizer.decode(written[i]), first.until)
        if all(ended):
            break
    return texts


def cut_at_stop(text: str, until: Sequence[str]) -> tuple[str, bool]:
    """``text`` before the earliest stop text, and whether there was one."""
    places = [place for stop in until if stop and (place := text.find(stop)) >= 0]
    return (text[: min(places)], True) if places else (text, False)
