"""Megatron-core's datasets with samples that do not depend on how many are asked for.

Import this module only where datasets are built: megatron-core takes seconds to import.

GPTDataset shuffles over all the epochs that the requested number of samples needs, so a longer run would see other
batches from its first step on. :class:`EpochGPTDataset` instead shuffles each epoch by itself, from (seed, epoch):
sample i is then a pure function of (seed, i). Megatron's blend of several paths keeps that property, because it
picks the dataset of sample i greedily from the samples before it.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from moepp.config import DataConfig
from moepp.data.cache import building, cache_folder, explained
from moepp.data.indexed import SPLITS, IndexedFile

with warnings.catch_warnings():  # it warns of CUDA-only extensions that datasets have no use for
    warnings.simplefilter("ignore")
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.megatron_dataset import MegatronDataset
    from megatron.core.datasets.utils import Split

# Megatron warns when it keeps indices in memory, which is what a process without ranks wants.
logging.getLogger("megatron.core.datasets").setLevel(logging.ERROR)


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
    in each epoch. ``num_samples`` only says how many epochs to prepare.
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
        # Megatron rounds each path's share up, and its greedy blend then takes up to one sample more than the share.
        margin = len(config.blend[0]) + 1 if config.blend else 1
        num_epochs = -(-((num_samples or 0) + margin) // self.sequences_per_epoch)
        self.epochs = [
            GPTDataset(
                indexed_dataset, dataset_path, indexed_indices, None, index_split, _config_of_epoch(config, epoch)
            )
            for epoch in range(num_epochs)
        ]

    @staticmethod
    def numel_low_level_dataset(low_level_dataset: Any) -> int:
        return GPTDataset.numel_low_level_dataset(low_level_dataset)

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config: Any) -> IndexedDataset:
        return GPTDataset.build_low_level_dataset(dataset_path, config)

    def __len__(self) -> int:
        return len(self.epochs) * self.sequences_per_epoch

    def __getitem__(self, idx: int) -> dict[str, torch.Tensor]:
        """Sequence ``idx``: 'tokens' and 'labels', int64 [S] each, labels one position ahead."""
        epoch, sequence = divmod(int(idx), self.sequences_per_epoch)
        return self.epochs[epoch][sequence]


def build_datasets(
    files: Sequence[IndexedFile],
    data: DataConfig,
    *,
    seed: int,
    num_sequences: tuple[int, int, int],
    tokenizer: TokenizerIdentity,
    cache_dir: str | None,
) -> tuple[Any | None, ...]:
    """Train, validation and test datasets over ``files``.

    Call it on all ranks: Megatron has rank 0 write the indices into ``cache_dir`` and the others wait for them. A
    process without ranks keeps them in memory, where they take less time than writing them.

    Args:
        files: one per path; the splits of each are disjoint ranges of its documents.
        data: weights (None: by number of training tokens; the same in every split), split and sequence length.
        num_sequences: how many sequences of each split can be asked for.

    Returns:
        For each split a dataset of at least that length (items as of :class:`EpochGPTDataset`), or None where some
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
    for i in range(len(SPLITS)):
        if any(file.split_tokens(data.split)[i] <= data.seq_len for file in files):
            matrix[i] = None
    config.split_matrix = matrix
    folder = config.path_to_cache
    # Rank 0 locks before the barrier at which the other ranks wait for it.
    alone = building(folder) if folder and torch.distributed.get_rank() == 0 else contextlib.nullcontext()
    with alone:
        try:
            builder = BlendedMegatronDatasetBuilder(EpochGPTDataset, list(num_sequences), lambda: True, config)
            return tuple(builder.build())
        except Exception as error:
            if not isinstance(error, OSError | ValueError | EOFError) and type(error) is not Exception:
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
    """Where the indices are kept; empty means in memory (None: beside the data)."""
    if cache_dir is None or not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return ""
    return cache_folder(files, cache_dir)


def _config_of_epoch(config: GPTDatasetConfig, epoch: int) -> GPTDatasetConfig:
    config = copy.copy(config)
    # Mixed, not added: seed 1, epoch 1 must not be seed 2, epoch 0.
    config.random_seed = int(np.random.SeedSequence([config.random_seed, epoch]).generate_state(1)[0])
    return config
