"""Megatron-core's datasets with samples that do not depend on how many are asked for.

Import this module only where datasets are built: megatron-core takes its time to import.

GPTDataset shuffles over all the epochs that the requested number of samples needs, so a longer run would see other
batches from its first step on. :class:`EpochGPTDataset` instead shuffles each epoch by itself, from (seed, epoch):
sample i is then a pure function of (seed, i). Megatron's blend of several paths keeps that property, because it
picks the dataset of sample i greedily from the samples before it.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch

from moepp.config import DataConfig
from moepp.data.cache import building, cache_folder, explained
from moepp.data.indexed import SPLITS, IndexedFile
from moepp.data.megatron_core import import_lazily

with warnings.catch_warnings():  # it warns of CUDA-only extensions that datasets have no use for
    warnings.simplefilter("ignore")
    import_lazily()
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.megatron_dataset import MegatronDataset
    from megatron.core.datasets.utils import Split

_EXPLAINED = (OSError, ValueError, EOFError, MemoryError, OverflowError)
# Megatron warns when it keeps indices in memory, which is what a process without ranks wants.
logging.getLogger("megatron.core.datasets").setLevel(logging.ERROR)

# Indices of epochs up to this many sequences and documents are made again by each rank, in milliseconds and less than
# 1 MB, when the epoch begins. Indices of larger ones are stored, and take a mapped file three times over.
IN_MEMORY_ITEMS = 1 << 15


@dataclass(frozen=True)
class TokenizerIdentity:
    """The three things that Megatron's datasets ask of a tokenizer; ``unique_identifiers`` names their cache."""

    vocab_size: int
    eod: int

    @property
    def unique_identifiers(self) -> dict[str, Any]:
        return {"vocab_size": self.vocab_size, "eod": self.eod}


class EpochGPTDataset(MegatronDataset):
    """Consecutive epochs of a GPTDataset, each shuffled by itself (documents and sequences).

    Every epoch has ``sequences_per_epoch`` sequences; the tokens after the last whole one are left out, other ones
    in each epoch. ``num_samples`` only says how many epochs to prepare. Small epochs are prepared when they begin.
    """

    def __init__(
        self,
        indexed_dataset: IndexedDataset,
        dataset_path: str | None,
        indexed_indices: np.ndarray,
        num_samples: int | None,
        index_split: Split,
        config: GPTDatasetConfig,
    ) -> None:
        super().__init__(indexed_dataset, dataset_path, indexed_indices, num_samples, index_split, config)
        tokens = int(indexed_dataset.sequence_lengths[indexed_indices].sum(dtype=np.int64))
        self.sequences_per_epoch = (tokens - 1) // config.sequence_length
        self._num_epochs = -(-((num_samples or 0) + _margin(config, dataset_path)) // self.sequences_per_epoch)
        self._is_stored = max(self.sequences_per_epoch, len(indexed_indices)) > IN_MEMORY_ITEMS
        numbers = range(self._num_epochs) if self._is_stored else ()
        self._epochs = {epoch: self._build_epoch(epoch) for epoch in numbers}

    def _build_epoch(self, epoch: int) -> GPTDataset:
        config = _config_of_epoch(cast(GPTDatasetConfig, self.config), epoch)
        if not self._is_stored:
            config.path_to_cache = ""
        dataset = cast(IndexedDataset, self.dataset)
        return GPTDataset(dataset, self.dataset_path, self.indices, None, self.index_split, config)

    @staticmethod
    def numel_low_level_dataset(low_level_dataset: Any) -> int:
        return GPTDataset.numel_low_level_dataset(low_level_dataset)

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config: Any) -> IndexedDataset:
        return GPTDataset.build_low_level_dataset(dataset_path, config)

    def __len__(self) -> int:
        return self._num_epochs * self.sequences_per_epoch

    def __getitem__(self, idx: int) -> dict[str, torch.Tensor]:
        """Sequence ``idx``: 'tokens' and 'labels', int64 [S] each, labels one position ahead."""
        epoch, sequence = divmod(int(idx), self.sequences_per_epoch)
        if not 0 <= epoch < self._num_epochs:
            raise IndexError(f"sequence {idx} of {len(self)}")
        if epoch not in self._epochs:
            self._epochs = {epoch: self._build_epoch(epoch)}
        return self._epochs[epoch][sequence]


def build_datasets(
    files: Sequence[IndexedFile],
    data: DataConfig,
    *,
    seed: int,
    num_sequences: tuple[int, int],
    tokenizer: TokenizerIdentity,
    cache_dir: str | None,
) -> tuple[Any | None, ...]:
    """Training and validation datasets over ``files``.

    Call it on all ranks: Megatron has rank 0 write the indices into ``cache_dir`` and the others wait for them. A
    process without ranks keeps them in memory, where they take less time than writing them.

    Args:
        files: one per path; the splits of each are disjoint ranges of its documents.
        data: weights (None: by number of training tokens; the same in every split), split and sequence length.
        num_sequences: how many sequences of either split can be asked for.

    Returns:
        For either split a dataset of at least that length (items as of :class:`EpochGPTDataset`), or None where some
        path has no whole sequence for it.

    Raises:
        DataError: the cached indices cannot be read, or another run builds them for too long.
        WriteError: they cannot be written.
    """
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=data.seq_len,
        blend=_blend(files, data),
        split=",".join(f"{float(share):.12f}" for share in data.split.split(",")),  # Megatron does not read exponents
        path_to_cache=_cache_folder(files, cache_dir),
        tokenizer=tokenizer,  # pyright: ignore[reportArgumentType]  # duck-typed
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    assert config.split_matrix is not None  # follows from the blend
    matrix: list[Any] = list(config.split_matrix)
    for i, split in enumerate(SPLITS):
        if split == "test" or any(file.split_tokens(data.split)[i] <= data.seq_len for file in files):
            matrix[i] = None
    config.split_matrix = matrix
    folder = config.path_to_cache
    # Rank 0 locks before the barrier at which the other ranks wait for it.
    alone = building(folder) if folder and torch.distributed.get_rank() == 0 else contextlib.nullcontext()
    with alone:
        try:
            builder = BlendedMegatronDatasetBuilder(EpochGPTDataset, [*num_sequences, 0], lambda: True, config)
            return tuple(builder.build()[:2])
        except Exception as error:
            if not isinstance(error, _EXPLAINED) and type(error) is not Exception:
                raise
            raise explained(error, folder or "memory") from error


def _blend(files: Sequence[IndexedFile], data: DataConfig) -> tuple[list[str], list[float] | None]:
    prefixes = [os.path.abspath(file.prefix) for file in files]
    if len(files) == 1:
        return prefixes, None
    if data.weights is not None:
        return prefixes, list(data.weights)
    return prefixes, [float(file.split_tokens(data.split)[0]) for file in files]


def _cache_folder(files: Sequence[IndexedFile], cache_dir: str | None) -> str:
    """Return where the indices are kept; empty means in memory (None: beside the data)."""
    if cache_dir is None or not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return ""
    return cache_folder(files, cache_dir)


def _margin(config: GPTDatasetConfig, path: str | None) -> int:
    """Return how many sequences beyond its share the blend may take of a path.

    Megatron rounds the share of each of P paths up, so that the blend has up to P sequences more, and then picks the
    path that lacks most: with share w, a path gives up to w·P + 1 more than asked for.
    """
    if not config.blend or len(config.blend[0]) == 1:
        return 1
    prefixes, weights = config.blend
    assert weights is not None  # given by :func:`_blend`
    share = max(w for prefix, w in zip(prefixes, weights, strict=True) if prefix == path) / sum(weights)
    return math.ceil(share * len(prefixes)) + 1


def _config_of_epoch(config: GPTDatasetConfig, epoch: int) -> GPTDatasetConfig:
    config = copy.copy(config)
    # Mixed, not added: seed 1, epoch 1 must not be seed 2, epoch 0.
    config.random_seed = int(np.random.SeedSequence([config.random_seed, epoch]).generate_state(1)[0])
    return config
