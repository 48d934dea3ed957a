"""The special tokens of a folder of weights, as its ``config.json`` and the files of its tokenizer tell them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moepp.errors import CheckpointError
from moepp.io import untrusted
from moepp.io.untrusted import show

MAX_TOKENIZER_BYTES = 256 << 20  # as of moepp.data.tokenizer


@dataclass(frozen=True)
class TokenIds:
    """Special tokens; None: there is none, or which one it is is not known."""

    bos: int | None = 1
    eos: int | None = 2
    pad: int | None = None
    unused: tuple[int, ...] = ()  # ids that no token of the tokenizer has; they are never to be written
    document_end: int | None = None  # ended documents in training, if attention stayed within them; None: it did not


def read_token_ids(path: Path, tree: Mapping[str, Any], defaults: Mapping[str, int | None]) -> TokenIds:
    """Return the begin, end and padding tokens of a ``config.json``.

    Args:
        path: of the file; the tokenizer's files lie beside it.
        tree: its content.
        defaults: "bos", "eos", "pad" -> the id where the file has no such key.

    Raises:
        CheckpointError: what should be a token is none.
    """
    bos, eos, pad = (read_token_id(path, tree, name, defaults[name]) for name in ("bos", "eos", "pad"))
    return TokenIds(bos, eos, pad)


def read_token_id(path: Path, tree: Mapping[str, Any], name: str, default: int | None = None) -> int | None:
    """Return one special token, ``<name>_token_id``: an id, null, or a list of ids as transformers writes it.

    Of several listed ids the one counts that ``tokenizer_config.json`` names; where it names none of them, None.
    """
    ids = listed_ids(path, tree, name, default)
    if len(ids) < 2:
        return ids[0] if ids else None
    token = _named_token(path.parent, name)
    named = [token_id for token_id in ids if token is not None and token == _token(path.parent, token_id)]
    return named[0] if named else None


def listed_ids(path: Path, tree: Mapping[str, Any], name: str, default: int | None = None) -> list[int]:
    """Return all ids of ``<name>_token_id``, each once; errors as for :func:`read_token_ids`."""
    key = f"{name}_token_id"
    value = tree.get(key, default)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(token_id) is not int for token_id in ids):
        raise CheckpointError(
            f"{path}: {key}={show(value)} is no token id (an integer), nor a list of them; correct it"
        )
    return list(dict.fromkeys(ids))


def _named_token(folder: Path, name: str) -> str | None:
    settings = _read_object(folder / "tokenizer_config.json")
    token = settings.get(f"{name}_token")
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _token(folder: Path, token_id: int) -> str | None:
    """Return the token with this id, by tokenizer.json or, without that, tokenizer_config.json."""
    tree = _read_object(folder / "tokenizer.json")
    for added in _list(tree.get("added_tokens")):
        if isinstance(added, dict) and added.get("id") == token_id:
            return added.get("content")
    model = tree.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict):
        return next((token for token, its_id in vocabulary.items() if its_id == token_id), None)
    if isinstance(vocabulary, list) and 0 <= token_id < len(vocabulary):  # Unigram: [token, score]
        return next(iter(_list(vocabulary[token_id])), None)
    decoder = _read_object(folder / "tokenizer_config.json").get("added_tokens_decoder")
    added = decoder.get(str(token_id)) if isinstance(decoder, dict) else None
    return added.get("content") if isinstance(added, dict) else None


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _read_object(path: Path) -> dict[str, Any]:
    """Return a JSON object; an empty one where there is no file or no object."""
    if not path.is_file():
        return {}
    tree = untrusted.read_json(path, MAX_TOKENIZER_BYTES, CheckpointError, "copy the folder again")
    return tree if isinstance(tree, dict) else {}
