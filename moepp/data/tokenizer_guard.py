"""What a tokenizer.json can do to the process that loads it, and what is done about it.

The tokenizers library panics on some malformed files (an exception of class PanicException, which is no Exception),
may end the process on others, and follows a normalizer that makes ten million characters out of one. Tokenizers come
from the same places as text, so all of that ends in one line.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from moepp.errors import DataError
from moepp.io.temporary import unnamed_file
from moepp.io.untrusted import printable

# Bounds on a normalizer and a decoder: those of published tokenizers replace one character by one to three, and prepend
# one.
MAX_GROWTH = 64
MAX_INSERTED = 1_000  # characters, also of each text that they look for or put in
_TEXTS = ("content", "prefix", "suffix", "replacement", "pad_token", "word_delimiter_token")
MAX_TOKEN_CHARACTERS = 10_000  # runs of blanks are the longest tokens of published ones, with some hundred
# Bound on tokens: a character has at most 4 bytes, and compatibility forms (NFKC) unfold to at most 18 characters.
MAX_TOKENS_PER_CHARACTER = 72
PROBE_SECONDS = 60
_PROBE = """
import sys, tokenizers
tokenizer = tokenizers.Tokenizer.from_str(sys.stdin.read())
tokenizer.to_str()
for start in range(0, 0x10000, 0x800):
    characters = [chr(code) for code in range(start, start + 0x800) if not 0xD800 <= code < 0xE000]
    tokenizer.normalizer.normalize_str(" ".join(characters))
    tokenizer.normalizer.normalize_str("".join(characters))
"""


@contextlib.contextmanager
def no_panic(path: str, silent: bool = False) -> Iterator[None]:
    """Turn a panic of the tokenizers library into a DataError.

    Args:
        path: of the tokenizer, for the message.
        silent: keep what the library writes to stderr then from appearing. It works on the whole process: for the
            commands that do nothing else meanwhile.

    Raises:
        DataError: the library panicked.
    """
    with _held_back_stderr() if silent else contextlib.nullcontext():
        try:
            yield
        except BaseException as error:
            if type(error).__name__ != "PanicException":
                raise
            raise DataError(
                f"the tokenizers library fails on tokenizer {printable(path)} ({printable(error, 200)}); "
                "give another tokenizer"
            ) from None


@contextlib.contextmanager
def _held_back_stderr() -> Iterator[None]:
    """Hold back what native code writes to stderr; it is shown unless a panic explains it."""
    held = unnamed_file()
    try:
        saved = os.dup(2)
    except OSError:  # a process without stderr
        held = None
    if held is None:
        yield
        return
    sys.stderr.flush()
    with held:
        os.dup2(held.fileno(), 2)
        panicked = False
        try:
            yield
        except BaseException as error:
            panicked = type(error).__name__ == "PanicException" or isinstance(error, DataError)
            raise
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            held.seek(0)
            if not panicked and (text := held.read()):
                os.write(2, text)


def require_safe(tree: Any, text: str, path: str) -> None:
    """Refuse a tokenizer.json that unfolds text beyond bounds or cannot be loaded without ending the process.

    Args:
        tree: the parsed file.
        text: the file.

    Raises:
        DataError: it is one of those.
    """
    if not isinstance(tree, dict):
        raise DataError(
            f"tokenizer {printable(path)} holds no JSON object; give a tokenizer.json of the tokenizers library"
        )
    steps = list(_steps(tree.get("normalizer"), "normalizers"))
    _require_growth(steps, "normalizer", path)
    _require_growth(list(_steps(tree.get("decoder"), "decoders")), "decoder", path)
    longest = max(map(len, _tokens(tree)), default=0)
    if longest > MAX_TOKEN_CHARACTERS:
        raise DataError(
            f"tokenizer {printable(path)} has a token of {longest:,} characters, more than {MAX_TOKEN_CHARACTERS:,}; "
            "give another tokenizer"
        )
    if any(step.get("type") == "Precompiled" for step in steps):
        _probe(text, path)


def _require_growth(steps: list[dict[str, Any]], what: str, path: str) -> None:
    """Refuse steps that together make a text, or a token, longer beyond bounds."""
    growth, inserted = 1.0, 0
    for step in steps:
        growth *= _growth(step)
        if step.get("type") == "Prepend":
            inserted = inserted * growth + len(str(step.get("prepend", "")))
        inserted = max(inserted, *(len(str(step.get(key, ""))) for key in _TEXTS))
    if growth > MAX_GROWTH or inserted > MAX_INSERTED:
        longer = f"up to {growth:,.0f} times" if growth > MAX_GROWTH else f"by {inserted:,.0f} characters"
        raise DataError(f"tokenizer {printable(path)} makes a text longer {longer}; mend its {what}")


def _tokens(tree: dict[str, Any]) -> Iterator[str]:
    """Yield the texts of all tokens, wherever models keep them."""
    model, added = tree.get("model"), tree.get("added_tokens")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, dict):
        yield from vocab
    scored = [entry[0] for entry in vocab if isinstance(entry, list) and entry] if isinstance(vocab, list) else []
    contents = [entry.get("content") for entry in added if isinstance(entry, dict)] if isinstance(added, list) else []
    yield from (text for text in [*scored, *contents] if isinstance(text, str))


def require_bounded(num_tokens: int, text: str, path: str) -> None:
    """Refuse a document of more tokens than text can have.

    Raises:
        DataError: more than ``MAX_TOKENS_PER_CHARACTER`` for each character.
    """
    if num_tokens > MAX_TOKENS_PER_CHARACTER * len(text) + MAX_INSERTED * 4:
        raise DataError(
            f"tokenizer {printable(path)} makes {num_tokens:,} tokens out of {len(text):,} characters; "
            "give another tokenizer"
        )


def _steps(part: Any, inner: str) -> Iterator[dict[str, Any]]:
    """Yield the steps of a normalizer or decoder in order. The JSON reader bounds the nesting."""
    if isinstance(part, dict):
        if part.get("type") == "Sequence" and isinstance(part.get(inner), list):
            for step in part[inner]:
                yield from _steps(step, inner)
        else:
            yield part


def _growth(step: dict[str, Any]) -> float:
    """Return how much longer a step can make a text."""
    if step.get("type") in ("BPEDecoder", "CTC"):  # a blank for each of these; nothing is between any two characters
        return 2.0 if "" in (step.get("suffix"), step.get("word_delimiter_token")) else 1.0
    if step.get("type") != "Replace":
        return 1.0
    content = len(str(step.get("content", "")))
    pattern = step.get("pattern")
    literal = pattern.get("String") if isinstance(pattern, dict) else None
    if isinstance(literal, str) and literal:
        return max(1.0, content / len(literal))
    return max(1.0, content + (content > 1))  # an expression may match nothing, between any two characters


def _probe(text: str, path: str) -> None:
    """Load the tokenizer in another process: a bad table of characters can end it."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE],
            input=text.encode("utf-8", "surrogatepass"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=PROBE_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise DataError(
            f"tokenizer {printable(path)} takes more than {PROBE_SECONDS} s to normalise every character; "
            "give another tokenizer"
        ) from error
    if done.returncode != 0:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {done.returncode}"]
        raise DataError(
            f"the tokenizers library fails on tokenizer {printable(path)} ({printable(lines[-1], 200)}); "
            "its table of characters (precompiled_charsmap) is damaged: fetch it again"
        )
