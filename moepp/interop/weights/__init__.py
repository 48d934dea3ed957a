"""Weights in files: folders of tensors, and which tensor of a folder goes where in the model."""

from moepp.interop.weights.agree import require_agreement
from moepp.interop.weights.bounds import require_room
from moepp.interop.weights.files import TensorFolder, weight_bytes
from moepp.interop.weights.folder_format import FolderFormat
from moepp.interop.weights.pieces import Piece, check_keys, copy_pieces, whole_parameters
from moepp.interop.weights.write import write_tensors

__all__ = [
    "FolderFormat",
    "Piece",
    "TensorFolder",
    "check_keys",
    "copy_pieces",
    "require_agreement",
    "require_room",
    "weight_bytes",
    "whole_parameters",
    "write_tensors",
]
