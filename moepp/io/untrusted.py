"""Files that somebody else may have made: read within limits, parsed without surprises, shown without harm.

Whatever a file brings along ends in a value or in one :class:`~moepp.errors.MoeppError` of one line; text of a file
goes through :func:`show` or :func:`printable` before it reaches a terminal.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import reprlib
import stat
from io import BufferedIOBase, BufferedReader
from pathlib import Path
from typing import IO, Any, NoReturn

from moepp.errors import DataError, MoeppError

MAX_JSON_BYTES = 64 << 20
MAX_JSON_DEPTH = 100
MAX_YAML_BYTES = 4 << 20
OUT_OF_MEMORY = "it does not fit into memory"
_PIECE_BYTES = 1 << 20
MAX_INTEGER = (1 << 64) - 1  # of YAML, by size: seeds go so far
MAX_DIGITS = 40  # of an integer; tokenizer_config.json has some of 31
_COMMANDS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def show(value: object, limit: int = 60) -> str:
    r"""Return a value of a file, quoted as Python does, for a message: at most ``limit`` characters, on one line.

    Control characters, terminal escapes, line ends, marks that turn the direction of text and everything else that
    cannot be printed appear as escapes such as ``\x1b``.
    """
    if isinstance(value, str | bytes):
        shortened = value[: limit + 1]  # escapes only make it longer
        text = repr(shortened)
        return text if len(text) <= limit and len(shortened) == len(value) else _shorten(text, limit - 1) + text[-1]
    try:
        text = _short_repr(limit).repr(value)
    except Exception:  # integers beyond the limit of digits, a value whose repr fails
        text = f"a {type(value).__name__}"
    return printable(text, limit)


def printable(text: object, limit: int = 400) -> str:
    """Return text of a file or a library for a message: one line, no quotes, no terminal controls."""
    source = str(text)
    cut = " ".join(source[: 2 * limit].splitlines()).replace("\t", " ")
    escaped = "".join(c if c.isprintable() else repr(c)[1:-1] for c in cut)
    return escaped if len(escaped) <= limit and len(source) <= 2 * limit else _shorten(escaped, limit)


def terminal_text(text: str) -> str:
    """Return text with its lines, and terminal controls as escapes.

    These are control characters except line ends and tabs, halves of surrogate pairs, and the marks that override or
    isolate the direction of text. Unlike :func:`printable` it leaves what some scripts need between letters.
    """
    return _COMMANDS.sub(lambda match: repr(match[0])[1:-1], text)


def _shorten(text: str, limit: int) -> str:
    return text[: max(limit - 3, 0)] + "..."


def _short_repr(limit: int) -> reprlib.Repr:
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = limit
    return short


def why_no_file(path: str | Path) -> str:
    """Say what keeps a path from being a file that can be read, as the end of a sentence: "does not exist"."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return "is a symbolic link that leads nowhere" if os.path.islink(path) else "does not exist"
    except (OSError, ValueError) as problem:  # links that lead to themselves, folders that may not be entered, a NUL
        return f"cannot be reached ({printable(getattr(problem, 'strerror', None) or problem)})"
    return "is a folder" if stat.S_ISDIR(mode) else "is no file, but a pipe or a device"


def open_regular(path: str | Path) -> BufferedReader:
    """Open a regular file for reading; links are followed, pipes and devices refused, without waiting for anything.

    For a part of a file, or one of any size. Read pieces: ``read(n)`` takes ``n`` bytes of memory before it looks.

    Raises:
        OSError: missing, unreadable, or no regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file", str(path))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_part(path: str | Path, most_bytes: int, from_end: bool = False) -> bytes:
    """Return the beginning of a file, or its end; errors as of :func:`open_regular`."""
    with open_regular(path) as stream:
        if from_end:
            stream.seek(max(0, os.fstat(stream.fileno()).st_size - most_bytes))
        return stream.read(most_bytes)


def read_up_to(stream: IO[bytes] | BufferedIOBase, limit_bytes: int, expected_bytes: int = 0) -> bytes | None:
    """Return what is left of a stream; None if it is more than ``limit_bytes``. Takes memory for what is there only.

    ``expected_bytes`` are read at once, and so are in memory once.
    """
    parts, left, piece = [], limit_bytes + 1, expected_bytes + 1
    while left and (part := stream.read(min(left, piece))):
        parts.append(part)
        left, piece = left - len(part), _PIECE_BYTES
    return b"".join(parts) if left else None


def read_bytes(
    path: Path, limit_bytes: int, error: type[MoeppError] = DataError, remedy: str = "give another file"
) -> bytes:
    """Return a regular file's content, at most ``limit_bytes``; links are followed, pipes and devices refused.

    Raises:
        error: missing, unreadable, no regular file, or larger.
    """
    data = None
    try:
        with open_regular(path) as stream:
            size = os.fstat(stream.fileno()).st_size
            data = read_up_to(stream, limit_bytes, size) if size <= limit_bytes else None
        reason = f"it is larger than {limit_bytes:,} bytes"
    except OSError as problem:
        reason = problem.strerror or str(problem)
    except MemoryError:
        reason = OUT_OF_MEMORY
    except ValueError as problem:  # a NUL in the path
        reason = str(problem)
    if data is None:
        raise error(f"cannot read {printable(path)}: {printable(reason)}; {remedy}")
    return data


def read_text(
    path: Path, limit_bytes: int, error: type[MoeppError] = DataError, remedy: str = "give another file"
) -> str:
    """As :func:`read_bytes`, in UTF-8; a byte order mark at the start is no part of the text."""
    try:
        return read_bytes(path, limit_bytes, error, remedy).decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise error(f"{printable(path)} is not UTF-8 text ({printable(problem)}); {remedy}") from problem


def read_json(
    path: Path,
    limit_bytes: int = MAX_JSON_BYTES,
    error: type[MoeppError] = DataError,
    remedy: str = "give another file",
) -> Any:
    """Return the value in a JSON file; see :func:`read_bytes` (the file) and :func:`load_json` (what is refused)."""
    return load_json(read_bytes(path, limit_bytes, error, remedy), path, error, remedy)


def load_json(
    text: str | bytes, where: object, error: type[MoeppError] = DataError, remedy: str = "give another file"
) -> Any:
    """Return the value of a JSON text.

    Refused are bad syntax and bad UTF-8, NaN and infinite numbers (1e999 too), integers of more than
    :data:`MAX_DIGITS` digits, more than :data:`MAX_JSON_DEPTH` nested values, a key twice in one object, halves of
    surrogate pairs, and what does not fit into memory.

    Args:
        text: JSON; bytes in UTF-8.
        where: what the message calls the text, such as its path or "PATH line 7".
        error: class of the error.
        remedy: end of its message.

    Raises:
        error: the text is refused; caused by MemoryError where it is not the text's fault.
    """
    cause = None
    try:
        source = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        value = _DECODER.decode(source)
        _require_shallow(value, source)
        if _SURROGATE.search(source):
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeEncodeError:
        reason = "a \\u escape is half of a surrogate pair"
    except (RecursionError, _TooDeep):
        reason = f"more than {MAX_JSON_DEPTH} values inside one another"
    except MemoryError:
        reason, cause = OUT_OF_MEMORY, MemoryError()
    except ValueError as problem:  # bad syntax, bad UTF-8, and what the hooks below refuse
        reason = printable(problem, 200)
    raise error(f"{printable(where)} is not valid JSON: {reason}; {remedy}") from cause


def read_yaml(path: Path, error: type[MoeppError] = DataError, remedy: str = "give another file") -> Any:
    """Return the value of a small YAML file of plain values; see :func:`load_yaml` and :func:`read_bytes`."""
    return load_yaml(read_text(path, MAX_YAML_BYTES, error, remedy), path, error, remedy)


def load_yaml(text: str, where: object, error: type[MoeppError] = DataError, remedy: str = "give another file") -> Any:
    """Return the value of a YAML text. No interpolation is resolved in it: ``${oc.env:HOME}`` stays this text.

    Refused are bad syntax, tags of Python objects, references to anchors (a few lines of which expand to any amount
    of memory), integers beyond 64 bits, what JSON does not know (sets, dates, bytes, ordered mappings; keys that are
    mappings or lists), and more than :data:`MAX_JSON_DEPTH` nested values.

    Raises:
        error: the text is refused.
    """
    import yaml

    try:
        depth = 0
        for event in yaml.parse(text, yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise ValueError(f"it refers to the anchor {show(event.anchor)}")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_JSON_DEPTH:
                raise _TooDeep
            if isinstance(event, yaml.ScalarEvent) and len(event.value) > MAX_DIGITS:
                _refuse_long_number(event)
        value = yaml.safe_load(text)
        _require_plain(value)
        return value
    except (RecursionError, _TooDeep):
        reason = f"more than {MAX_JSON_DEPTH} values inside one another"
    except MemoryError:
        reason = OUT_OF_MEMORY
    except Exception as problem:  # PyYAML's own, and ValueError, TypeError, ... of dates and numbers that are none
        reason = printable(problem, 200)
    raise error(f"{printable(where)} is not valid YAML: {reason}; {remedy}") from None


class _TooDeep(Exception):
    pass


def _refuse_long_number(scalar: Any) -> None:
    """Raise for a number of many digits before YAML reads it, which takes quadratic time for some of its forms."""
    import yaml

    tag = scalar.tag or yaml.SafeLoader("").resolve(yaml.ScalarNode, scalar.value, scalar.implicit)
    if tag.endswith((":int", ":float")):
        raise ValueError(f"a number of {len(scalar.value):,} digits")


def _require_plain(value: Any) -> None:
    """Raise for a value of YAML that neither JSON nor a configuration has, without recursion of its own."""
    level = [value]
    while level:
        item = level.pop()
        if isinstance(item, dict):
            if bad := [key for key in item if not isinstance(key, str | int | float | None)]:
                raise ValueError(f"the key {show(bad[0])} is no text")
            level += [*item, *item.values()]
        elif isinstance(item, list):
            level += item
        elif not isinstance(item, str | int | float | None):
            raise ValueError(f"a value is a {type(item).__name__}; it may be a text, a number, a list or a mapping")
        elif isinstance(item, int) and abs(item) > MAX_INTEGER:
            raise ValueError("an integer is beyond 64 bits")


def _require_shallow(value: Any, source: str) -> None:
    """Raise _TooDeep for deep nesting, without recursion of its own; what cannot nest that deep is not looked at."""
    if source.count("[") + source.count("{") <= MAX_JSON_DEPTH:
        return
    level, depth = [value], 0
    while level := [item for item in level if isinstance(item, list | dict)]:
        depth += 1
        if depth > MAX_JSON_DEPTH:
            raise _TooDeep
        level = [child for item in level for child in (item.values() if isinstance(item, dict) else item)]


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {show(twice)} appears twice in one object")
    return tree


def _bounded_int(digits: str) -> int:
    if len(digits) > MAX_DIGITS + 1:  # and a sign
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)


def _finite_float(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"the number {show(digits)} is too large")
    return number


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


_DECODER = json.JSONDecoder(
    object_pairs_hook=_unique_keys, parse_int=_bounded_int, parse_float=_finite_float, parse_constant=_no_constant
)
