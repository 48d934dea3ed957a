"""The order of documents: shuffling, and whether validation and test see more than one input.

Shape suffixes: N documents.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from moepp.data.indexed import SPLITS, split_bounds
from moepp.io.untrusted import printable

UNKNOWN_INPUT = -1  # of documents that were prepared before, from several files


def shuffled(num_documents: int, seed: int, first: int = 0) -> np.ndarray:
    """Return a permutation of documents ``first`` to ``num_documents`` that depends on their number and ``seed`` alone.

    The documents before ``first``, which were there already, keep their places.
    """
    order_N = np.arange(num_documents, dtype=np.int64)
    order_N[first:] = first + np.random.default_rng(seed).permutation(num_documents - first)
    return order_N


def reorder(bin_path: str, lengths_N: np.ndarray, order_N: np.ndarray, dtype: np.dtype) -> None:
    """Rewrite a .bin so that document ``order_N[i]`` comes i-th. Needs its size once more on the disk, not in memory.

    Args:
        lengths_N: tokens of each document, in the order before.
    """
    starts_N = np.cumsum(lengths_N, dtype=np.int64) - lengths_N
    tokens_T = np.memmap(bin_path, dtype=dtype, mode="r")
    with open(f"{bin_path}.shuffled", "wb") as stream:
        for i in order_N.tolist():
            stream.write(tokens_T[starts_N[i] : starts_N[i] + lengths_N[i]].tobytes())
    os.replace(f"{bin_path}.shuffled", bin_path)


def one_sided_splits(inputs_N: np.ndarray, names: Sequence[str], split: str) -> list[str]:
    """Warnings about validation and test where all their documents, two or more, are of one input among several.

    Args:
        inputs_N: number of the input of each document, in the final order.
        names: of the inputs.
        split: as data.split.
    """
    if len(inputs_N) == 0 or np.all(inputs_N == inputs_N[0]):
        return []
    warnings = []
    for part, (begin, end) in list(zip(SPLITS, split_bounds(split, len(inputs_N)), strict=True))[1:]:
        one = end - begin >= 2 and inputs_N[begin] != UNKNOWN_INPUT
        if one and np.all(inputs_N[begin:end] == inputs_N[begin]):
            warnings.append(
                f"with data.split={split}, all {end - begin:,} documents of {part} are of one input, "
                f"{printable(names[int(inputs_N[begin])])}; give --shuffle SEED to mix the documents"
            )
    return warnings
