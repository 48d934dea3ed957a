"""What mkdocs does to the pages besides Markdown: the tables of configuration keys, equations, links out of docs/.

The keys come from the dataclasses of ``moepp.config``, so each is described once, beside its definition. Equations
between ``$`` become MathML, which browsers draw without a script. Links to files outside docs/ work where the
repository is browsed; the site shows their text alone.
"""

from __future__ import annotations

import ast
import html
import io
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("moepp/config/schema.py", "moepp/config/model.py")
KEYS_MARK = "<!-- keys -->"
# A fence, a code span, a displayed equation, an equation in a line; code comes first, so that its dollars stay.
_PIECES = re.compile(
    r"(?P<fence>^ *```.*?^ *```[^\n]*$)|(?P<code>`+)[^`]+(?P=code)|\$\$(?P<block>.+?)\$\$|\$(?P<line>[^$\n]+)\$",
    re.DOTALL | re.MULTILINE,
)
_LINK_OUT = re.compile(r"\[([^\]]+)\]\(\.\./[^)]+\)")


@dataclass(frozen=True)
class Field:
    """One field of a configuration dataclass, as its source has it."""

    key: str
    type: str
    default: str  # "" where a value must be given
    comment: str


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill in the keys, and set equations aside until Markdown is done with the page."""
    if KEYS_MARK in markdown:
        markdown = markdown.replace(KEYS_MARK, keys_as_markdown())
    markdown = _LINK_OUT.sub(r"\1", markdown)
    equations: list[str] = []

    def protect(match: re.Match[str]) -> str:
        latex = match["block"] or match["line"]
        if latex is None:
            return match.group()
        equations.append(mathml(latex, "block" if match["block"] else "inline"))
        return f"EQUATION{len(equations) - 1}ENDS"

    markdown = _PIECES.sub(protect, markdown)
    page.meta["equations"] = equations
    return markdown


def on_page_content(content: str, page: Any, **_: Any) -> str:
    """Put the equations back."""
    return re.sub(r"EQUATION(\d+)ENDS", lambda match: page.meta["equations"][int(match[1])], content)


def mathml(latex: str, display: str) -> str:
    """An equation for the browser.

    Raises:
        ValueError: a command that is not known.
    """
    from latex2mathml.converter import convert

    drawn = convert(latex.strip(), display=display)
    if "\\" in drawn:
        raise ValueError(f"cannot draw the equation {latex.strip()!r}")
    return drawn


def keys_as_markdown() -> str:
    """A table per section of the configuration: key, type, default, meaning."""
    classes = _classes()
    sections: list[str] = []
    for section in _annotated("Config", classes):
        fields = list(_fields(section.key, _class_named(section.type, classes), classes))
        rows = [f"| `{f.key}` | {_code(f.type)} | {_code(f.default)} | {_text(f.comment)} |" for f in fields]
        note = ast.get_docstring(classes[_class_named(section.type, classes)].node) or ""
        table = ["| key | type | default of the schema | meaning |", "| --- | --- | --- | --- |", *rows]
        sections.append("\n".join([f"## {section.key}", "", note.replace("``", "`"), "", *table]))
    return "\n\n".join(sections)


@dataclass(frozen=True)
class _Class:
    node: ast.ClassDef
    comments: dict[int, str]  # line -> comment on it


def _classes() -> dict[str, _Class]:
    found = {}
    for source in SOURCES:
        text = (ROOT / source).read_text(encoding="utf-8")
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        comments = {t.start[0]: t.string.removeprefix("#").strip() for t in tokens if t.type == tokenize.COMMENT}
        found |= {n.name: _Class(n, comments) for n in ast.parse(text).body if isinstance(n, ast.ClassDef)}
    return found


def _fields(prefix: str, name: str, classes: dict[str, _Class]) -> Iterator[Field]:
    for field in _annotated(name, classes):
        key = f"{prefix}.{field.key}"
        nested = _class_named(field.type, classes)
        if not nested or "None" in field.type:
            yield Field(key, field.type, field.default, field.comment)
        if nested:
            yield from _fields(key, nested, classes)


def _annotated(name: str, classes: dict[str, _Class]) -> Iterator[Field]:
    """The fields of one dataclass. A comment belongs to the field before it on its line, and goes on below it."""
    node, comments = classes[name].node, classes[name].comments
    for statement in node.body:
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        line, words = statement.end_lineno or statement.lineno, []
        while line in comments and (line == statement.end_lineno or not _starts_statement(node, line)):
            words.append(comments[line])
            line += 1
        key, default = statement.target.id, "" if statement.value is None else ast.unparse(statement.value)
        if isinstance(statement.value, ast.Call) and ast.unparse(statement.value.func) == "field":
            given = {k.arg: k.value for k in statement.value.keywords}
            metadata = ast.literal_eval(given["metadata"]) if "metadata" in given else {}
            key = metadata.get("key", key)
            default = ast.unparse(given["default"]) if "default" in given else "empty"
        yield Field(key, ast.unparse(statement.annotation), default, " ".join(words))


def _starts_statement(node: ast.ClassDef, line: int) -> bool:
    return any(statement.lineno <= line <= (statement.end_lineno or line) for statement in node.body)


def _class_named(annotation: str, classes: dict[str, _Class]) -> str:
    """The configuration class that an annotation names, or nothing."""
    return next((part.strip() for part in annotation.split("|") if part.strip() in classes), "")


def _code(text: str) -> str:
    text = text.replace("True", "true").replace("False", "false").replace("'", '"')
    return f"<code>{_text(text)}</code>" if text else "none: must be given"


def _text(text: str) -> str:
    """Text of the sources as a cell of a table; None is null in a configuration."""
    return re.sub(r"\bNone\b", "null", html.escape(text, quote=False)).replace("|", "&#124;")
