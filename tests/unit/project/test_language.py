"""Words that the project has left behind for its field's own stay out of code, tests and pages."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tests.unit.project.test_house import ROOT, tracked_files

# Pattern, and what is said instead. Word boundaries, and no word that has a good use elsewhere.
INSTEAD = {
    r"\bslots?\b(?!=)": "assignment",
    r"\breceipts?\b": "metadata",
    r"\bexchange_parts\b": "exchange_chunks",
    r"\b(tile|vector)_experts\b": "amx_experts, avx2_experts",
    r"\bsend_home\b|\bcomm\.Traffic\b|\bFFNSlots\b|\bSlotOrder\b": "the names of today",
    r"\bset_aside\b|\bset aside\b|\bleave_behind\b": "archive",
    r"\bso many (rows|steps|tokens|parts|chunks|columns|lines)\b": "this many, or a name for the number",
    r"\b(rows|tokens|assignments|slots|chunks) (that |which )?travel\b": "are sent",
    r"\btraining stood still\b": "was blocked",
    r"'s affair\b|\bare hardly\b|\bis hardly\b": "plainer words",
    r"\bcan(not)? be had\b": "is available",
    r"\b(lies?|lying|rows|columns) so far apart\b": "with a stride",
    r"\b(k|pairs|tiles|floats|values|bytes) on end\b": "consecutive",
    r"\bissues? (no\. ?|number )?#?\d+\b|\b(this|another) session\b": "nothing of how it was made",
}
# Where old names have to be known, or are shown as what not to write.
EXCEPTIONS = {
    "exchange_parts": (
        "moepp/config/suggest.py",
        "moepp/config/load.py",
        "tests/",
        "docs/benchmarks.md",
        "CHANGELOG.md",
    ),
    "": (
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        "tests/unit/project/test_language.py",
        "tests/golden/",
        "launch/deepspeed.sh",
    ),
}
SUFFIXES = {".py", ".md", ".yaml", ".c", ".h", ".sh", ".toml", ".svg"}


def hits(text: str, name: str = "moepp/example.py") -> Iterator[str]:
    """Where a text has a word that it should not."""
    for pattern, instead in INSTEAD.items():
        for match in re.finditer(pattern, text, flags=re.IGNORECASE):
            allowed = (*EXCEPTIONS[""], *EXCEPTIONS.get(match.group().lower(), ()))
            if not name.startswith(allowed):
                line = text.count("\n", 0, match.start()) + 1
                yield f"{name}:{line}: {match.group()!r}; say {instead}"


def test_words_of_other_days_stay_out():
    found = []
    for path in tracked_files():
        if path.suffix in SUFFIXES:
            found += hits(path.read_text(encoding="utf-8"), str(path.relative_to(ROOT)))
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "text",
    [
        "the slots of a token",
        "# Slot of the sort",
        "dispatch() gives a receipt",
        "parallel.exchange_parts=2",
        "tile_experts.py",
        "later ones are set aside",
        "in chunks of so many rows",
        "tokens that travel",
        "/* transposed, rows lying so far apart */",
        "two tiles on end",
        "see issue 14",
        "measured in this session",
    ],
)
def test_each_of_them_is_seen(text):
    assert list(hits(text))


@pytest.mark.parametrize(
    "text",
    [
        "@dataclass(slots=True)",
        "__slots__ = ()",
        "so many warnings",
        "hardly any",
        "a vector of experts",
        "a travelling rank",
        "pytorch issue, see pytorch/pytorch#172439",
        "the session of a process group",
    ],
)
def test_other_words_pass(text):
    assert not list(hits(text))
