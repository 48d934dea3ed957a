"""Tokenising documents on several processes, in input order, with bounded memory.

This module imports neither torch nor the training code: every worker process imports it afresh.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moepp.data.prepare.losses import Losses, LossMeter, can_lose
from moepp.data.tokenizer_guard import no_panic, require_bounded
from moepp.errors import DataError, MoeppError
from moepp.io.untrusted import printable

# Batches that wait or are in work, per worker: enough that none idles, little enough to bound memory.
BATCHES_IN_FLIGHT_PER_WORKER = 3


@dataclass
class Batch:
    """Documents on their way through the tokenizer."""

    texts: list[str]
    inputs: list[int] = field(default_factory=list)  # number of the input file of each text
    bytes_read: int = 0


@dataclass
class Encoded:
    """Documents as token ids."""

    documents: list[np.ndarray]  # in order; nothing but the end-of-document token where no token was found
    losses: Losses


class Encoder:
    """Turns documents into arrays of token ids that end with the end-of-document token."""

    def __init__(self, tokenizer_json: str, eod_id: int, dtype: str, path: str) -> None:
        """Args: ``path`` of the tokenizer is for messages."""
        import tokenizers

        self._tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json)
        self._tokenizer.encode_special_tokens = True  # text that spells a special token stays text
        self._eod_id = eod_id
        self._dtype = np.dtype(dtype)
        self._path = path
        self._meter = LossMeter(self._tokenizer) if can_lose(tokenizer_json) else None

    def __call__(self, texts: list[str]) -> Encoded:
        """Raise DataError where the tokenizer fails on a text or makes absurdly many tokens of it."""
        # Offsets, which show what was lost, take about a third more time.
        needs_offsets = self._meter is not None and self._meter.needs_offsets
        encode = self._tokenizer.encode_batch if needs_offsets else self._tokenizer.encode_batch_fast
        with no_panic(self._path, silent=True):
            try:
                encodings = encode(texts, add_special_tokens=False)
                losses = self._losses(texts, encodings)
            except MoeppError:
                raise
            except Exception as error:  # the library raises a bare Exception, for example for a missing unknown token
                raise DataError(
                    f"tokenizer {printable(self._path)} cannot encode the text ({printable(error, 200)}); "
                    "give another tokenizer"
                ) from error
        documents = [np.array([*encoding.ids, self._eod_id], dtype=self._dtype) for encoding in encodings]
        return Encoded(documents, losses)

    def _losses(self, texts: list[str], encodings: list[Any]) -> Losses:
        losses = Losses()
        for text, encoding in zip(texts, encodings, strict=True):
            require_bounded(len(encoding), text, self._path)
            if self._meter is not None:
                losses.add(self._meter(text, encoding))
        return losses


def encode_documents(
    batches: Iterable[Batch], encoder_arguments: tuple[str, int, str, str], workers: int
) -> Iterator[tuple[Encoded, Batch]]:
    """Encode ``batches`` in order; the result does not depend on ``workers``.

    Args:
        encoder_arguments: of :class:`Encoder`.
        workers: processes; 1 encodes in this process.
    """
    if workers == 1:
        encoder = Encoder(*encoder_arguments)
        for batch in batches:
            yield encoder(batch.texts), batch
        return
    # spawn: forking a process in which the tokenizers or torch already run threads can deadlock.
    pool = concurrent.futures.ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=encoder_arguments
    )
    waiting: deque[tuple[concurrent.futures.Future[Encoded], Batch]] = deque()
    try:
        for batch in batches:
            waiting.append((pool.submit(_encode, batch.texts), batch))
            if len(waiting) >= workers * BATCHES_IN_FLIGHT_PER_WORKER:
                future, batch = waiting.popleft()
                yield future.result(), batch
        while waiting:
            future, batch = waiting.popleft()
            yield future.result(), batch
    finally:
        pool.shutdown(cancel_futures=True)


_encoder: Encoder | None = None  # of a worker process


def _start_worker(*encoder_arguments: str | int) -> None:
    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the work
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    _encoder = Encoder(*encoder_arguments)  # pyright: ignore[reportArgumentType]


def _exit_with_parent() -> None:
    """End with the parent: workers of a killed one would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode(texts: list[str]) -> Encoded:
    assert _encoder is not None  # _start_worker ran first
    return _encoder(texts)
