"""Weights in files: folders of tensors, and which tensor of a folder goes where in the model."""

from moepp.weights.agree import require_agreement
from moepp.weights.bounds import require_room
from moepp.weights.files import TensorFolder, weight_bytes
from moepp.weights.pieces import Piece, check_keys, copy_pieces, whole_parameters
from moepp.weights.write import write_tensors

__all__ = [
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
