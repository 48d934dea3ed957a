"""Which tensor of a folder fills which part of a parameter of :class:`moepp.model.Transformer`.

Letters: E FFN experts of the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from moepp.config import ModelConfig
from moepp.distributed.parameters import is_expert_parameter, tensor_dim
from moepp.errors import CheckpointError
from moepp.interop.weights.files import TensorFolder
from moepp.io.untrusted import printable
from moepp.model import Transformer

_SHOWN_KEYS = 40


@dataclass(frozen=True)
class Piece:
    """``parameter[target]`` is the tensor ``key``, or ``tensor[row]``.

    Where a parameter is stacked over FFN experts (E of them in the whole model), ``target`` starts with the expert's
    number in the whole model.
    """

    key: str
    shape: tuple[int, ...]  # of the whole tensor in the file
    target: tuple[int | slice, ...] = ()  # (): the whole parameter
    row: int | None = None  # of the tensor in the file


PiecesOf = Callable[[str, tuple[int, ...]], list[Piece]]
"""(parameter name, its shape in the whole model) -> its pieces; an empty list where the file has none of it."""


def whole_parameters(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter of the whole model, by name."""
    with torch.device("meta"):
        model = Transformer(cfg)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def check_keys(folder: TensorFolder, pieces: Iterable[Piece], ignore: Callable[[str], bool] | None = None) -> None:
    """Compare a folder with what a model needs: every tensor there, nothing else, all of the right shape.

    Args:
        ignore: keys of the folder that nobody needs.

    Raises:
        CheckpointError: lists the missing, the unexpected and the mis-shaped tensors.
    """
    expected = {piece.key: piece.shape for piece in pieces}
    missing = [key for key in expected if key not in folder.shapes]
    unexpected = [key for key in folder.shapes if key not in expected and not (ignore is not None and ignore(key))]
    misshaped = [
        f"{printable(key, 100)} is {list(folder.shapes[key])} instead of {list(shape)}"
        for key, shape in expected.items()
        if key in folder.shapes and folder.shapes[key] != shape
    ]
    problems = [
        f"{len(keys)} {what} ({_listed(keys)})"
        for what, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshaped))
        if keys
    ]
    if problems:
        raise CheckpointError(
            f"{folder.path}: the tensors do not fit config.json: {'; '.join(problems)}; "
            "copy the whole folder again, or correct its config.json"
        )


@torch.no_grad()
def copy_pieces(
    model: Transformer, folder: TensorFolder, pieces_of: PiecesOf, ep_rank: int = 0, ep_size: int = 1
) -> None:
    """Fill the parameters of ``model`` in place, cast to their dtype; reads only the experts that it holds.

    Args:
        model: rank ``ep_rank`` of ``ep_size`` holds the experts [ep_rank E / ep_size, (ep_rank + 1) E / ep_size), and
            a tensor-parallel rank its heads.
    """
    for name, parameter in model.named_parameters():
        dim = tensor_dim(name) if model.sequence.tensor_size > 1 else None
        if dim is not None:
            _copy_part(model, parameter, dim, folder, lambda shape, name=name: pieces_of(name, shape))
            continue
        shape = tuple(parameter.shape)
        stacked = is_expert_parameter(name)
        if stacked:
            shape = (shape[0] * ep_size, *shape[1:])
        first = ep_rank * parameter.shape[0] if stacked else 0
        for piece in pieces_of(name, shape):
            target = piece.target
            if stacked:
                expert = target[0]
                assert isinstance(expert, int)
                if not first <= expert < first + parameter.shape[0]:
                    continue
                target = (expert - first, *target[1:])
            _view(parameter, target).copy_(folder.read(piece.key, piece.row))


def _copy_part(
    model: Transformer,
    parameter: Tensor,
    dim: int,
    folder: TensorFolder,
    pieces_of: Callable[[tuple[int, ...]], list[Piece]],
) -> None:
    """Fill the rank's part of a parameter that tensor parallelism cuts along ``dim``; reads the whole of it."""
    count, index = model.sequence.tensor_size, model.sequence.tensor_rank
    shape = tuple(size * count if i == dim else size for i, size in enumerate(parameter.shape))
    whole = torch.empty(shape, dtype=parameter.dtype)
    for piece in pieces_of(shape):
        _view(whole, piece.target).copy_(folder.read(piece.key, piece.row))
    parameter.copy_(whole.chunk(count, dim)[index])


def _view(parameter: Tensor, target: tuple[int | slice, ...]) -> Tensor:
    return parameter[target] if target else parameter


def _listed(keys: list[str]) -> str:
    more = len(keys) - _SHOWN_KEYS
    return ", ".join(printable(key) for key in keys[:_SHOWN_KEYS]) + (f" and {more} more" if more > 0 else "")
