"""Formats of folders that hold a whole model: opening, comparing and reading them is the same for all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from moepp.config import ModelConfig
from moepp.errors import CheckpointError
from moepp.interop.weights.agree import require_agreement
from moepp.interop.weights.bounds import require_room
from moepp.interop.weights.files import TensorFolder, weight_bytes
from moepp.interop.weights.pieces import Piece, PiecesOf, check_keys, copy_pieces, whole_parameters
from moepp.model import Transformer

EMBEDDING, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class FolderFormat:
    """A format with a ``config.json`` and files of tensors.

    Attributes:
        read_config: the model that a folder's ``config.json`` describes.
        pieces_of: the tensors that fill a parameter: (its name, its shape in the whole model, the model).
        repeats_tied: whether a tied model's folder may hold the one matrix under both names, as pickled ones do.
    """

    read_config: Callable[[str | Path], ModelConfig]
    pieces_of: Callable[[str, tuple[int, ...], ModelConfig], list[Piece]]
    repeats_tied: bool = False

    def check_folder(self, folder: str | Path, cfg: ModelConfig) -> TensorFolder:
        """Open a folder whose weights fit a run's model; errors as for :meth:`load_into`."""
        source = self.read_config(folder)
        require_agreement(cfg, source, folder)
        return self.open_tensors(folder, source)

    def open_tensors(self, folder: str | Path, cfg: ModelConfig) -> TensorFolder:
        """Return the folder's tensors, after comparing their names and shapes with the configuration."""
        tensors = TensorFolder(folder)
        require_room(cfg, weight_bytes(tensors.path), tensors.path / "config.json")
        ignored = {LM_HEAD} if self.repeats_tied and cfg.tie_embeddings else set()
        check_keys(tensors, all_pieces(cfg, self._pieces(cfg)), ignored.__contains__)
        if ignored:
            require_one_embedding(
                tensors,
                f"config.json says tie_word_embeddings=true but {LM_HEAD} differs from {EMBEDDING}; "
                "set tie_word_embeddings=false",
            )
        return tensors

    def load_into(self, model: Transformer, folder: str | Path, ep_rank: int = 0, ep_size: int = 1) -> None:
        """Copy a folder's weights into a model that may be sharded; no rank reads other ranks' experts.

        Args:
            model: with memory, any dtype and device; rank ``ep_rank`` of ``ep_size``.
            folder: in this format.
            ep_rank: which share of the experts the model holds.
            ep_size: into how many the experts are divided.

        Raises:
            CheckpointError: another format, damaged files, missing, unexpected or mis-shaped tensors, or a model of
                another shape.
        """
        self.copy(model, self.check_folder(folder, model.cfg), ep_rank, ep_size)

    def copy(self, model: Transformer, tensors: TensorFolder, ep_rank: int = 0, ep_size: int = 1) -> None:
        """Fill a model from tensors that fit it; arguments as of :meth:`load_into`."""
        copy_pieces(model, tensors, self._pieces(model.cfg), ep_rank, ep_size)

    def _pieces(self, cfg: ModelConfig) -> PiecesOf:
        return lambda name, shape: self.pieces_of(name, shape, cfg)


def all_pieces(cfg: ModelConfig, pieces_of: PiecesOf) -> list[Piece]:
    """Return the tensors that fill the whole model."""
    return [piece for name, shape in whole_parameters(cfg).items() for piece in pieces_of(name, shape)]


def require_one_embedding(tensors: TensorFolder, problem: str) -> None:
    """Refuse a tied model's folder with an output matrix that is not the embedding; ``problem`` says what to do.

    Raises:
        CheckpointError: the two differ.
    """
    if LM_HEAD in tensors.shapes and not torch.equal(tensors.read(LM_HEAD), tensors.read(EMBEDDING)):
        raise CheckpointError(f"{tensors.path}: {problem}")
