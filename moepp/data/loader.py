"""Batches as a pure function of (seed, step), whatever the number of ranks, micro-batches and restarts.

Shape suffixes: B sequences of one micro-batch of one replica, S sequence (tokens).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from moepp.config import Config, RunPlan
from moepp.data.check import held_out_batches
from moepp.data.corpora import Corpora
from moepp.data.indexed import SPLITS
from moepp.errors import DataError


class Data:
    """The batches of one replica: ranks that share its sequences (context, tensor, pipeline) read the same text.

    Sequences ``s * G .. (s + 1) * G - 1`` of the training stream make step ``s`` (steps count from 0, G is
    ``train.global_batch_size``). Micro-step ``a`` of A takes the a-th of A equal runs of them, and replica ``r`` of
    R the r-th of R equal runs of that. The loader has no state: resuming is asking for the next step.

    Attributes:
        num_sequences: whole sequences in one pass over 'train', 'valid' and 'test', all paths together.
        plan: of the run.
        vocab_size: of the tokenizer that made the data (``model.vocab_size`` where nothing tells it).
        eod: id of the end-of-document token, or None where nothing tells it.
    """

    def __init__(
        self,
        datasets: Mapping[str, Any | None],
        cfg: Config,
        plan: RunPlan,
        data_rank: int,
        *,
        num_sequences: Mapping[str, int],
        vocab_size: int,
        eod: int | None,
    ) -> None:
        self._datasets = datasets
        self._cfg = cfg
        self._data_rank = data_rank
        self.plan = plan
        self.num_sequences = num_sequences
        self.vocab_size = vocab_size
        self.eod = eod

    def train_batch(self, step: int, micro_step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return inputs and labels of this replica, int64 [B, S] on the CPU; labels are inputs one position ahead."""
        return self._batch("train", step, micro_step)

    def eval_batch(self, index: int, micro_step: int, name: str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """As :meth:`train_batch`, for global batch ``index`` below :func:`held_out_batches` of the validation split.

        With ``name`` it is one of ``train.eval_batches`` of that set of ``data.validation``. The same for every
        evaluation. Where there are fewer sequences than these global batches have, they start over in another order.

        Raises:
            DataError: the split has no whole sequence.
        """
        return self._batch("valid" if name is None else _key(name), index, micro_step)

    def epochs(self, batches: int) -> float:
        """Return how often the training split was read after so many global batches, all paths together."""
        return batches * self._cfg.train.global_batch_size / max(self.num_sequences["train"], 1)

    def _batch(self, split: str, step: int, micro_step: int) -> tuple[torch.Tensor, torch.Tensor]:
        dataset = self._datasets[split]
        if dataset is None:
            raise DataError(
                f"data.split={self._cfg.data.split} leaves some path without a whole sequence of "
                f"{self._cfg.data.seq_len} tokens for {split!r}; raise its share, or add documents"
            )
        plan = self.plan
        if not (step >= 0 and 0 <= micro_step < plan.accumulation_steps):
            raise IndexError(f"step {step}, micro-step {micro_step} of {plan.accumulation_steps}")
        first = step * self._cfg.train.global_batch_size
        first += (micro_step * plan.data_size + self._data_rank) * plan.micro_batch_size
        samples = [dataset[first + i] for i in range(plan.micro_batch_size)]
        self._require_token_ids(split, samples)
        return _stack([sample["tokens"] for sample in samples]), _stack([sample["labels"] for sample in samples])

    def _require_token_ids(self, split: str, samples: list[dict[str, Any]]) -> None:
        """Refuse ids that the model has no embedding for: a damaged .bin may be as long as it should be.

        Looked at by NumPy, in the thread that reads: on an accelerator such an id would end the process.
        """
        for sample in samples:
            for ids_S in (sample["tokens"].numpy(), sample["labels"].numpy()):
                low, high = int(ids_S.min()), int(ids_S.max())
                if low >= 0 and high < self._cfg.model.vocab_size:
                    continue
                paths = self._cfg.data.validation[split.removeprefix(_SET)] if split.startswith(_SET) else None
                path = (paths or self._cfg.data.paths)[int(sample.get("dataset_id", 0))]  # blends tell which
                error = DataError(
                    f"{path}.bin holds the token id {low if low < 0 else high}, and model.vocab_size is "
                    f"{self._cfg.model.vocab_size}; it is damaged: copy it again, or prepare it again"
                )
                error.said_here = True  # other ranks read other sequences
                raise error


_SET = "valid "


def _key(name: str) -> str:
    """Return how a set of ``data.validation`` is called among the splits."""
    return f"{_SET}{name}"


def _stack(rows: list[torch.Tensor]) -> torch.Tensor:
    """Stack as torch.stack, in the calling thread alone: torch would start threads beside those that train."""
    return torch.from_numpy(np.stack([row.numpy() for row in rows]))


def build_data(cfg: Config, plan: RunPlan, corpora: Corpora, data_rank: int, cache_dir: str | None) -> Data:
    """Return datasets and loader of one replica. Call it on all ranks.

    Args:
        data_rank: number of the replica.
        corpora: from :func:`moepp.data.check_data`.
        cache_dir: where rank 0 leaves dataset indices for the other ranks; None: each process builds its own in
            memory. Without torch.distributed they stay in memory in any case.

    Raises:
        DataError: an unusable cache.
    """
    from moepp.data.megatron import TokenizerIdentity, build_datasets

    files, vocabulary = corpora.files, corpora.vocabulary
    vocab_size, eod = vocabulary.size or cfg.model.vocab_size, vocabulary.eod_id
    batch = cfg.train.global_batch_size
    datasets = build_datasets(
        files,
        cfg.data,
        seed=cfg.run.seed,
        num_sequences=(plan.train_batches * batch, held_out_batches(cfg) * batch),
        tokenizer=TokenizerIdentity(vocab_size, eod if eod is not None else vocab_size - 1),
        cache_dir=cache_dir,
    )
    # Whole files are the training part of data without another part.
    parts = {
        name: build_datasets(
            of_set,
            replace(cfg.data, paths=cfg.data.validation[name], weights=None, split="1,0,0", validation={}),
            seed=cfg.run.seed,
            num_sequences=(cfg.train.eval_batches * batch, 0),
            tokenizer=TokenizerIdentity(vocab_size, eod if eod is not None else vocab_size - 1),
            cache_dir=cache_dir,
        )[0]
        for name, of_set in (corpora.validation.items() if cfg.train.eval_batches else ())
    }
    tokens = [file.split_tokens(cfg.data.split) for file in files]
    return Data(
        dict(zip(("train", "valid"), datasets, strict=True)) | {_key(name): part for name, part in parts.items()},
        cfg,
        plan,
        data_rank,
        num_sequences={
            split: sum(max(per_file[i] - 1, 0) // cfg.data.seq_len for per_file in tokens)
            for i, split in enumerate(SPLITS)
        },
        vocab_size=vocab_size,
        eod=eod,
    )
