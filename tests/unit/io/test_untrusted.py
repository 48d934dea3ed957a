"""Text and JSON that somebody else has written: limits, one line per error, nothing that a terminal obeys."""

import json
import os
import re
import resource
import subprocess
import sys

import pytest

from moepp.errors import CheckpointError, ConfigError, DataError
from moepp.io.untrusted import (
    MAX_JSON_DEPTH,
    load_json,
    load_yaml,
    printable,
    read_bytes,
    read_json,
    read_text,
    show,
    terminal_text,
)

NASTY = [
    "\x1b]0;title\x07",
    "a\nb\r\nc",
    "\u202eevil",  # right-to-left override
    "\u2066\u2069\u200f",
    "\u2028\u2029\x85",
    "\x9b31m",  # CSI in one character
    "\ud800",  # half a surrogate pair
    "\u200b\ufeff\x00\x7f",
    "\U000e0041",  # tag characters
]


@pytest.mark.parametrize("text", NASTY, ids=ascii)
@pytest.mark.parametrize("function", [show, printable])
def test_nothing_that_a_terminal_obeys_is_left(function, text):
    shown = function(text)
    assert shown.isprintable() and shown.isascii()
    assert function("before" + text + "after").isprintable()


def test_ordinary_text_is_shown_as_it_is():
    assert show("Größe 数 x.bin") == "'Größe 数 x.bin'"
    assert printable("no such file: x.bin") == "no such file: x.bin"
    assert show(12) == "12" and show(None) == "None" and show([1, "a"]) == "[1, 'a']"


def test_shown_values_are_short():
    for value in ("x" * 10**7, "\x1b" * 10**6, b"\0" * 10**6, ["y" * 1000] * 1000, 10**10000, "é" * 61):
        assert len(show(value)) <= 60
        assert "..." in show(value) or "int" in show(value)
    assert len(printable("x y" * 10**6)) <= 400


def test_shortened_text_stays_quoted():
    assert show("abcdef" * 20, 20) == "'abcdefabcdefabc...'"
    assert show("x" * 58) == repr("x" * 58)


def test_json_values_are_read():
    tree = {"a": [1, -2.5, True, None, "x\u00e9\U0001f600"], "b": {"c": {}}, "limit": 10**30}
    assert load_json(json.dumps(tree), "x") == tree
    assert load_json(json.dumps(tree).encode(), "x") == tree
    assert load_json(b"\xef\xbb\xbf[1]", "x") == [1]
    assert load_json(r'"\ud83d\ude00 \\ud800"', "x") == "\U0001f600 \\ud800"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "Expecting value"),
        ("{'a': 1}", "Expecting property name"),
        ("[1] 2", "Extra data"),
        (b"\xff\xfe", "utf-8"),
        ("[" * 10**5, "inside one another|Expecting value"),
        ("[" * 10**5 + "]" * 10**5, "inside one another"),
        ('{"a":' * 10**5 + "1" + "}" * 10**5, "inside one another"),
        ("[" * (MAX_JSON_DEPTH + 1) + "]" * (MAX_JSON_DEPTH + 1), "inside one another"),
        ("1" * 5000, "integer of 5000 digits"),
        ("[-" + "1" * 50 + "]", "integer of 51 digits"),
        ("[NaN]", "NaN"),
        ("[Infinity]", "Infinity"),
        ("[-Infinity]", "Infinity"),
        ("[1e999]", "1e999"),
        ('{"a": 1, "b": 2, "a": 3}', "'a' appears twice"),
        ('[{"\\u001b": 1, "\\u001b": 3}]', r"x1b' appears twice"),
        (r'{"text": "\ud800"}', "surrogate"),
        (r'{"text": "\uDFFF"}', "surrogate"),
    ],
    ids=range(18),
)
def test_bad_json_is_one_line(text, reason):
    with pytest.raises(DataError) as caught:
        load_json(text, "corpus\x1b.jsonl line 7", remedy="remove the line")
    message = str(caught.value)
    assert message.startswith("corpus\\x1b.jsonl line 7 is not valid JSON: ") and message.endswith("; remove the line")
    assert re.search(reason, message) and message.isprintable() and len(message) < 400


def test_nesting_up_to_the_limit_is_read():
    text = "[" * MAX_JSON_DEPTH + "]" * MAX_JSON_DEPTH
    assert json.dumps(load_json(text, "x")) == text
    assert len(load_json("[" + ",".join(["[]"] * 1000) + "]", "x")) == 1000


def test_the_callers_class_of_error_is_raised(tmp_path):
    for error in (CheckpointError, ConfigError):  # the latter is a ValueError
        for read in (lambda: load_json("?", "x", error), lambda: read_json(tmp_path, error=error)):  # noqa: B023
            with pytest.raises(error, match=r"^[^;]*; give another file$"):
                read()


def test_json_beyond_memory_is_one_line():
    program = (
        "import resource\nfrom moepp.io.untrusted import load_json\nfrom moepp.errors import DataError\n"
        "text = '[' + '{},' * 1_000_000 + '{}]'\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (16 << 20),) * 2)\n"
        "try:\n    load_json(text, 'x')\nexcept DataError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert "does not fit into memory" in done.stdout, done.stderr


def test_files_are_read(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b'{"a": 1}')
    link = tmp_path / "link"
    link.symlink_to(path)
    assert read_json(path) == read_json(link) == {"a": 1}
    assert read_text(path, 8) == '{"a": 1}' and read_bytes(path, 8) == b'{"a": 1}'
    with pytest.raises(DataError, match="larger than 7 bytes; shorten it"):
        read_bytes(path, 7, remedy="shorten it")
    path.write_bytes(b"\xff")
    with pytest.raises(DataError, match="not UTF-8"):
        read_text(path, 8)


@pytest.mark.parametrize("kind", ["pipe", "device", "link to a device", "folder", "missing", "dangling link", "NUL"])
def test_only_regular_files_are_read(tmp_path, kind):
    path = tmp_path / "x.json"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path = "/dev/zero"
    elif kind == "link to a device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "dangling link":
        path.symlink_to(tmp_path / "nowhere")
    elif kind == "NUL":
        path = tmp_path / "a\0b"
    with pytest.raises(DataError) as caught:
        read_json(path)
    assert str(caught.value).isprintable() and str(caught.value).endswith("; give another file")


def test_reading_keeps_the_memory_limit_of_the_file(tmp_path):
    path = tmp_path / "sparse.json"
    with path.open("wb") as stream:
        stream.truncate(1 << 40)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match="larger than 1,048,576 bytes"):
        read_json(path, limit_bytes=1 << 20)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


# --- text on a terminal, YAML


@pytest.mark.parametrize(
    "text", [t for t in NASTY if t not in ("a\nb\r\nc", "\u200b\ufeff\x00\x7f", "\U000e0041")], ids=ascii
)
def test_text_of_a_model_commands_no_terminal(text):
    shown = terminal_text(f"one\n{text}\ttwo")
    assert shown.startswith("one\n") and shown.endswith("\ttwo")
    assert not set(shown) & set("\x1b\x07\x85\x9b\u202e\u2066\u2069\u2028\u2029\ud800\r")


def test_text_of_every_language_is_left():
    text = "Größe\n\tمی‌خواهم 👩‍🚀 漢字 שלום\n"  # joiners between letters included
    assert terminal_text(text) == text


def test_yaml_values_are_read_and_nothing_in_them_is_resolved():
    text = "a: 1\nb: [x, 2.5, null, true]\nc: {d: '${oc.env:HOME}'}\n"
    assert load_yaml(text, "x") == {"a": 1, "b": ["x", 2.5, None, True], "c": {"d": "${oc.env:HOME}"}}


BOMB = "a: &a [x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]\n" for i in range(24)
)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (BOMB, "anchor"),
        ("a: &a {b: *a}", "anchor"),
        ("a: !!python/object/apply:os.mkdir [ran]", "could not determine a constructor"),
        ("a: !!python/name:os.system ''", "could not determine a constructor"),
        ("a: !!python/object:os.x {}", "could not determine a constructor"),
        ("[" * 10**5, "inside one another"),
        ("{a: " * 200 + "1" + "}" * 200, "inside one another"),
        ("a: " + "9" * 5000, "digits"),
        ("a: 2020-99-99", "month must be"),
        ("a: [", "expected"),
        ("? [a]\n: b", "unhashable"),
        ("a: \x1b[2J", "special characters"),
        ("\t", "cannot start"),
        ("a: !<tag:\x7f> b", ""),
    ],
    ids=range(14),
)
def test_bad_yaml_is_one_line(text, reason, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as caught:
        load_yaml(text, "config.yaml", remedy="restore it")
    message = str(caught.value)
    assert message.startswith("config.yaml is not valid YAML: ") and message.endswith("; restore it")
    assert re.search(reason, message) and message.isprintable() and len(message) < 400
    assert not list(tmp_path.iterdir())
