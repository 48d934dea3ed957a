"""What a preparation found in its input, and what a user must be told about it."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from moepp.data.prepare.losses import Losses
from moepp.data.prepare.readers import DocumentReader
from moepp.io.untrusted import show

EXAMPLES = 5  # of lost characters


@dataclass
class Tally:
    """Counts of one preparation."""

    reader: DocumentReader
    eod_token: str  # ends a document
    eod_id: int
    documents: int = 0
    tokens: int = 0
    empty_documents: int = 0
    lost_documents: int = 0  # text of which the tokenizer left nothing
    documents_with_eod: int = 0  # in their text: the tokenizer does not mark the token as special
    max_token_id: int = 0
    losses: Losses = field(default_factory=Losses)
    inputs: array[int] = field(default_factory=lambda: array("i"))  # number of the input file of each document

    def remarks(self, fields: tuple[str, ...]) -> list[str]:
        """Return a line for each kind of lost text that a user must know about."""
        lines = []
        if bad := self.reader.bad_lines.count:
            lines += [f"left out {bad:,} bad lines, the first of them:", *self.reader.bad_lines.first]
        if len(fields) > 1:
            counts = ", ".join(f"{show(name)} {count:,}" for name, count in self.reader.field_counts.items())
            lines.append(f"documents by text field: {counts}")
        if self.losses.lost_characters:
            lines.append(f"the tokenizer cannot represent {self.lost_text()}")
        if self.lost_documents:
            lines.append(f"left out {self.lost_documents:,} documents of which the tokenizer keeps nothing")
        if self.documents_with_eod:
            lines.append(
                f"{self.documents_with_eod:,} documents hold the end token {show(self.eod_token)} in their text, where "
                "data.document_attention=true divides them; mark it as special in the tokenizer, or name another one "
                "with --eod-token"
            )
        return lines

    def lost_text(self) -> str:
        """Return how many characters the tokenizer cannot represent, with examples."""
        losses = self.losses
        examples = ", ".join(show(character) for character, _ in losses.samples.most_common(EXAMPLES))
        unknown = f"; {losses.unknown_tokens:,} unknown tokens" if losses.unknown_tokens else ""
        return (
            f"{losses.lost_characters:,} of {losses.characters:,} characters ({losses.share:.2%}{unknown}), "
            f"for example {examples}"
        )
