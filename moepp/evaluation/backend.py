"""The model as lm-evaluation-harness sees it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from moepp.errors import ConfigError, DataError
from moepp.evaluation.scoring import Prompt, Row
from moepp.evaluation.sharing import SharedModel
from moepp.model.generate import Sampling

SLAB = 4096  # requests tokenised, sorted and sent at a time: memory stays bounded, whatever the benchmark
DEFAULT_NEW_TOKENS = 256  # as lm-evaluation-harness's own backends, where a task names no number


class HarnessModel(TemplateLM):
    """Answers the harness's requests on rank 0 with the model of all ranks.

    To the harness it is one process: sharing among ranks happens inside each call. Prompts longer than the model's
    ``max_seq_len`` lose their beginning, as with the harness's own backends; :attr:`num_truncated` counts them.

    Args:
        shared: used inside :meth:`SharedModel.run`.
        progress: show a bar.
    """

    def __init__(self, shared: SharedModel, progress: bool = False) -> None:
        super().__init__()
        self._shared = shared
        self._tokens = shared.tokenizer
        self._progress = progress
        self._encode = lru_cache(maxsize=64)(self._tokens.encode)  # answers to one question follow each other
        self.max_length = shared.model.cfg.max_seq_len
        self.num_requests = 0
        self.num_truncated = 0

    @property
    def eot_token_id(self) -> int:
        """Ends a document, and is the context of texts without one."""
        return self._tokens.eod_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; no special tokens are added, as in training."""
        return self._encode(string)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether greedy decoding writes it) of each (context, continuation)."""
        scores: list[tuple[float, bool]] = []
        with self._bar(len(requests), disable_tqdm) as bar:
            for start in range(0, len(requests), SLAB):
                slab = [request.args for request in requests[start : start + SLAB]]
                scores += self._loglikelihood_tokens([(pair, *self._encode_pair(*pair)) for pair in slab])
                bar.update(len(slab))
        return scores

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Return the tokens of a context and of its continuation; an empty context is an end of document.

        As the harness's backends encode the two together and cut, except where a token spans the cut so that nothing
        is left to score: then the continuation is encoded alone (EleutherAI/lm-evaluation-harness pull request 4055).
        """
        if not continuation:
            return [self.prefix_token_id], []
        if not context:
            ids = self.tok_encode(continuation)
            starts_with_prefix = len(ids) > 1 and ids[0] == self.prefix_token_id
            return (ids[:1], ids[1:]) if starts_with_prefix else ([self.prefix_token_id], ids)
        context_ids, continuation_ids = super()._encode_pair(context, continuation)
        if not continuation_ids:
            spaces = context[len(context.rstrip()) :]  # belong to the continuation, as in the harness
            continuation_ids = self.tok_encode(spaces + continuation)
        return context_ids or [self.prefix_token_id], continuation_ids

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        scored = [i for i, (_, _, continuation) in enumerate(requests) if continuation]
        rows, places, num_truncated = build_rows([requests[i][1:] for i in scored], self.max_length)
        self.num_requests += len(requests)
        self.num_truncated += num_truncated
        scores = self._shared.score(rows)
        results = [self._without_tokens(request[0]) for request in requests]
        for i, (row, k) in zip(scored, places, strict=True):
            results[i] = scores[row][k]
        return results

    def _without_tokens(self, pair: tuple[str, str] | None) -> tuple[float, bool]:
        """Score of a continuation without tokens: nothing is certain, text that the tokenizer drops is impossible."""
        return (0.0, True) if pair is None or not pair[1] else (-math.inf, False)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood in nats of whole texts, each after an end-of-document token.

        Longer texts are cut into windows that together predict each token once, as the harness's own backends do.
        """
        totals = []
        for request in requests:
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            pairs = [(None, *make_disjoint_window(window)) for window in windows]
            totals.append(sum(score for score, _ in self._loglikelihood_tokens(pairs)))
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return continuations up to a stop text.

        Prompts leave room for the new tokens; a model whose ``max_seq_len`` is below twice the asked number writes
        at most half of it.
        """
        texts: list[str] = []
        with self._bar(len(requests), disable_tqdm) as bar:
            for start in range(0, len(requests), SLAB):
                slab = requests[start : start + SLAB]
                texts += self._shared.generate([self._prompt(*request.args) for request in slab])
                bar.update(len(slab))
        return texts

    def _prompt(self, context: str, options: dict[str, Any]) -> Prompt:
        options = dict(normalize_gen_kwargs(options, DEFAULT_NEW_TOKENS))
        until = options.pop("until", [])
        num_new = min(int(options.pop("max_gen_toks")), max(self.max_length // 2, 1))
        sampling = Sampling(
            temperature=options.pop("temperature", 0.0),
            top_k=options.pop("top_k", None),
            top_p=options.pop("top_p", None),
        )
        if options.pop("do_sample") and sampling.temperature == 0:
            sampling = Sampling(1.0, sampling.top_k, sampling.top_p)
        if options:
            raise ConfigError(f"generation option {next(iter(options))} of a task is not supported; leave the task out")
        ids = self.tok_encode(context) or [self.prefix_token_id]
        self.num_requests += 1
        self.num_truncated += len(ids) > self.max_length - num_new
        return Prompt(np.asarray(ids[-(self.max_length - num_new) :], np.int32), num_new, tuple(until), sampling)

    def _bar(self, total: int, disable: bool) -> tqdm:
        return tqdm(
            total=total, unit=" requests", leave=False, disable=None if self._progress and not disable else True
        )


def build_rows(
    pairs: Sequence[tuple[list[int], list[int]]], max_length: int
) -> tuple[list[Row], list[tuple[int, int]], int]:
    """Turn (context, continuation) token lists into rows for the model.

    The last token of a continuation is predicted, never read, so continuations that differ in it alone share a row.

    Returns:
        (rows, for each pair its row and its place there, number of pairs that lost tokens to ``max_length``).

    Raises:
        DataError: a context or a continuation without tokens.
    """
    places: list[tuple[int, int]] = []
    inputs: list[np.ndarray] = []
    continuations: list[list[np.ndarray]] = []
    row_of: dict[bytes, int] = {}
    num_truncated = 0
    for context, continuation in pairs:
        if not context or not continuation:
            raise DataError(
                f"a request has {len(context)} context and {len(continuation)} continuation tokens, at least 1 of each "
                "is needed; check the documents of the task"
            )
        whole = np.asarray((context + continuation)[-(max_length + 1) :], np.int32)
        num_truncated += len(whole) < len(context) + len(continuation)
        key = whole[:-1].tobytes()
        if key not in row_of:
            row_of[key] = len(inputs)
            inputs.append(whole[:-1])
            continuations.append([])
        row = row_of[key]
        places.append((row, len(continuations[row])))
        continuations[row].append(whole[-min(len(continuation), len(whole) - 1) :])
    rows = [Row(ids, tuple(tokens)) for ids, tokens in zip(inputs, continuations, strict=True)]
    return rows, places, num_truncated
