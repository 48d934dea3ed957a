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

import numpy as np

# Batches that wait or are in work, per worker: enough that none idles, little enough to bound memory.
BATCHES_IN_FLIGHT_PER_WORKER = 3


class Encoder:
    """Turns documents into arrays of token ids that end with the end-of-document token."""

    def __init__(self, tokenizer_json: str, eod_id: int, dtype: str) -> None:
        import tokenizers

        self._tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json)
        self._tokenizer.encode_special_tokens = True  # text that spells a special token stays text
        self._eod_id = eod_id
        self._dtype = np.dtype(dtype)

    def __call__(self, texts: list[str]) -> list[np.ndarray]:
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array([*encoding.ids, self._eod_id], dtype=self._dtype) for encoding in encodings]


def encode_documents(
    batches: Iterable[tuple[list[str], int]], encoder_arguments: tuple[str, int, str], workers: int
) -> Iterator[tuple[list[np.ndarray], int]]:
    """Encode ``batches`` of (texts, bytes read) in order; the result does not depend on ``workers``.

    Args:
        encoder_arguments: of :class:`Encoder`.
        workers: processes; 1 encodes in this process.
    """
    if workers == 1:
        encoder = Encoder(*encoder_arguments)
        for texts, bytes_read in batches:
            yield encoder(texts), bytes_read
        return
    # spawn: forking a process in which the tokenizers or torch already run threads can deadlock.
    pool = concurrent.futures.ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=encoder_arguments
    )
    waiting: deque[tuple[concurrent.futures.Future[list[np.ndarray]], int]] = deque()
    try:
        for texts, bytes_read in batches:
            waiting.append((pool.submit(_encode, texts), bytes_read))
            if len(waiting) >= workers * BATCHES_IN_FLIGHT_PER_WORKER:
                future, done = waiting.popleft()
                yield future.result(), done
        while waiting:
            future, done = waiting.popleft()
            yield future.result(), done
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
    """A killed parent must not leave workers behind, which would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode(texts: list[str]) -> list[np.ndarray]:
    assert _encoder is not None  # _start_worker ran first
    return _encoder(texts)
