"""The released MoE++ checkpoint format, both ways: import into this project's model and export from it."""

from moepp.interop.official.config import read_config
from moepp.interop.official.load import check_folder, load_into, load_pretrained
from moepp.interop.official.model import OfficialModel, OfficialOutput
from moepp.interop.official.save import save_pretrained
from moepp.interop.token_ids import TokenIds

__all__ = [
    "OfficialModel",
    "OfficialOutput",
    "TokenIds",
    "check_folder",
    "load_into",
    "load_pretrained",
    "read_config",
    "save_pretrained",
]
