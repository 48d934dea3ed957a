"""The project's own Hugging Face format: every model that it can train, with code that transformers can run."""

from moepp.interop.hf.config import MODEL_TYPE, read_config, read_document_end
from moepp.interop.hf.load import check_folder, load_into
from moepp.interop.hf.save import save_pretrained, write_hf

__all__ = ["MODEL_TYPE", "check_folder", "load_into", "read_config", "read_document_end", "save_pretrained", "write_hf"]
