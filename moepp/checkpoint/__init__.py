"""Checkpoints on torch.distributed.checkpoint: atomic, verified, asynchronous, loadable in any layout."""

from moepp.checkpoint.format import CheckpointInfo, list_checkpoints, read_info, verify
from moepp.checkpoint.info import RunState, SavedLayout
from moepp.checkpoint.resume import choose_checkpoint, continues_same_data, newest_checkpoint
from moepp.checkpoint.saver import Checkpointer
from moepp.checkpoint.state import load_model, load_training_state

__all__ = [
    "CheckpointInfo",
    "Checkpointer",
    "RunState",
    "SavedLayout",
    "choose_checkpoint",
    "continues_same_data",
    "list_checkpoints",
    "load_model",
    "load_training_state",
    "newest_checkpoint",
    "read_info",
    "verify",
]
